"""Attention by the kernels of TPUs (splash) and GPUs (cuDNN), of the arrays that one device has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from cepe_jax.model.attention import Partial, same_segment
from cepe_jax.sharding import balanced

# The texts of queries (B, T) and of keys (B, S): a query sees the keys of its own.
Segments = tuple[jax.Array, jax.Array]

LANES = 128  # a block of splash's is a multiple of it
NO_SEGMENT = -1  # of keys that no query sees


def splash(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None = None, residuals: bool = False):
    """Return splash attention, and its log-sum-exp (B, T, N) if `residuals` are asked for.

    Lengths are filled up to whole blocks; a filled key is of another segment.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if segments is None and S % LANES and not causal:
        segments = tuple(jnp.ones((q_BTNH.shape[0], length), jnp.int32) for length in (T, S))
    q_BTNH, k_BSKH, v_BSKH = (_filled(x, LANES) for x in (q_BTNH, k_BSKH, v_BSKH))
    if segments is not None:
        segments = tuple(_filled(x, LANES, fill) for x, fill in zip(segments, (1, NO_SEGMENT), strict=True))
    seen = CausalMask if causal else splash_attention_mask.FullMask
    kernel = _splash_kernel(seen((q_BTNH.shape[1], k_BSKH.shape[1])), q_BTNH.shape[2], residuals=residuals)
    out = splash_by(kernel, q_BTNH, k_BSKH, v_BSKH, segments)
    return tuple(x[:, :T] for x in out) if residuals else out[:, :T]


