"""Attention over masked keys, in one pass or merged from partial results, and its back ends."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from cepe_jax.config import Backend, Compute
from cepe_jax.sharding import of_two_rows, on_shards, split_axes

NEVER = jnp.finfo(jnp.float32).min  # score of a key that a query does not see

# Values weighted by exp(score - peak) (B, T, K, G, H); the sum of the weights and the peak (B, T, K, G, 1 each).
Partial = tuple[jax.Array, jax.Array, jax.Array]


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """The keys that a query sees. `valid_BS`: true for keys that exist. `causal`: query i sees keys up to i.

    `segments_BT`: the text of each token, where queries and keys are tokens of several texts and see those of their own
    text alone. `seen_BTS` is true if a query sees a key; only XLA's attention supports it.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    valid_BS: jax.Array | None = None
    segments_BT: jax.Array | None = None
    seen_BTS: jax.Array | None = None

    @property
    def may_hide_all(self) -> bool:
        """True if a query may see no key at all."""
        return self.valid_BS is not None or self.seen_BTS is not None

    @property
    def hides_some(self) -> bool:
        """True if a query may not see all keys."""
        return self.causal or self.segments_BT is not None or self.may_hide_all

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Boolean (B or 1, 1, 1, T, S)."""
        seen = jnp.ones((1, 1, 1, num_queries, num_keys), bool)
        if self.causal:
            seen &= jnp.tril(seen)
        if self.valid_BS is not None:
            seen &= self.valid_BS[:, None, None, None, :]
        if self.segments_BT is not None:
            seen &= same_segment(self.segments_BT)[:, None, None]
        if self.seen_BTS is not None:
            seen &= self.seen_BTS[:, None, None]
        return seen


def same_segment(segments_BT: jax.Array) -> jax.Array:
    """Return (B, T, T), true for two tokens of one text."""
    return segments_BT[:, :, None] == segments_BT[:, None]


def attend_partial(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> Partial:
    """Unnormalised attention over some of the keys, to be merged with `merge`.

    Scores are scaled by 1 / sqrt(H); softmax arithmetic is fp32, or fp64 of fp64. A query without any valid key has
    sum 0. Keys (not causal) and mask of one row serve the queries of all rows.
    """
    return attend_to_cache(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask)


def attend_to_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> Partial:
    """Attend as `attend_partial` does, to keys and values as a cache holds them."""
    B, T, N, H = q_BTNH.shape
    rows, K = k_BKSH.shape[:2]
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(rows, B // rows * T, K, N // K, H), 1, 3)

    def by_query(part_BKGTX: jax.Array) -> jax.Array:
        return jnp.moveaxis(part_BKGTX, 3, 1).reshape(B, T, K, N // K, -1)

    return tuple(map(by_query, attend_to_heads(q_BKGTH, k_BKSH, v_BKSH, mask, H**-0.5)))


# Left to itself, the derivative keeps several arrays of the scores' size, and turns them around for its products: on a
# CPU it takes two to three times as long. Here the scores are computed again, and each product has keys last in them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_to_heads(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, scale: float) -> Partial:
    """Attend as `attend_partial` does, by key head: values (B, K, G, T, H), sums and peaks (B, K, G, T, 1)."""
    scores_BKQS = _scores(q_BKGTH, k_BKSH, mask, scale)
    peak_BKQ1 = scores_BKQS.max(axis=-1, keepdims=True)
    weights_BKQS = jnp.exp(scores_BKQS - peak_BKQ1)
    sums_BKQ1 = weights_BKQS.sum(axis=-1, keepdims=True)
    values_BKQH = _product("BKQS,BKSH->BKQH", weights_BKQS.astype(v_BKSH.dtype), v_BKSH)
    values_BKQH, sums_BKQ1 = _seen_alone(mask, peak_BKQ1, values_BKQH, sums_BKQ1)
    return tuple(x.reshape(*q_BKGTH.shape[:4], -1) for x in (values_BKQH, sums_BKQ1, peak_BKQ1))


def _queries(x_BKGTX: jax.Array) -> jax.Array:
    """(B, K, Q, X): of an operand with two axes of queries XLA would turn the other operand around."""
    return x_BKGTX.reshape(*x_BKGTX.shape[:2], -1, x_BKGTX.shape[-1])


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: Mask, scale: float) -> jax.Array:
    scores_BKQS = _product("BKQH,BKSH->BKQS", _queries(q_BKGTH), k_BKSH) * scale
    if not mask.hides_some:
        return scores_BKQS
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    scores_BKGTS = scores_BKQS.reshape(*q_BKGTH.shape[:4], S)
    return _queries(jnp.where(mask.dense(T, S), scores_BKGTS, NEVER))


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))
    # One device turns the keys of several texts around for a query of each, several devices all that they share.
    if split_axes("heads") or (left.shape[0] > 1 and equation.endswith("S")):
        return of_two_rows(lambda left: product(left, right), left, axis=2)
    return product(left, right)


def _seen_alone(mask: Mask, peak: jax.Array, *parts: jax.Array) -> list[jax.Array]:
    """The parts, zero for queries without a valid key: the exponentials of their scores are all 1."""
    return [part if not mask.may_hide_all else jnp.where(peak == NEVER, 0, part) for part in parts]


def _attend_to_heads_forward(*inputs):
    parts = attend_to_heads(*inputs)
    return parts, (inputs[:4], parts[2])


def _attend_to_heads_backward(scale: float, residuals, cotangents: Partial):
    """The derivative for constant peaks: what is made of the parts does not depend on them."""
    (q_BKGTH, k_BKSH, v_BKSH, mask), peak_BKGT1 = residuals
    q_BKQH, peak_BKQ1 = _queries(q_BKGTH), _queries(peak_BKGT1)
    of_values_BKQH, of_sums_BKQ1 = _seen_alone(mask, peak_BKQ1, *map(_queries, cotangents[:2]))
    of_values_BKQH = of_values_BKQH.astype(v_BKSH.dtype)
    weights_BKQS = jnp.exp(_scores(q_BKGTH, k_BKSH, mask, scale) - peak_BKQ1)
    of_weights_BKQS = _product("BKQH,BKSH->BKQS", of_values_BKQH, v_BKSH) + of_sums_BKQ1
    of_scores_BKQS = (weights_BKQS * of_weights_BKQS * scale).astype(q_BKQH.dtype)
    of_q_BKQH = jnp.einsum("BKQS,BKSH->BKQH", of_scores_BKQS, k_BKSH)
    of_k_BKHS = jnp.einsum("BKQH,BKQS->BKHS", q_BKQH, of_scores_BKQS)
    of_v_BKHS = jnp.einsum("BKQH,BKQS->BKHS", of_values_BKQH, weights_BKQS.astype(v_BKSH.dtype))
    return of_q_BKQH.reshape(q_BKGTH.shape), of_k_BKHS.swapaxes(2, 3), of_v_BKHS.swapaxes(2, 3), None


attend_to_heads.defvjp(_attend_to_heads_forward, _attend_to_heads_backward)


def combine(*parts: Partial) -> Partial:
    """The unnormalised attention over the union of the parts' keys."""
    peak = functools.reduce(jnp.maximum, [peak for _, _, peak in parts])
    scales = [jnp.exp(p - peak) for _, _, p in parts]
    values = sum(v * scale for (v, _, _), scale in zip(parts, scales, strict=True))
    total = sum(t * scale for (_, t, _), scale in zip(parts, scales, strict=True))
    return values, total, peak


