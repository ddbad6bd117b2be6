"""The cache of RazorAttention (Tang et al. 2024, arXiv 2407.15891) for models with rotary positions.

Few heads find things far back in a text; `scripts/calibrate.py` scores them. They keep all tokens. The others keep the
first tokens, the last ones, and a compensation token: the mean of the keys and of the values that left, which counts as
many times as tokens have left. The paper compresses a cache once, when the prompt has been read. Here every token reads
what a cache compressed before it holds, so that a prediction does not depend on where the prompt ends.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import Backend, DecoderConfig, Dtype
from cepe_jax.cost import CacheCost, cache_cost
from cepe_jax.inference.caches.counts import check_counts
from cepe_jax.inference.caches.full import PIECE_PAIRS, written
from cepe_jax.inference.caches.retrieval_heads import read_scores, retrieval_heads
from cepe_jax.model.attention import NEVER, Mask, Partial, attend_to_heads, combine, combine_scanned
from cepe_jax.model.cache import Cache
from cepe_jax.parsing import shortened
from cepe_jax.sharding import constrain, on_shards, split_axes

Array = jax.Array
PIECE = 256  # tokens that are read at once
BLOCK = 1 << 14  # slots that are read at once
AXES = "batch", "layer", "length", "head_dim"  # heads of all layers stand where another cache has layers


@dataclass(frozen=True)
class Razor:
    """The policy: all tokens in `heads`, which are pairs of a layer and a key head.

    The other heads keep `sinks` first tokens and, of N tokens, the last N / `compression` or `recent`, whichever are
    more. `heads` is None until the policy is a model's: then they are the key heads with the largest scores, a share
    `induction` of them by one score and a share `echo` by the other.
    """

    sinks: int = 4
    recent: int = 4000
    compression: int = 5
    induction: float = 0.14
    echo: float = 0.01
    heads: tuple[tuple[int, int], ...] | None = None
    pools = False
    any_length = False
    window = None

    def __post_init__(self):
        check_counts(sinks=self.sinks, recent=self.recent, compression=self.compression)
        if self.recent <= self.sinks:
            raise ValueError(f"cache.recent is {self.recent}: give more than cache.sinks, which is {self.sinks}")
        for name in ("induction", "echo"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= 1:
                raise ValueError(f"cache.{name} is {shortened(value)}: give a share of the heads, 0 to 1")

    def of(self, path: Path, decoder: DecoderConfig, positions: int | None) -> "Razor":
        if self.heads is not None:
            return self
        heads = retrieval_heads(*read_scores(path, decoder), self.induction, self.echo)
        return dataclasses.replace(self, heads=heads)

    def create(self, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> "RazorCache":
        if self.heads is None:
            raise ValueError("cache.kind is razor, and its heads are not known: load the model with it")
        if split_axes("heads"):
            raise ValueError("cache.kind is razor, which keeps each head its own tokens: give mesh.tensor 1")
        others = config.num_layers * config.num_kv_heads - len(self.heads)
        kept = min(self.sinks + max(self.recent, slots // self.compression), max(slots, self.sinks + 1))
        kept += 1  # for padding
        wide, H = jnp.promote_types(dtype, jnp.float32), config.head_dim
        k, v = (constrain(jnp.zeros((rows, len(self.heads), slots, H), dtype), *AXES) for _ in range(2))
        other_k, other_v = (constrain(jnp.zeros((rows, others, kept, H), dtype), *AXES) for _ in range(2))
        sum_k, sum_v = (constrain(jnp.zeros((rows, others, H), wide), *AXES[:2], "head_dim") for _ in range(2))
        length_B = jnp.zeros(rows, jnp.int32)
        return RazorCache(k, v, other_k, other_v, sum_k, sum_v, length_B, self, config.num_kv_heads, empty=True)

    def cost(self, config: DecoderConfig, cached: int) -> CacheCost:
        heads = config.num_layers * config.num_kv_heads
        stay = min(cached, self.sinks + max(self.recent, cached // self.compression) + 1)  # with the compensation token
        return cache_cost(config, (len(self.heads) * cached + (heads - len(self.heads)) * stay) / heads)

    def gone(self, count: Array) -> Array:
        """Return how many of `count` tokens have left the heads that keep recent ones."""
        return jnp.maximum(count - jnp.maximum(self.recent, count // self.compression) - self.sinks, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RazorCache(Cache):
    """The rotated keys and the values of R retrieval heads in S slots, and of O other heads in W.

    The heads of all layers stand one after another. In the others the first slots hold the first tokens, the last one
    padding, and the rest are a ring of the last tokens. `sum_k_BOH` and `sum_v_BOH` are sums over the tokens that have
    left, in fp32 or wider.
    """

    k_BRSH: Array
    v_BRSH: Array
    k_BOWH: Array
    v_BOWH: Array
    sum_k_BOH: Array
    sum_v_BOH: Array
    length_B: Array
    policy: Razor = dataclasses.field(metadata={"static": True})
    kv_heads: int = dataclasses.field(metadata={"static": True})
    empty: bool = dataclasses.field(metadata={"static": True})

    @property
    def is_whole_ZK(self) -> np.ndarray:
        """True for heads that keep all tokens."""
        numbers = np.zeros(self.k_BRSH.shape[1] + self.k_BOWH.shape[1], bool).reshape(-1, self.kv_heads)
        numbers[tuple(np.array(self.policy.heads, int).reshape(-1, 2).T)] = True
        return numbers

    @property
    def ring(self) -> int:
        """The number of slots for the last tokens: all but those of the first tokens and that of padding."""
        return self.k_BOWH.shape[2] - self.policy.sinks - 1

    def piece(self, rows: int, length: int, backend: Backend) -> int:
        """Return a divisor of `length`, because padding would take slots; at most `recent`: no token of a piece leaves.

        A kernel reads at once what is too short for any token to leave.
        """
        if length <= min(PIECE, self.policy.recent):
            return length
        if self.empty and backend != "xla" and length <= self.policy.sinks + self.policy.recent:
            return length
        return math.gcd(length, 1 << min(PIECE, self.policy.recent).bit_length() - 1)

    def grows_by(self, rows: int) -> bool:
        return len(self.length_B) == rows

    def repeated(self, rows: int) -> "RazorCache":
        cache = dataclasses.replace(self, empty=False)
        return cache if self.grows_by(rows) else jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), cache)

    def reading(self, config: DecoderConfig, real_BT: Array) -> "_Reading":
        """Return the reading. Rows must be padded on the right."""
        T, length_B1 = real_BT.shape[1], self.length_B[:, None]
        # If several rows read a cache of one row, attention takes their queries as one row, one text after another.
        number_Q = jnp.tile(jnp.arange(T), len(real_BT) // len(length_B1))
        gone_B1, gone_BQ = self.policy.gone(length_B1), self.policy.gone(length_B1 + number_Q + 1)
        return _Reading(self, length_B1 + jnp.arange(T), T, gone_B1, gone_BQ)

    def append(self, kept_Z: tuple[Array, Array], real_BT: Array) -> "RazorCache":
        """Return the cache with the tokens. The caller ensures that they fit."""
        T, whole = real_BT.shape[1], np.flatnonzero(self.is_whole_ZK)
        others = np.flatnonzero(~self.is_whole_ZK)
        added_B = real_BT.sum(axis=1)
        length_B = self.length_B + added_B
        gone_B = self.policy.gone(self.length_B)
        leaves_BT = jnp.arange(T) < (self.policy.gone(length_B) - gone_B)[:, None]
        arrays = {}
        for name, x_ZBTKH in zip("kv", kept_Z, strict=True):
            new_BPTH = jnp.moveaxis(x_ZBTKH, (0, 3), (1, 2)).reshape(len(real_BT), -1, T, x_ZBTKH.shape[-1])
            ring, sums = getattr(self, f"{name}_BOWH"), getattr(self, f"sum_{name}_BOH")
            left_BOTH = jnp.where(leaves_BT[:, None, :, None], self.next_to_leave(ring, T), 0)
            arrays[f"sum_{name}_BOH"] = sums + left_BOTH.sum(axis=2, dtype=sums.dtype)
            arrays[f"{name}_BRSH"] = written(getattr(self, f"{name}_BRSH"), new_BPTH[:, whole], self.length_B, AXES)
            arrays[f"{name}_BOWH"] = self._in_ring(ring, new_BPTH[:, others], added_B)
        return dataclasses.replace(self, **arrays, length_B=length_B, empty=False)

    def _slot(self, token: Array) -> Array:
        """Return the slot of a token in the heads that keep recent ones."""
        sinks = self.policy.sinks
        return jnp.where(token < sinks, token, sinks + (token - sinks) % self.ring)

    def next_to_leave(self, x_BOWH: Array, count: int, first: Array | int = 0, heads: int | None = None) -> Array:
        """Return the `count` tokens that leave next, (B, heads, count, H), of `heads` heads from `first` on, or all."""
        sinks, heads = self.policy.sinks, heads or x_BOWH.shape[1]
        begin_B = self._slot(sinks + self.policy.gone(self.length_B))

        def of_a_device(x_BOWH: Array, begin_B: Array, first: Array) -> Array:
            def span(row: Array | int, start: Array) -> Array:
                place = jnp.full_like(first, row), first, start, jnp.zeros_like(first)
                return jax.lax.dynamic_slice(x_BOWH, place, (1, heads, count, x_BOWH.shape[3]))

            def of_row(row: Array | int) -> Array:
                if count == 1:
                    return span(row, begin_B[row])
                # The end of the ring and, behind it, its beginning. To gather slots, a TPU would turn all of it around.
                start = jnp.minimum(begin_B[row], sinks + self.ring - count)
                both = jnp.concatenate([span(row, start), span(row, jnp.full_like(start, sinks))], axis=2)
                return jax.lax.dynamic_slice_in_dim(both, begin_B[row] - start, count, axis=2)

            rows = len(begin_B)
            return of_row(0) if rows == 1 else jax.lax.map(of_row, jnp.arange(rows))[:, 0]

        in_axes = AXES, ("batch",), ()
        return on_shards(of_a_device, in_axes, AXES)(x_BOWH, begin_B, jnp.asarray(first, begin_B.dtype))

    def _in_ring(self, x_BOWH: Array, new_BOTH: Array, added_B: Array) -> Array:
        """Return `x_BOWH` with the new tokens in their slots, one after another, and padding in the last slot."""
        B, _, T, _ = new_BOTH.shape

        def write(number: Array, x_BOWH: Array) -> Array:
            slot_B = jnp.where(number < added_B, self._slot(self.length_B + number), x_BOWH.shape[2] - 1)
            return written(x_BOWH, jax.lax.dynamic_slice_in_dim(new_BOTH, number, 1, axis=2), slot_B, AXES)

        return jax.lax.fori_loop(0, T, write, x_BOWH)

    def emptied(self, rows_B: Array) -> "RazorCache":
        sums = (jnp.where(rows_B[:, None, None], 0, x_BOH) for x_BOH in (self.sum_k_BOH, self.sum_v_BOH))
        sum_k_BOH, sum_v_BOH = sums
        length_B = jnp.where(rows_B, 0, self.length_B)
        return dataclasses.replace(self, sum_k_BOH=sum_k_BOH, sum_v_BOH=sum_v_BOH, length_B=length_B)


class _Reading(NamedTuple):
    cache: RazorCache
    positions_BT: Array
    count: int  # new tokens
    gone_B1: Array  # tokens that had left before the new ones
    gone_BQ: Array  # tokens that have left for each query

    def attend(self, index: Array, q_BTNH: Array, rotated_BTNH: Array) -> Partial:
        """Attend by a program for each number of retrieval heads that a layer can have."""
        cache, (B, T, N, H) = self.cache, rotated_BTNH.shape
        rows, K, is_whole_ZK = len(cache.length_B), cache.kv_heads, cache.is_whole_ZK
        counts_Z = is_whole_ZK.sum(axis=1)
        order_ZK = np.argsort(~is_whole_ZK, axis=1, kind="stable")
        of_layer = (counts_Z.cumsum() - counts_Z, (K - counts_Z).cumsum() - (K - counts_Z))
        first_whole, first_other = (jnp.asarray(numbers)[index] for numbers in of_layer)
        q_BKGQH = jnp.moveaxis(rotated_BTNH.reshape(rows, B // rows * T, K, N // K, H), 1, 3)
        q_BKGQH = q_BKGQH[:, jnp.asarray(order_ZK)[index]]
        kinds, kind_Z = np.unique(counts_Z, return_inverse=True)
        branches = [functools.partial(self._of_heads, int(count)) for count in kinds]
        parts = jax.lax.switch(jnp.asarray(kind_Z)[index], branches, q_BKGQH, first_whole, first_other)
        back_K = jnp.asarray(order_ZK.argsort(axis=1))[index]
        return tuple(jnp.moveaxis(part[:, back_K], 3, 1).reshape(B, T, K, N // K, -1) for part in parts)

    def _of_heads(self, count: int, q_BKGQH: Array, first_whole: Array, first_other: Array) -> Partial:
        """Return the attention of a layer's heads, of which the first `count` keep all tokens."""
        cache, length_B11 = self.cache, self.cache.length_B[:, None, None]
        parts = []
        if count:

            def before_B1S(slots_S: Array) -> Array:
                return slots_S < length_B11

            whole = cache.k_BRSH, cache.v_BRSH
            parts.append(_in_blocks(q_BKGQH[:, :count], *whole, first_whole, before_B1S))
        if count < cache.kv_heads:

            def stay_BQS(slots_S: Array) -> Array:
                sinks = cache.policy.sinks
                in_ring = (length_B11 - 1 - slots_S) % cache.ring
                token_B1S = length_B11 - 1 - in_ring  # the last one in this slot of the ring
                is_ring_S = (slots_S >= sinks) & (slots_S < sinks + cache.ring)
                stays_BQS = (token_B1S >= sinks + self.gone_BQ[..., None]) & is_ring_S
                return stays_BQS | ((slots_S < sinks) & (slots_S < length_B11))

            others = cache.k_BOWH, cache.v_BOWH
            stay = _in_blocks(q_BKGQH[:, count:], *others, first_other, stay_BQS)
            parts.append(combine(stay, self._compensation(q_BKGQH[:, count:], first_other)))
        return tuple(jnp.concatenate(heads, axis=1) for heads in zip(*parts, strict=True))

    def _compensation(self, q_BKGQH: Array, first: Array) -> Partial:
        """Return the attention to the mean of the tokens that have left, which counts that many times."""
        cache, count = self.cache, q_BKGQH.shape[1]

        def means_BKQH(x_BOWH: Array, sums_BOH: Array) -> Array:
            """Means for each query: of the tokens that had left, and of those that leave with the new ones."""
            leaving_BKTH = cache.next_to_leave(x_BOWH, self.count, first, count).astype(sums_BOH.dtype)
            before_BK1H = jax.lax.dynamic_slice_in_dim(sums_BOH, first, count, axis=1)[:, :, None]
            sums_BKTH = before_BK1H + jnp.pad(jnp.cumsum(leaving_BKTH, axis=2), [(0, 0), (0, 0), (1, 0), (0, 0)])
            number_B1Q1 = (self.gone_BQ - self.gone_B1)[:, None, :, None]
            return jnp.take_along_axis(sums_BKTH, number_B1Q1, axis=2) / jnp.maximum(self.gone_BQ, 1)[:, None, :, None]

        k_BKQH, v_BKQH = means_BKQH(cache.k_BOWH, cache.sum_k_BOH), means_BKQH(cache.v_BOWH, cache.sum_v_BOH)
        scores_BKGQ = jnp.einsum("BKGQH,BKQH->BKGQ", q_BKGQH.astype(k_BKQH.dtype), k_BKQH) * q_BKGQH.shape[-1] ** -0.5
        some_BQ1 = (self.gone_BQ > 0)[:, None, None, :, None]
        peaks = (
            scores_BKGQ[..., None] + jnp.log(jnp.maximum(self.gone_BQ, 1).astype(k_BKQH.dtype))[:, None, None, :, None]
        )
        values = jnp.broadcast_to(jnp.where(some_BQ1, v_BKQH[:, :, None], 0), q_BKGQH.shape)
        sums = jnp.broadcast_to(some_BQ1, peaks.shape).astype(peaks.dtype)
        return values, sums, jnp.where(some_BQ1, peaks, NEVER)

    def keep(self, k_BTKH: Array, rotated_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        return rotated_BTKH, v_BTKH


def _in_blocks(q_BKGQH: Array, k_BXSH: Array, v_BXSH: Array, first: Array, seen_of) -> Partial:
    """Return the attention to the slots of K heads from head `first` on, of a block of slots at a time.

    What it stores does not grow with the text. `seen_of(slots)` is true, (B, 1 or Q, slots), for those that are seen.
    """
    (B, K, _, Q, H), S = q_BKGQH.shape, k_BXSH.shape[2]
    size = min(S, BLOCK, max(PIECE_PAIRS // (B * Q), 128))

    def block(start: Array | int) -> Partial:
        """The last block begins earlier where it would not fit, and does not see what is before `start`."""
        placed = jnp.minimum(start, S - size)
        k, v = (jax.lax.dynamic_slice(x, (0, first, placed, 0), (B, K, size, H)) for x in (k_BXSH, v_BXSH))
        slots_s = placed + jnp.arange(size)
        seen_BQs = seen_of(slots_s) & (slots_s >= start)
        return attend_to_heads(q_BKGQH, k, v, Mask(seen_BTS=seen_BQs), H**-0.5)

    return block(0) if size == S else combine_scanned(block, jnp.arange(0, S, size))