def splash_by(kernel, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return the attention of a kernel of these lengths, and its log-sum-exp if it gives it."""
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * q_BTNH.shape[3] ** -0.5, k_BSKH, v_BSKH))
    if segments is None:
        out = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        ids = splash_attention_kernel.SegmentIds(*segments)
        out = jax.vmap(lambda *x: kernel(*x[:3], segment_ids=x[3]))(q_BNTH, k_BKSH, v_BKSH, ids)
    if isinstance(out, tuple):
        out_BNTH, (lse_BNT,) = out
        return out_BNTH.swapaxes(1, 2), lse_BNT.swapaxes(1, 2)
    return out.swapaxes(1, 2)


def splash_partial(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, valid_BS: jax.Array) -> Partial:
    """Return `attend_partial` of valid keys; it has no gradient."""
    B, T, N, H = q_BTNH.shape
    if k_BSKH.shape[0] < B:
        parts = splash_partial(q_BTNH.reshape(1, B * T, N, H), k_BSKH, v_BSKH, valid_BS)
        return tuple(part.reshape(B, T, *part.shape[2:]) for part in parts)
    segments = jnp.ones((B, T), jnp.int32), jnp.where(valid_BS, 1, NO_SEGMENT)
    out_BTNH, lse_BTN = splash(False, q_BTNH, k_BSKH, v_BSKH, segments, residuals=True)
    K = k_BSKH.shape[2]
    some = valid_BS.any(axis=1)[:, None, None, None, None]
    values = jnp.where(some, out_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32), 0.0)
    peak = lse_BTN.reshape(B, T, K, N // K, 1)
    return values, jnp.broadcast_to(some, peak.shape).astype(jnp.float32), peak


class CausalMask(splash_attention_mask.CausalMask):
    """Splash's causal mask, which a kernel is made of block by block.

    A block that all or none of its queries see is given as one element. Looking at all of them takes minutes for a
    window of 131,072 tokens.
    """

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[block[0]], block[1]
        if queries.min() >= keys.stop - 1:
            return np.ones((1, 1), bool)
        if queries.max() < keys.start:
            return np.zeros((1, 1), bool)
        return super().__getitem__(block)


def check_parts(length: int, parts: int) -> None:
    """Raise ValueError if splash cannot read a window of `length` tokens that `parts` devices share."""
    if length % (parts * LANES):
        raise ValueError(
            f"a window of {length} tokens over {parts} devices: splash reads a multiple of {LANES} tokens on each: "
            f"change examples.window or mesh.context"
        )


def splash_kernel_of_parts(num_heads: int, length: int, parts: int):
    """Return the kernel of a causal window whose queries `parts` devices share, each with all keys.

    Its arrays are to be cut as the queries are: see `manual_sharding_spec`.
    """
    check_parts(length, parts)
    mask = CausalMask((length, length))
    mask.q_sequence = balanced(np.arange(length, dtype=np.int32)[None], parts)[0]
    return _splash_kernel(mask, num_heads, parts)


def _splash_kernel(mask, num_heads: int, parts: int = 1, residuals: bool = False):
    def block(length: int) -> int:
        return next(size for size in (512, 256, LANES) if length % size == 0)  # 2,048 overflows the chip's VMEM

    q, kv = block(mask.shape[0] // parts), block(mask.shape[1])
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    heads = splash_attention_mask.MultiHeadMask([mask] * num_heads)
    return splash_attention_kernel.make_splash_mha(
        heads, head_shards=1, q_seq_shards=parts, block_sizes=sizes, save_residuals=residuals
    )


def _filled(x: jax.Array, multiple: int, fill: int = 0) -> jax.Array:
    """Return x (B, length, ...) with its length filled up to a multiple."""
    widths = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)


def cudnn(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None = None):
    """Return cuDNN's flash attention. Lengths are filled up to even ones, as its derivative wants them."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if S % 2 and segments is None and not causal:  # a causal mask hides the filled key from all real queries
        segments = tuple(jnp.ones((q_BTNH.shape[0], length), jnp.int32) for length in (T, S))
    if segments is not None:
        segments = tuple(_filled(x, 2, fill) for x, fill in zip(segments, (1, NO_SEGMENT), strict=True))
    return _cudnn_even(causal, *(_filled(x, 2) for x in (q_BTNH, k_BSKH, v_BSKH)), segments)[:, :T]


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
def _cudnn_even(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments):
    inputs = q_BTNH, k_BSKH, v_BSKH, segments
    return _fold_mapped_axes(lambda *inputs: _cudnn_vjp(causal, *inputs)[0])(*inputs)


def _cudnn_vjp(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return the attention, its log-sum-exp (B, N, T), and the derivative as a function of these two."""
    seen = None if segments is None else same_segment(*segments)[:, None]
    attention = functools.partial(jax.nn.dot_product_attention, mask=seen, is_causal=causal, implementation="cudnn")
    out_BTNH, pullback = jax.vjp(attention, q_BTNH, k_BSKH, v_BSKH)
    leaves, structure = jax.tree.flatten(pullback)
    (lse_BNT,) = (x for x in leaves if x.ndim == 3)

    def derivative(of_out_BTNH: jax.Array, of_lse_BNT: jax.Array):
        replaced = [of_out_BTNH if x is out_BTNH else of_lse_BNT if x is lse_BNT else x for x in leaves]
        return jax.tree.unflatten(structure, replaced)

    return out_BTNH, lse_BNT, derivative


def _cudnn_forward(causal: bool, *inputs):
    kept = _fold_mapped_axes(lambda *inputs: _cudnn_vjp(causal, *inputs)[:2])(*inputs)
    return kept[0], (inputs, kept)


def _cudnn_backward(causal: bool, residuals, cotangent_BTNH: jax.Array):
    def backward(inputs, kept, cotangent_BTNH):
        # Of this forward pass nothing is used except its structure: the compiler leaves it out.
        return _cudnn_vjp(causal, *inputs)[2](*kept)(cotangent_BTNH)

    return *_fold_mapped_axes(backward)(*residuals, cotangent_BTNH), None


_cudnn_even.defvjp(_cudnn_forward, _cudnn_backward)


# A device has two chunks of the queries and all keys. cuDNN's calls have no mask that begins in the middle of a window,
# so that each is of square chunks: the two on the diagonal are causal, and every earlier one is seen whole.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cudnn_of_parts(parts: int, part: jax.Array, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return cuDNN's attention of device `part` of `parts`: its queries, as `balanced` has them, and all keys."""
    return _cudnn_of_parts_forward(parts, part, q_BTNH, k_BSKH, v_BSKH, segments)[0]


def _chunks(x_BT: jax.Array, number: int) -> jax.Array:
    """Return (number, B, T / number, ...)."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], number, -1, *x_BT.shape[2:]), 1, 0)


def _joined(chunks: jax.Array) -> jax.Array:
    """Return the inverse of `_chunks`."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])


def _pairs(parts: int, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return queries, keys and values in chunks, and those of a pair of chunks with their segments, as a function."""
    q, k, v = _chunks(q_BTNH, 2), _chunks(k_BSKH, 2 * parts), _chunks(v_BSKH, 2 * parts)
    of_queries, of_keys = (
        (None, None) if segments is None else (_chunks(segments[0], 2), _chunks(segments[1], 2 * parts))
    )

    def pair(query, key):
        return q[query], k[key], v[key], None if segments is None else (of_queries[query], of_keys[key])

    return (q, k, v), pair


def _over_chunks(parts: int, part: jax.Array, call, state):
    """Return the state after `call(causal, state, query chunk, key chunk)` of all pairs of chunks that see each other.

    The device's chunks are number `part` and the `part`-th from the end, so that all devices have the same number.
    """
    for query, key in ((0, part), (1, 2 * parts - 1 - part)):
        state = call(True, state, query, key)

    def step(state, number: jax.Array):
        second = number >= part
        return call(False, state, second.astype(int), number - jnp.where(second, part, 0)), None

    return jax.lax.scan(step, state, jnp.arange(2 * parts - 1))[0]


def _cudnn_of_parts_forward(parts: int, part: jax.Array, *inputs):
    (q, _, _), pair = _pairs(parts, *inputs)

    def call(causal: bool, state, query, key):
        out, lse = state
        of_pair, lse_of_pair, _ = _cudnn_vjp(causal, *pair(query, key))
        both = jnp.logaddexp(lse[query], lse_of_pair)
        weights = (jnp.exp(x - both).swapaxes(1, 2)[..., None] for x in (lse[query], lse_of_pair))
        merged = sum(x * weight for x, weight in zip((out[query], of_pair), weights, strict=True))
        return out.at[query].set(merged), lse.at[query].set(both)

    _, B, T, N, _ = q.shape
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((2, B, N, T), -jnp.inf, jnp.float32)
    out, lse = _over_chunks(parts, part, call, nothing)
    out_BTNH = _joined(out).astype(q.dtype)
    return out_BTNH, (part, inputs, out_BTNH, lse)


def _cudnn_of_parts_backward(parts: int, residuals, cotangent_BTNH: jax.Array):
    part, inputs, out_BTNH, lse = residuals
    (q, k, v), pair = _pairs(parts, *inputs)
    out, cotangent = _chunks(out_BTNH, 2), _chunks(cotangent_BTNH, 2)

    def call(causal: bool, sums, query, key):
        derivative = _cudnn_vjp(causal, *pair(query, key))[2]
        gradients = derivative(out[query], lse[query])(cotangent[query])
        places = query, key, key
        return tuple(x.at[i].add(g) for x, i, g in zip(sums, places, gradients, strict=True))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    sums = _over_chunks(parts, part, call, zeros)
    return None, *(_joined(x).astype(q.dtype) for x in sums), None


cudnn_of_parts.defvjp(_cudnn_of_parts_forward, _cudnn_of_parts_backward)
