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
BLOCK, LARGE_BLOCK = 512, 1024  # tokens that splash reads at once; 2,048 overflow a chip's VMEM
LONG = (
    1 << 18
)  # tokens: of a longer window splash's tables of the mask's blocks, in SMEM, have room for large ones alone
NO_SEGMENT = -1  # of keys that no query sees
CHUNK = 8192  # tokens, at most, of a causal window that cuDNN reads with a mask: 128 MiB a row


def splash(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None = None, residuals: bool = False):
    """Return splash attention, and its log-sum-exp (B, T, N) if `residuals` are asked for.

    Lengths are filled up to whole blocks; a filled key is of another segment.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if causal:
        check_window(T, 1)
    if segments is None and S % _whole(S) and not causal:
        segments = tuple(jnp.ones((q_BTNH.shape[0], length), jnp.int32) for length in (T, S))
    q_BTNH, k_BSKH, v_BSKH = (_filled(x, _whole(x.shape[1])) for x in (q_BTNH, k_BSKH, v_BSKH))
    if segments is not None:
        segments = tuple(
            _filled(x, _whole(x.shape[1]), fill) for x, fill in zip(segments, (1, NO_SEGMENT), strict=True)
        )
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


def check_window(length: int, parts: int) -> None:
    """Raise ValueError if splash cannot read a causal window of `length` tokens that `parts` devices share."""
    if parts > 1 and length % (parts * LANES):
        raise ValueError(
            f"a window of {length} tokens over {parts} devices: splash reads a multiple of {LANES} tokens on each: "
            f"change examples.window or mesh.context"
        )
    keys = length + (-length % _whole(length) if parts == 1 else 0)
    queries = keys // parts
    if (queries // _block(queries, keys)) * (keys // _block(keys, keys)) > (LONG // BLOCK) ** 2:
        whole = f", or give each a multiple of {_whole(length)} tokens" if parts > 1 else ""
        raise ValueError(
            f"a window of {length} tokens over {parts} devices has more blocks than splash holds in a chip: let more "
            f"devices share it, by mesh.context{whole}"
        )


def splash_kernel_of_parts(num_heads: int, length: int, parts: int):
    """Return the kernel of a causal window whose queries `parts` devices share, each with all keys.

    Its arrays are to be cut as the queries are: see `manual_sharding_spec`.
    """
    check_window(length, parts)
    mask = CausalMask((length, length))
    mask.q_sequence = balanced(np.arange(length, dtype=np.int32)[None], parts)[0]
    return _splash_kernel(mask, num_heads, parts)


def _splash_kernel(mask, num_heads: int, parts: int = 1, residuals: bool = False):
    T, S = mask.shape[0] // parts, mask.shape[1]
    q, kv = (_block(length, max(T, S)) for length in (T, S))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=min(kv, BLOCK),
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=min(kv, BLOCK),
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    heads = splash_attention_mask.MultiHeadMask([mask] * num_heads)
    return splash_attention_kernel.make_splash_mha(
        heads, head_shards=1, q_seq_shards=parts, block_sizes=sizes, save_residuals=residuals
    )


def _whole(length: int) -> int:
    """Return what a length is filled up to a multiple of, so that its blocks are large where it is long."""
    return LARGE_BLOCK if length > LONG else BLOCK if length > 32 * BLOCK else LANES


def _block(length: int, longest: int) -> int:
    """Return the tokens of a block of queries or keys, the longer of which are `longest`."""
    return next(size for size in (LARGE_BLOCK if longest > LONG else BLOCK, BLOCK, 256, LANES) if length % size == 0)


def _filled(x: jax.Array, multiple: int, fill: int = 0) -> jax.Array:
    """Return x (B, length, ...) with its length filled up to a multiple."""
    widths = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)


def cudnn(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None = None):
    """Return cuDNN's flash attention. Lengths are filled up to even ones, as its derivative wants them.

    A long causal window of several texts is filled up to whole chunks.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if S % 2 and segments is None and not causal:  # a causal mask hides the filled key from all real queries
        segments = tuple(jnp.ones((q_BTNH.shape[0], length), jnp.int32) for length in (T, S))
    chunks = _num_chunks(causal, T, segments)
    assert chunks == 1 or T == S
    multiple = 2 * chunks
    if segments is not None:
        segments = tuple(_filled(x, multiple, fill) for x, fill in zip(segments, (1, NO_SEGMENT), strict=True))
    return _cudnn_filled(causal, *(_filled(x, multiple) for x in (q_BTNH, k_BSKH, v_BSKH)), segments)[:, :T]


