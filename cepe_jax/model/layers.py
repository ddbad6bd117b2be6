"""The layers of decoder and encoder. Each module holds the weights of a whole stack: arrays lead with the layer
axis, and `at(stack, i)` is layer i, with that axis gone. Weights are cast to the activations' dtype when used."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from cepe_jax.config import Backend, Chunk, Compute, TransformerConfig
from cepe_jax.model.attention import Mask, Partial, attend_partial, merge
from cepe_jax.model.backends import attend
from cepe_jax.model.lora import Adapter, Factors
from cepe_jax.model.rope import rotate
from cepe_jax.sharding import constrain, gathered, num_shards, of_two_rows, rows_of_a_device, split_axes, window_parts

Array = jax.Array
AttendKept = Callable[
    [Array, Array], Partial
]  # takes a layer's queries, as projected and rotated: see `Reading.attend`


def at(stack, index):
    """Layer `index` of a stack of layers."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False), stack)


def normal(key: Array, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std, axes=axes)


def project(equation: str, x: Array, weight: nnx.Param, factors: Factors | None = None) -> Array:
    """The einsum of x's last axes with the weight's first ones, as one matrix product; and what the factors add.

    XLA's CPU back end takes half the time for its gradient in this form; on others the two are the same.
    """
    summed = len(set(equation.split(",")[0]) & set(equation.split(",")[1].split("->")[0]))
    matrix = weight[...].astype(x.dtype).reshape(math.prod(weight.shape[:summed]), -1)
    rows = x.reshape(-1, matrix.shape[0])
    out = of_two_rows(lambda rows: rows @ matrix, rows, 0) if split_axes("heads") else rows @ matrix
    if factors is not None:
        out += factors(rows)
    return out.reshape(*x.shape[: x.ndim - summed], *weight.shape[summed:])