def combine_scanned(part: Callable[[jax.Array], Partial], starts: jax.Array) -> Partial:
    """Combine `part(start)` over all starts, one at a time."""
    values, total, peak = jax.eval_shape(part, starts[0])
    nothing = jnp.zeros(values.shape, values.dtype), jnp.zeros(total.shape, total.dtype)
    lowest = jnp.full(peak.shape, NEVER, peak.dtype)
    step = jax.checkpoint(lambda seen, start: (combine(seen, part(start)), None))
    return jax.lax.scan(step, (*nothing, lowest), starts)[0]


def combine_over(mesh_axes: tuple[str, ...], part: Partial) -> Partial:
    """Return what `combine` gives of the parts that the devices along these axes hold; inside of a shard_map."""
    values, total, peak = part
    highest = jax.lax.pmax(jax.lax.stop_gradient(peak), mesh_axes)
    scale = jnp.exp(peak - highest)
    return *jax.lax.psum((values * scale, total * scale), mesh_axes), highest


def merge(*parts: Partial) -> jax.Array:
    """The attention over the union of the parts' keys, (B, T, N, H) in fp32; zero for a query with no valid key."""
    values, total, _ = combine(*parts)
    nothing = total == 0  # not `total > 0`: a NaN must stay one
    out = jnp.where(nothing, 0.0, values / jnp.where(nothing, 1.0, total))
    B, T, K, G, H = out.shape
    return out.reshape(B, T, K * G, H)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, backend: Backend = "xla") -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys of `mask`, (B, T, N, H) in q's dtype; zero where no key is valid.

    Query heads are grouped over the K key/value heads (GQA): head n reads kv head n // (N / K). The back end "xla"
    stores the scores (B, N, T, S); "splash" (TPU) and "cudnn" (GPU, 16 bits) never do.
    """
    if backend == "xla":
        return merge(attend_partial(q_BTNH, k_BSKH, v_BSKH, mask)).astype(q_BTNH.dtype)
    given = {name: x for name in ("valid_BS", "segments_BT") if (x := getattr(mask, name)) is not None}

    def kernel(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *masks: jax.Array) -> jax.Array:
        of_backend = {"splash": _splash, "cudnn": _cudnn}[backend]
        return of_backend(mask.causal, q_BTNH, k_BSKH, v_BSKH, **dict(zip(given, masks, strict=True)))

    heads, kv_heads = (("batch", "length", name, "head_dim") for name in ("heads", "kv_heads"))
    in_axes = heads, kv_heads, kv_heads, *[("batch", "length") for _ in given]
    out_BTNH = on_shards(kernel, in_axes, heads)(q_BTNH, k_BSKH, v_BSKH, *given.values())
    if mask.valid_BS is None:
        return out_BTNH
    # The kernels return a mean of values to a query without a valid key.
    any_valid = jnp.cumsum(mask.valid_BS, axis=1) > 0 if mask.causal else mask.valid_BS.any(axis=1, keepdims=True)
    return jnp.where(any_valid[:, :, None, None], out_BTNH, 0)


def splash_partial(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, valid_BS: jax.Array) -> Partial:
    """Return `attend_partial` of valid keys, from the TPU's kernel, inside of a shard_map; it has no gradient."""
    B, T, N, H = q_BTNH.shape
    if k_BSKH.shape[0] < B:
        parts = splash_partial(q_BTNH.reshape(1, B * T, N, H), k_BSKH, v_BSKH, valid_BS)
        return tuple(part.reshape(B, T, *part.shape[2:]) for part in parts)
    out_BTNH, lse_BTN = _splash(False, q_BTNH, k_BSKH, v_BSKH, valid_BS, residuals=True)
    K = k_BSKH.shape[2]
    some = valid_BS.any(axis=1)[:, None, None, None, None]
    values = jnp.where(some, out_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32), 0.0)
    peak = lse_BTN.reshape(B, T, K, N // K, 1)
    return values, jnp.broadcast_to(some, peak.shape).astype(jnp.float32), peak


def _splash(causal: bool, q_BTNH, k_BSKH, v_BSKH, valid_BS=None, segments_BT=None, residuals: bool = False):
    """Splash attention of one shard, and its log-sum-exp (B, T, N) where `residuals` are asked for.

    Lengths are filled up to whole blocks; a filled key is of another segment.
    """
    T, N, H = q_BTNH.shape[1:]
    S = k_BSKH.shape[1]
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x, [(0, 0), (0, -x.shape[1] % _LANES), (0, 0), (0, 0)]).swapaxes(1, 2)
        for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH)
    )
    if valid_BS is None and S % _LANES and not causal:
        valid_BS = jnp.ones((q_BTNH.shape[0], S), bool)
    kernel = _splash_kernel(causal, N, q_BNTH.shape[2], k_BKSH.shape[2], residuals)
    if valid_BS is None and segments_BT is None:
        out = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        rows, real = q_BTNH.shape[0], jnp.ones((1, S), bool) if valid_BS is None else valid_BS
        of_queries, of_keys = (jnp.ones((rows, n), jnp.int32) if segments_BT is None else segments_BT for n in (T, S))
        of_keys = jnp.where(real, of_keys, _NO_SEGMENT)
        segments = splash_attention_kernel.SegmentIds(
            *(
                jnp.pad(x, [(0, 0), (0, -x.shape[1] % _LANES)], constant_values=fill)
                for x, fill in ((of_queries, 1), (of_keys, _NO_SEGMENT))
            )
        )
        out = jax.vmap(lambda *x: kernel(*x[:3], segment_ids=x[3]))(q_BNTH, k_BKSH, v_BKSH, segments)
    if residuals:
        out_BNTH, (lse_BNT,) = out
        return out_BNTH.swapaxes(1, 2)[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]
    return out.swapaxes(1, 2)[:, :T]


