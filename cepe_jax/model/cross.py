"""Cross-attention that reads the encoder's memory: keys and values made from it, or their projections absorbed."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cepe_jax.config import Backend, CepeConfig
from cepe_jax.cost import read_flops
from cepe_jax.model.attention import (
    Mask,
    Partial,
    attend_partial,
    attend_to_heads,
    combine_over,
    combine_scanned,
    merge,
)
from cepe_jax.model.backends import attend
from cepe_jax.model.kernels import splash_partial
from cepe_jax.model.layers import RMSNorm, added, bias, normal, project
from cepe_jax.sharding import on_shards, rows_of_a_device, split_axes

Array = jax.Array

# Pairs of a query and a key whose scores in a head (XLA), or whose mask (cuDNN), exist at once.
BLOCK_PAIRS: dict[Backend, int] = {"xla": 1 << 21, "cudnn": 1 << 28}
LEAST_BLOCK = 128  # tokens of memory
KERNEL_BLOCK = 1 << 14  # tokens of memory whose keys and values exist at once beside splash, which stores no scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """The encoder's output for the contexts. Every layer with cross-attention reads the same memory.

    All rows of tokens read a memory of one row. `valid_BM` is true for real tokens; None means that all are real.
    """

    states_BME: Array
    valid_BM: Array | None = None


class CrossAttention(nnx.Module):
    """Reads the encoder's memory: own pre-norm, no positions, no causal mask, no gate (paper, section 3.1).

    The memory is the encoder's output, the same for every layer. With few queries the key projection goes into the
    query and the value projection after the sum, so that no key or value of the memory exists: q (W_k m) = (q W_k) m.

    Of a decoder with biases the queries and values have them too: a bias of keys would add the same to all scores of a
    query. Of a decoder with norms of heads the queries have theirs. Keys have none, which is not linear in the memory:
    `cross_from_self_attention` folds its scale into their projection.
    """

    def __init__(self, config: CepeConfig, *, key: Array):
        decoder, self.layers = config.decoder, config.cross_layers
        Z, E, D, N = self.layers.count, config.encoder.width, decoder.width, decoder.num_heads
        K, H = decoder.num_kv_heads, decoder.head_dim
        q, k, v, o = jax.random.split(key, 4)
        self.norm = RMSNorm((Z, D), decoder.norm_eps, ("layer", "embed"))
        self.q = normal(q, (Z, D, N, H), D**-0.5, ("layer", "embed", "heads", "head_dim"))
        self.k = normal(k, (Z, E, K, H), E**-0.5, ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal(v, (Z, E, K, H), E**-0.5, ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal(o, (Z, N, H, D), (2 * Z * N * H) ** -0.5, ("layer", "heads", "head_dim", "embed"))
        self.biased, self.normed = decoder.qkv_bias, decoder.qk_norm
        if self.biased:
            self.q_bias, self.v_bias = bias((Z, N, H), "heads"), bias((Z, K, H), "kv_heads")
        if self.normed:
            self.q_norm = RMSNorm((Z, H), decoder.norm_eps, ("layer", "head_dim"))

    def __call__(self, x_BTD: Array, memory: Memory, backend: Backend, differentiable: bool = True) -> Array:
        """Return the values to add to x; they are zero in rows whose memory is wholly masked.

        Where nothing asks for a gradient, TPUs need not hold keys and values of the whole memory.
        """
        q_BTNH = project("BTD,DNH->BTNH", self.norm(x_BTD), self.q)
        if self.biased:
            q_BTNH = added(q_BTNH, self.q_bias)
        if self.normed:
            q_BTNH = self.q_norm(q_BTNH)
        out_BTNH = self.read(q_BTNH, memory, backend, differentiable).astype(x_BTD.dtype)
        if self.biased:  # the weights of a row's values sum to 1, or to 0 if it has no memory
            bias_NH = jnp.repeat(self.v_bias[...], q_BTNH.shape[2] // self.v_bias.shape[0], axis=0)
            seen_B = jnp.ones(1, bool) if memory.valid_BM is None else memory.valid_BM.any(axis=1)
            out_BTNH += jnp.where(seen_B[:, None, None, None], bias_NH.astype(out_BTNH.dtype), 0)
        return project("BTNH,NHD->BTD", out_BTNH, self.o)

    def read(self, q_BTNH: Array, memory: Memory, backend: Backend, differentiable: bool) -> Array:
        """The heads' attention (B, T, N, H) to the memory, in the form that takes fewer FLOPs."""
        rows, M = memory.states_BME.shape[:2]
        num_queries = q_BTNH.shape[1] * (q_BTNH.shape[0] // rows)
        flops = read_flops(num_queries, q_BTNH.shape[2], M, self.k.shape)
        if flops.absorbed < flops.materialised:
            return self.absorbed(q_BTNH, memory)
        return self.materialised(q_BTNH, memory, backend, differentiable)

    def materialised(self, q_BTNH: Array, memory: Memory, backend: Backend, differentiable: bool) -> Array:
        """From keys and values (B, M, K, H each): for a kernel those of all memory, else of a block of it at a time."""
        B, T, N, H = q_BTNH.shape
        rows, M = memory.states_BME.shape[:2]
        whole = {
            "xla": False,
            "cudnn": BLOCK_PAIRS["cudnn"] >= rows_of_a_device(B) * T * M,
            "splash": differentiable or M <= KERNEL_BLOCK,
        }[backend]
        if whole and not split_axes("memory"):
            q_BTNH = q_BTNH.reshape(rows, B // rows * T, N, H)
            k_BMKH, v_BMKH = _keys_and_values(memory, self.k, self.v)
            return attend(q_BTNH, k_BMKH, v_BMKH, Mask(valid_BS=memory.valid_BM), backend).reshape(B, T, N, H)
        return self._over_the_memory(functools.partial(_materialised_part, backend), q_BTNH, memory)

    def absorbed(self, q_BTNH: Array, memory: Memory) -> Array:
        """Return attention to the memory itself, the one key and value of all heads; by XLA, whatever the back end."""
        if not split_axes("memory"):  # XLA may move the few queries instead of the weights, which no block asks for
            return merge(_absorbed_part(q_BTNH, memory, self.k[...], self.v[...]))
        return self._over_the_memory(_absorbed_part, q_BTNH, memory)

    def _over_the_memory(self, part: Callable[..., Partial], q_BTNH: Array, memory: Memory) -> Array:
        """`part` of the whole memory, or of each device's share of it, merged.

        Every device computes the rows and heads that it holds, from weights that are gathered once and not by block.
        """
        axes = split_axes("memory")
        rows = "batch" if memory.states_BME.shape[0] == q_BTNH.shape[0] else None
        heads, weight = ("batch", "length", "heads", "head_dim"), (None, "kv_heads", "head_dim")
        valid = () if memory.valid_BM is None else (memory.valid_BM,)

        def of_a_device(q_BTNH: Array, k: Array, v: Array, *memory: Array) -> Array:
            read = part(q_BTNH, Memory(*memory), k, v)
            return merge(combine_over(axes, read) if axes else read)

        in_axes = heads, weight, weight, (rows, "memory", None), *[(rows, "memory") for _ in valid]
        return on_shards(of_a_device, in_axes, heads)(q_BTNH, self.k[...], self.v[...], memory.states_BME, *valid)


def _keys_and_values(memory: Memory, k: Array, v: Array) -> tuple[Array, Array]:
    return project("BME,EKH->BMKH", memory.states_BME, k), project("BME,EKH->BMKH", memory.states_BME, v)


def _materialised_part(backend: Backend, q_BTNH: Array, memory: Memory, k: Array, v: Array) -> Partial:
    def block(memory: Memory) -> Partial:
        k_BMKH, v_BMKH = _keys_and_values(memory, k, v)
        if backend == "splash":
            valid_BM = jnp.ones(k_BMKH.shape[:2], bool) if memory.valid_BM is None else memory.valid_BM
            return splash_partial(q_BTNH, k_BMKH, v_BMKH, valid_BM)
        return attend_partial(q_BTNH, k_BMKH, v_BMKH, Mask(valid_BS=memory.valid_BM))

    B, T = q_BTNH.shape[:2]
    return _in_blocks(block, memory, KERNEL_BLOCK if backend == "splash" else BLOCK_PAIRS["xla"] // (B * T))


def _absorbed_part(q_BTNH: Array, memory: Memory, k: Array, v: Array) -> Partial:
    (B, T, N, H), (E, K, _) = q_BTNH.shape, k.shape
    k, v = k.astype(q_BTNH.dtype), v.astype(q_BTNH.dtype)
    heads = B, T, K, N // K, -1
    q_BTKGE = jnp.einsum("BTKGH,EKH->BTKGE", q_BTNH.reshape(heads), k)
    q_B11QE = q_BTKGE.reshape(memory.states_BME.shape[0], 1, 1, -1, E)

    def block(memory: Memory) -> Partial:
        memory_B1ME = memory.states_BME[:, None]
        return attend_to_heads(q_B11QE, memory_B1ME, memory_B1ME, Mask(valid_BS=memory.valid_BM), H**-0.5)

    sums, *weights = (x.reshape(heads) for x in _in_blocks(block, memory, BLOCK_PAIRS["xla"] // (B * T)))
    values = jnp.einsum("BTKGE,EKH->BTKGH", sums.astype(v.dtype), v, preferred_element_type=sums.dtype)
    return values, *weights


def _in_blocks(part: Callable[[Memory], Partial], memory: Memory, limit: int) -> Partial:
    """`part` of the memory, of about `limit` tokens of it at once: what it stores does not grow."""
    M = memory.states_BME.shape[1]
    if limit >= M:
        return part(memory)
    limit = max(1 << limit.bit_length() >> 1, LEAST_BLOCK)  # a power of two
    size = math.gcd(M, limit)
    if size < LEAST_BLOCK:
        size, states_BME, valid_BM = limit, memory.states_BME, memory.valid_BM
        valid_BM = jnp.ones(states_BME.shape[:2], bool) if valid_BM is None else valid_BM
        filled_BME = jnp.pad(states_BME, [(0, 0), (0, -M % size), (0, 0)])
        memory = Memory(filled_BME, jnp.pad(valid_BM, [(0, 0), (0, -M % size)]))

    def block(start: Array | int) -> Partial:
        return part(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1), memory))

    return combine_scanned(block, jnp.arange(0, memory.states_BME.shape[1], size))