def embed(table: nnx.Param, tokens: Array, dtype) -> Array:
    """Rows of the (V, D) table; NaN, and so a loud loss, for an id outside it."""

    def look_up(tokens: Array) -> Array:
        return table[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    # Of one row XLA would gather the whole table, where devices share it.
    rows = of_two_rows(look_up, tokens, 0) if split_axes("vocab") else look_up(tokens)
    # Placed as the table is, then by rows: both at once, or together with tokens, and XLA gathers all of it.
    for rows_axis in ("looked_up", "batch"):
        rows = constrain(rows, rows_axis, *[None] * (tokens.ndim - 1), "embed")
    return rows.astype(dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the variance in fp32, rounded to x's dtype before the scale (as Llama does)."""

    def __init__(self, shape: tuple[int, ...], eps: float, axes: tuple[str | None, ...]):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


def bias(shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """Return the zero biases of each layer's heads."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=("layer", *axes, "head_dim"))


def added(x: Array, of_heads: nnx.Param) -> Array:
    """Return x with a bias of its last axes added."""
    return x + of_heads[...].astype(x.dtype)


class Products(nnx.Module):
    """A module whose weights multiply, each with the factors of `lora` beside it where that has any."""

    lora: Adapter | None

    def product(self, name: str, equation: str, x: Array) -> Array:
        return project(equation, x, getattr(self, name), getattr(self.lora, name, None))


class SelfAttention(Products):
    """Attention to the tokens before, or all tokens: Llama's, with Qwen2's biases and Qwen3's norms of heads."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        Z, D, N, K, H = config.num_layers, config.width, config.num_heads, config.num_kv_heads, config.head_dim
        q, k, v, o = jax.random.split(key, 4)
        self.q = normal(q, (Z, D, N, H), D**-0.5, ("layer", "embed", "heads", "head_dim"))
        self.k = normal(k, (Z, D, K, H), D**-0.5, ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal(v, (Z, D, K, H), D**-0.5, ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal(o, (Z, N, H, D), (2 * Z * N * H) ** -0.5, ("layer", "heads", "head_dim", "embed"))
        self.lora = nnx.data(None)
        self.biased, self.normed = config.qkv_bias, config.qk_norm
        if self.biased:
            self.q_bias = bias((Z, N, H), "heads")
            self.k_bias, self.v_bias = bias((Z, K, H), "kv_heads"), bias((Z, K, H), "kv_heads")
        if self.normed:
            self.q_norm, self.k_norm = (RMSNorm((Z, H), config.norm_eps, ("layer", "head_dim")) for _ in range(2))

    def heads(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Return queries (B, T, N, H), keys and values (B, T, K, H), before the rotation."""
        q_BTNH = self.product("q", "BTD,DNH->BTNH", x_BTD)
        k_BTKH = self.product("k", "BTD,DKH->BTKH", x_BTD)
        v_BTKH = self.product("v", "BTD,DKH->BTKH", x_BTD)
        if self.biased:
            q_BTNH, k_BTKH, v_BTKH = added(q_BTNH, self.q_bias), added(k_BTKH, self.k_bias), added(v_BTKH, self.v_bias)
        if self.normed:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return q_BTNH, k_BTKH, v_BTKH

    def joined_heads(self, out_BTNH: Array) -> Array:
        """Return (B, T, D) of what the heads read."""
        return self.product("o", "BTNH,NHD->BTD", out_BTNH)

    def __call__(
        self, x_BTD: Array, table, mask: Mask, backend: Backend, attend_kept: AttendKept | None = None
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """Return the attention's output, and the call's keys (before `table` rotates them, and after) and values.

        `mask` is over the call's own T keys. `attend_kept` gives the attention to cached keys, which is merged in.
        """
        q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD)
        rotated_BTNH, rotated_BTKH = rotate(q_BTNH, table), rotate(k_BTKH, table)
        if attend_kept is None:
            out_BTNH = attend(rotated_BTNH, rotated_BTKH, v_BTKH, mask, backend)
        else:
            own = attend_partial(rotated_BTNH, rotated_BTKH, v_BTKH, mask)
            out_BTNH = merge(own, attend_kept(q_BTNH, rotated_BTNH)).astype(x_BTD.dtype)
        return self.joined_heads(out_BTNH), (k_BTKH, rotated_BTKH, v_BTKH)


CHUNK_BYTES = 1 << 28  # of the widest array of a device's chunk that is sized automatically


def chunk_of(setting: Chunk, x_BTD: Array, width: int, itemsize: int, shared_by: str) -> int:
    """Return how many positions of `x_BTD` a device computes at once; 0 is all.

    For `auto` a power of two, the most whose `width` numbers of `itemsize` bytes each take no more than CHUNK_BYTES, if
    devices cut them along the logical axis `shared_by`.
    """
    if setting != "auto":
        return setting
    position = rows_of_a_device(x_BTD.shape[0]) * width * itemsize // num_shards(shared_by)
    return 1 << (CHUNK_BYTES // position).bit_length() >> 1 or 1


def fits_a_chunk(chunk: int, length: int) -> bool:
    """Return true if a device's positions, of `length`, are no more than `chunk`; 0 is any number."""
    return not 0 < chunk < length // window_parts(length)


def cut(x_BT: Array, chunk: int, fill: float = 0, parts: int = 1) -> Array:
    """Return (chunks, B, chunk, ...): the positions of `x_BT` (B, T, ...) in order, the last chunk filled up.

    Of a window that `parts` devices share, each has `chunk` positions of its own in every chunk.
    """
    B, T, *rest = x_BT.shape
    of_parts = x_BT.reshape(B, parts, T // parts, *rest)
    widths = [(0, 0), (0, 0), (0, -(T // parts) % chunk)] + [(0, 0)] * len(rest)
    padded = jnp.pad(of_parts, widths, constant_values=fill)
    chunks = jnp.moveaxis(padded.reshape(B, parts, -1, chunk, *rest), 2, 0).reshape(-1, B, parts * chunk, *rest)
    return chunks if parts == 1 else constrain(chunks, None, "batch", "window", *[None] * len(rest))


def joined(chunks: Array, length: int, parts: int = 1) -> Array:
    """Return the inverse of `cut`: (B, length, ...), without what filled the last chunk."""
    number, B, size, *rest = chunks.shape
    if parts > 1:
        chunks = constrain(chunks, None, "batch", "window", *[None] * len(rest))
    of_parts = jnp.moveaxis(chunks.reshape(number, B, parts, size // parts, *rest), 0, 2)
    return of_parts.reshape(B, parts, -1, *rest)[:, :, : length // parts].reshape(B, length, *rest)


def in_chunks(function: Callable[[Array], Array], x_BTD: Array, chunk: int) -> Array:
    """`function(x)` of `chunk` positions at a time (0 = all), for a function of each position by itself.

    The backward pass recomputes a chunk, so that what the function makes of one is never stored for another
    (mini-sequence training), whatever the policy of a `jax.checkpoint` around it says: that is why it has its own rule.
    """
    T = x_BTD.shape[1]
    if fits_a_chunk(chunk, T):
        return function(x_BTD)
    parts = window_parts(T)
    function, weights = jax.closure_convert(function, x_BTD[:, : chunk * parts])

    def mapped(x_BTD: Array, weights: list[Array]) -> Array:
        chunks = jax.lax.map(jax.checkpoint(lambda x: function(x, *weights)), cut(x_BTD, chunk, parts=parts))
        return joined(chunks, T, parts)

    recomputed = jax.custom_vjp(mapped)
    recomputed.defvjp(lambda *inputs: (mapped(*inputs), inputs), lambda inputs, out: jax.vjp(mapped, *inputs)[1](out))
    return recomputed(x_BTD, weights)


class MLP(Products):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        Z, D, F = config.num_layers, config.width, config.mlp_width
        gate, up, down = jax.random.split(key, 3)
        self.gate = normal(gate, (Z, D, F), D**-0.5, ("layer", "embed", "mlp"))
        self.up = normal(up, (Z, D, F), D**-0.5, ("layer", "embed", "mlp"))
        self.down = normal(down, (Z, F, D), (2 * Z * F) ** -0.5, ("layer", "mlp", "embed"))
        self.lora = nnx.data(None)

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF, up_BTF = (self.product(name, "BTD,DF->BTF", x_BTD) for name in ("gate", "up"))
        return self.product("down", "BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF)


class Block(nnx.Module):
    """A Llama block, with room between self-attention and MLP for a reader of something else."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        attention, mlp = jax.random.split(key)
        norm = (config.num_layers, config.width), config.norm_eps, ("layer", "embed")
        self.attention_norm = RMSNorm(*norm)
        self.attention = SelfAttention(config, key=attention)
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = MLP(config, key=mlp)

    def __call__(
        self,
        compute: Compute,
        x_BTD: Array,
        table,
        mask: Mask,
        attend_kept: AttendKept | None = None,
        read: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """x after self-attention, `read` (when given) and MLP, each added to it; and the call's keys and values."""
        attended, kv = self.attention(self.attention_norm(x_BTD), table, mask, compute.attention, attend_kept)
        x_BTD = x_BTD + attended
        if read is not None:
            x_BTD = x_BTD + read(x_BTD)
        gate_and_up = 2 * self.mlp.gate.shape[-1]
        chunk = chunk_of(compute.mlp_chunk, x_BTD, gate_and_up, x_BTD.dtype.itemsize, "mlp")
        norm, mlp = self.mlp_norm, self.mlp
        if not fits_a_chunk(chunk, x_BTD.shape[1]):
            norm, mlp = gathered((norm, mlp))
        return x_BTD + in_chunks(lambda x: mlp(norm(x)), x_BTD, chunk), kv