def _num_chunks(causal: bool, length: int, segments: Segments | None) -> int:
    """Return the number of chunks in which a window is read: for segments cuDNN reads a mask of the length's square."""
    return -(-length // CHUNK) if causal and segments is not None else 1


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
def _cudnn_filled(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments):
    return _cudnn_forward(causal, q_BTNH, k_BSKH, v_BSKH, segments)[0]


def _cudnn_vjp(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return the attention, its log-sum-exp (B, N, T), and the derivative as a function of these two."""
    seen = None if segments is None else same_segment(*segments)[:, None]
    attention = functools.partial(jax.nn.dot_product_attention, mask=seen, is_causal=causal, implementation="cudnn")
    out_BTNH, pullback = jax.vjp(attention, q_BTNH, k_BSKH, v_BSKH)
    leaves, structure = jax.tree.flatten(pullback)
    (lse_BNT,) = (x for x in leaves if x.ndim == 3)
    assert any(x is out_BTNH for x in leaves), "JAX keeps another output than it returns"

    def derivative(of_out_BTNH: jax.Array, of_lse_BNT: jax.Array):
        # Of this forward pass nothing is used except its structure: the compiler leaves it out.
        replaced = [of_out_BTNH if x is out_BTNH else of_lse_BNT if x is lse_BNT else x for x in leaves]
        return jax.tree.unflatten(structure, replaced)

    return out_BTNH, lse_BNT, derivative


def _cudnn_forward(causal: bool, q_BTNH, k_BSKH, v_BSKH, segments):
    def forward(*inputs):
        if (chunks := _num_chunks(causal, inputs[0].shape[1], inputs[3])) > 1:
            return _forward_in_chunks(jnp.arange(chunks), *inputs)
        return _cudnn_vjp(causal, *inputs)[:2]

    inputs = q_BTNH, k_BSKH, v_BSKH, segments
    kept = _fold_mapped_axes(forward)(*inputs)
    return kept[0], (inputs, kept)


def _cudnn_backward(causal: bool, residuals, cotangent_BTNH: jax.Array):
    def backward(inputs, kept, cotangent_BTNH):
        if (chunks := _num_chunks(causal, cotangent_BTNH.shape[1], inputs[3])) > 1:
            return _backward_in_chunks(jnp.arange(chunks), inputs, kept, cotangent_BTNH)
        return _cudnn_vjp(causal, *inputs)[2](*kept)(cotangent_BTNH)

    return *_fold_mapped_axes(backward)(*residuals, cotangent_BTNH), None


_cudnn_filled.defvjp(_cudnn_forward, _cudnn_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cudnn_of_parts(parts: int, part: jax.Array, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return cuDNN's attention of device `part` of `parts`: its queries, as `balanced` has them, and all keys."""
    return _of_parts_forward(parts, part, q_BTNH, k_BSKH, v_BSKH, segments)[0]


def _of_parts_forward(parts: int, part: jax.Array, *inputs):
    T, segments = inputs[0].shape[1], inputs[3]
    each = _num_chunks(True, T // 2, segments)  # of either half of the device's queries
    if T % (4 * each):
        each = 1
    halves = jnp.stack([part, 2 * parts - 1 - part])
    places_P = (halves[:, None] * each + jnp.arange(each)).reshape(-1)
    kept = _forward_in_chunks(places_P, *inputs)
    return kept[0], (places_P, inputs, kept)


def _of_parts_backward(parts: int, residuals, cotangent_BTNH: jax.Array):
    return None, *_backward_in_chunks(*residuals, cotangent_BTNH), None


cudnn_of_parts.defvjp(_of_parts_forward, _of_parts_backward)


# cuDNN's calls have no mask that begins in the middle of a window, so that each is of square chunks: the one on the
# diagonal is causal, and every earlier one is seen whole, or passed over if it has no text of the queries.
def _forward_in_chunks(places_P, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return causal attention and its log-sum-exp (B, N, T) of P chunks of queries.

    Chunk p of the queries stands where chunk places_P[p] of the keys does.
    """
    P = len(places_P)
    queries, keys = _in_chunks(P, q_BTNH, k_BSKH, v_BSKH, segments)

    def of_chunk(chunk):
        place, (q, of_queries) = chunk

        def read(causal: bool, key):
            k, v, of_keys = jax.tree.map(lambda x: x[key], keys)
            out, lse, _ = _cudnn_vjp(causal, q, k, v, None if segments is None else (of_queries, of_keys))
            return out.astype(jnp.float32), lse

        def with_earlier(key, state):
            of_key = read(False, key)
            both = jnp.logaddexp(state[1], of_key[1])
            weights = (jnp.exp(lse - both).swapaxes(1, 2)[..., None] for _, lse in (state, of_key))
            return sum(out * weight for (out, _), weight in zip((state, of_key), weights, strict=True)), both

        step = _where_texts_meet(with_earlier, of_queries, keys[2])
        out, lse = jax.lax.fori_loop(0, place, step, read(True, place))
        return out.astype(q.dtype), lse.swapaxes(1, 2)

    out, lse = jax.lax.map(of_chunk, (places_P, queries))
    return _joined(out), _joined(lse).swapaxes(1, 2)


def _backward_in_chunks(places_P, inputs, kept, cotangent_BTNH: jax.Array):
    """Return the gradients of queries, keys and values; `kept` is what `_forward_in_chunks` returned."""
    q_BTNH, k_BSKH, v_BSKH, segments = inputs
    P = len(places_P)
    queries, keys = _in_chunks(P, *inputs)
    outputs = tuple(_chunks(x, P) for x in (kept[0], kept[1].swapaxes(1, 2), cotangent_BTNH))

    def of_chunk(of_keys_so_far, chunk):
        place, (q, of_queries), (out, lse, cotangent) = chunk

        def add(causal: bool, key, sums):
            k, v, of_keys = jax.tree.map(lambda x: x[key], keys)
            derivative = _cudnn_vjp(causal, q, k, v, None if segments is None else (of_queries, of_keys))[2]
            dq, dk, dv = derivative(out, lse.swapaxes(1, 2))(cotangent)
            return sums[0] + dq, sums[1].at[key].add(dk), sums[2].at[key].add(dv)

        sums = add(True, place, (jnp.zeros(q.shape, jnp.float32), *of_keys_so_far))
        step = _where_texts_meet(functools.partial(add, False), of_queries, keys[2])
        dq, *of_keys_so_far = jax.lax.fori_loop(0, place, step, sums)
        return of_keys_so_far, dq.astype(q.dtype)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in keys[:2]]
    (dk, dv), dq = jax.lax.scan(of_chunk, zeros, (places_P, queries, outputs))
    return _joined(dq), _joined(dk).astype(k_BSKH.dtype), _joined(dv).astype(v_BSKH.dtype)


def _in_chunks(num_queries: int, q_BTNH, k_BSKH, v_BSKH, segments: Segments | None):
    """Return queries and their segments, keys, values and their segments, in chunks of one length."""
    num_keys = num_queries * k_BSKH.shape[1] // q_BTNH.shape[1]
    of_queries, of_keys = (None, None) if segments is None else segments
    queries = jax.tree.map(lambda x: _chunks(x, num_queries), (q_BTNH, of_queries))
    return queries, jax.tree.map(lambda x: _chunks(x, num_keys), (k_BSKH, v_BSKH, of_keys))


def _where_texts_meet(step, of_queries: jax.Array | None, of_keys: jax.Array | None):
    """Return `step`, left out for a chunk of keys that has no text of the queries in any row, by the texts' numbers."""
    if of_queries is None:
        return step

    def step_or_none(key, state):
        texts = of_keys[key]
        meet_B = (texts.min(axis=1) <= of_queries.max(axis=1)) & (of_queries.min(axis=1) <= texts.max(axis=1))
        return jax.lax.cond(meet_B.any(), lambda: step(key, state), lambda: state)

    return step_or_none


def _chunks(x_BT: jax.Array, number: int) -> jax.Array:
    """Return (number, B, T / number, ...)."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], number, -1, *x_BT.shape[2:]), 1, 0)


def _joined(chunks: jax.Array) -> jax.Array:
    """Return the inverse of `_chunks`."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])