_LANES = 128  # a block of keys is a multiple of it
_NO_SEGMENT = -1  # of keys that no query sees


def _splash_kernel(causal: bool, num_heads: int, T: int, S: int, residuals: bool):
    def block(length: int) -> int:
        return next(size for size in (512, 256, _LANES) if length % size == 0)  # 2,048 overflows the chip's VMEM

    q, kv = block(T), block(S)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    seen = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    heads = splash_attention_mask.MultiHeadMask([seen((T, S))] * num_heads)
    return splash_attention_kernel.make_splash_mha(
        heads, head_shards=1, q_seq_shards=1, block_sizes=sizes, save_residuals=residuals
    )


def _cudnn(causal: bool, q_BTNH, k_BSKH, v_BSKH, valid_BS=None, segments_BT=None):
    """cuDNN's flash attention of one shard. Lengths are filled up to even ones, as its derivative wants them."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if S % 2 and valid_BS is None and not causal:  # a causal mask hides the filled key from all real queries
        valid_BS = jnp.ones((q_BTNH.shape[0], S), bool)
    given = (
        x if x is None else jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2))
        for x in (q_BTNH, k_BSKH, v_BSKH, valid_BS, segments_BT)
    )
    return _cudnn_even(causal, *given)[:, :T]


def _fold_mapped_axes(function):
    """`function` of arrays that lead with rows; the axes that `jax.vmap` maps over become rows as well."""
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(size: int, mapped, *inputs):
        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        outputs = folded(*jax.tree.map(fold, inputs, tuple(mapped)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outputs), jax.tree.map(lambda _: True, outputs)

    return folded


# JAX maps cuDNN's attention over an axis only if a mask is given for each head, N times as large as the one we have. A
# function that folds mapped axes has no derivative, so both passes fold by themselves.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn_even(causal: bool, q_BTNH, k_BSKH, v_BSKH, valid_BS, segments_BT):
    inputs = q_BTNH, k_BSKH, v_BSKH, valid_BS, segments_BT
    return _fold_mapped_axes(lambda *inputs: _cudnn_vjp(causal, *inputs)[0])(*inputs)


def _cudnn_vjp(causal: bool, q_BTNH, k_BSKH, v_BSKH, valid_BS, segments_BT):
    """The attention, what `_cudnn_even` keeps for its derivative, and the derivative as a function of what is kept."""
    seen = None
    if valid_BS is not None:
        seen = jnp.broadcast_to(valid_BS[:, None, None], (len(valid_BS), 1, q_BTNH.shape[1], valid_BS.shape[1]))
    if segments_BT is not None:
        same = same_segment(segments_BT)[:, None]
        seen = same if seen is None else seen & same
    attention = functools.partial(jax.nn.dot_product_attention, mask=seen, is_causal=causal, implementation="cudnn")
    out_BTNH, pullback = jax.vjp(attention, q_BTNH, k_BSKH, v_BSKH)
    leaves, structure = jax.tree.flatten(pullback)
    made = [index for index, x in enumerate(leaves) if x is out_BTNH or x.ndim == 3]  # and the log-sum-exp (B, N, T)

    def derivative(kept: list[jax.Array]):
        of_kept = dict(zip(made, kept, strict=True))
        return jax.tree.unflatten(structure, [of_kept.get(index, x) for index, x in enumerate(leaves)])

    return out_BTNH, [leaves[index] for index in made], derivative


def _cudnn_forward(causal: bool, *inputs):
    out_BTNH, kept = _fold_mapped_axes(lambda *inputs: _cudnn_vjp(causal, *inputs)[:2])(*inputs)
    return out_BTNH, (inputs, kept)


def _cudnn_backward(causal: bool, residuals, cotangent_BTNH: jax.Array):
    def backward(inputs, kept, cotangent_BTNH):
        # Of this forward pass nothing is used except its structure: the compiler leaves it out.
        return _cudnn_vjp(causal, *inputs)[2](kept)(cotangent_BTNH)

    return *_fold_mapped_axes(backward)(*residuals, cotangent_BTNH), None, None


_cudnn_even.defvjp(_cudnn_forward, _cudnn_backward)
