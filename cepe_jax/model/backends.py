"""Attention by the back end that a model computes with: XLA, splash (TPU) or cuDNN (GPU)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cepe_jax.config import Backend, Compute
from cepe_jax.model.attention import Mask, attend_partial, merge, same_segment
from cepe_jax.model.kernels import (
    NO_SEGMENT,
    Segments,
    cudnn,
    cudnn_of_parts,
    splash,
    splash_by,
    splash_kernel_of_parts,
)
from cepe_jax.sharding import balanced, in_order, num_shards, on_shards, split_axes


def native_backend(platform: str, dtype: str) -> Backend:
    """The back end that is made for a platform of JAX's ("cpu", "gpu", "tpu") and activations of this dtype."""
    if platform == "gpu":
        return "cudnn" if dtype == "bfloat16" else "xla"
    return "splash" if platform == "tpu" else "xla"


def resolved(compute: Compute, head_dim: int) -> Compute:
    """Return `compute` with this process's own back end in place of `auto`.

    Raise ValueError if the back end cannot read heads of this width.
    """
    if compute.attention == "auto":
        compute = dataclasses.replace(compute, attention=native_backend(jax.default_backend(), compute.dtype))
    if compute.attention == "cudnn" and (head_dim % 8 or head_dim > 128):
        raise ValueError(
            f"head_dim {head_dim}: cuDNN's attention takes multiples of 8 up to 128: choose attention xla, or dtype "
            f"float32, which is computed by it"
        )
    return compute


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, backend: Backend = "xla") -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys of `mask`, (B, T, N, H) in q's dtype; zero where no key is valid.

    Query heads are grouped over the K key/value heads (GQA): head n reads kv head n // (N / K). The back end "xla"
    stores the scores (B, N, T, S); "splash" (TPU) and "cudnn" (GPU, 16 bits) never do.
    """
    if backend == "xla" and mask.parts == 1:
        return merge(attend_partial(q_BTNH, k_BSKH, v_BSKH, mask)).astype(q_BTNH.dtype)
    segments = _segments(mask, q_BTNH.shape[1])
    if mask.parts > 1:
        out_BTNH = _attend_to_window(q_BTNH, k_BSKH, v_BSKH, segments, mask.parts, backend)
    else:
        heads, kv_heads = (("batch", "length", name, "head_dim") for name in ("heads", "kv_heads"))

        def kernel(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *segments: jax.Array) -> jax.Array:
            return {"splash": splash, "cudnn": cudnn}[backend](mask.causal, q_BTNH, k_BSKH, v_BSKH, segments or None)

        in_axes = heads, kv_heads, kv_heads, *[("batch", "length") for _ in segments]
        out_BTNH = on_shards(kernel, in_axes, heads)(q_BTNH, k_BSKH, v_BSKH, *segments)
    if mask.valid_BS is None:
        return out_BTNH
    # The kernels return means of values to a query without a valid key.
    any_valid = jnp.cumsum(mask.valid_BS, axis=1) > 0 if mask.causal else mask.valid_BS.any(axis=1, keepdims=True)
    if mask.parts > 1:
        any_valid = balanced(any_valid, mask.parts)
    return jnp.where(any_valid[:, :, None, None], out_BTNH, 0)


def _segments(mask: Mask, num_queries: int) -> Segments | tuple[()]:
    """Return the segments that hide from queries what the mask hides besides what is to come; () if it hides none."""
    of_queries = of_keys = mask.segments_BT
    if mask.valid_BS is not None:
        rows, S = mask.valid_BS.shape
        if of_keys is None:
            of_queries, of_keys = (jnp.ones((rows, length), jnp.int32) for length in (num_queries, S))
        of_keys = jnp.where(mask.valid_BS, of_keys, NO_SEGMENT)
    return () if of_keys is None else (of_queries, of_keys)


def _attend_to_window(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments | tuple[()],
    parts: int,
    backend: Backend,
) -> jax.Array:
    """Return causal attention in a window that devices share: each keeps its queries and gathers all keys and values.

    These are few beside the queries (GQA), and the compiler gathers them while it computes something else.
    """
    axes, (T, N) = split_axes("window"), q_BTNH.shape[1:3]
    heads, kv_heads = (("batch", "window", name, "head_dim") for name in ("heads", "kv_heads"))
    in_axes, inputs = [heads, kv_heads, kv_heads], [q_BTNH, k_BTKH, v_BTKH]
    if has_segments := bool(segments):
        in_axes += [("batch", "window"), ("batch", "length")]
        inputs += [balanced(segments[0], parts), segments[1]]
    if backend == "splash":
        kernel = splash_kernel_of_parts(N // num_shards("heads"), T, parts)
        place = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, axes))
        in_axes.append(kernel.manual_sharding_spec(place))
        inputs.append(kernel)

    def of_a_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *rest) -> jax.Array:
        k_BSKH, v_BSKH = (in_order(jax.lax.all_gather(x, axes, axis=1, tiled=True), parts) for x in (k_BTKH, v_BTKH))
        part, segments = jax.lax.axis_index(axes), rest[:2] if has_segments else None
        match backend:
            case "splash":
                return splash_by(rest[-1], q_BTNH, k_BSKH, v_BSKH, segments)
            case "cudnn":
                return cudnn_of_parts(parts, part, q_BTNH, k_BSKH, v_BSKH, segments)
            case "xla":
                at_T = balanced(jnp.arange(T)[None], parts).reshape(parts, -1)[part]
                seen_BTS = (at_T[:, None] >= jnp.arange(T))[None]
                if segments:
                    seen_BTS = seen_BTS & same_segment(*segments)
                return merge(attend_partial(q_BTNH, k_BSKH, v_BSKH, Mask(seen_BTS=seen_BTS))).astype(q_BTNH.dtype)

    return on_shards(of_a_device, in_axes, heads)(*inputs)
