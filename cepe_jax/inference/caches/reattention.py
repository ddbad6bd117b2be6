"""The cache of ReAttention (Liu et al. 2024, arXiv 2407.15176; first called LongCache), which needs no training.

All keys stay, not rotated. Before a layer attends, each head of each query selects the tokens with the largest products
with its key, regardless of positions. The layer then reads the first tokens of the text, those that most heads and
queries selected, with the tokens around them, and the last ones, at positions 0, 1, 2 and so on. So no position exceeds
those of training, however long the text is.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cepe_jax.config import Backend, DecoderConfig, Dtype
from cepe_jax.cost import CacheCost, cache_cost
from cepe_jax.inference.caches.counts import MOST_TOKENS, check_counts
from cepe_jax.inference.caches.full import AXES, PIECE_PAIRS, written
from cepe_jax.model.attention import Mask, Partial, attend_to_cache
from cepe_jax.model.cache import GrowingCache
from cepe_jax.model.layers import at
from cepe_jax.model.rope import rope_table, rotate
from cepe_jax.sharding import constrain

Array = jax.Array
LANES = 128  # numbers that a TPU keeps side by side
GROUP = 128  # scores of which only the largest is compared at first


@dataclass(frozen=True)
class ReAttention:
    """The policy: `sinks` first tokens, `recent` last ones, and spans around `selected` tokens between them.

    Each head of each query votes for `top_k` tokens. Those with most votes of a piece's heads and queries are selected,
    of equal ones the first. A piece is counted among the last tokens.
    """

    sinks: int = 32
    recent: int = 4096
    top_k: int = 4
    selected: int = 127
    span: int = 32
    piece: int = 512
    pools = True
    any_length = True
    window = None

    def __post_init__(self):
        check_counts(**vars(self))
        if self.scope > MOST_TOKENS:
            raise ValueError(f"a query reads {self.scope:,} tokens: lower cache.selected or cache.span")
        if self.piece > self.recent:
            raise ValueError(f"cache.piece is {self.piece}: give at most cache.recent, which is {self.recent}")

    @property
    def scope(self) -> int:
        """The most tokens that a query reads."""
        return self.sinks + self.recent + self.selected * self.span

    def of(self, path: Path, decoder: DecoderConfig, positions: int | None) -> "ReAttention":
        if positions is not None and self.scope > positions:
            raise ValueError(
                f"a query reads {self.scope:,} tokens (cache.sinks + cache.recent + cache.selected x cache.span), and "
                f"{path} has {positions:,} positions: lower cache.recent or cache.selected"
            )
        return self

    def create(self, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> "ReAttentionCache":
        shape = (config.num_layers, rows, config.num_kv_heads, self.room(slots), config.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), *AXES) for _ in range(2))
        return ReAttentionCache(k, v, jnp.zeros(rows, jnp.int32), self, empty=True)

    def room(self, slots: int) -> int:
        """Return the number of slots with those for padding, which fills up a last piece until the next tokens come."""
        return slots if slots <= self.piece else slots + self.piece

    def cost(self, config: DecoderConfig, cached: int) -> CacheCost:
        between = max(cached - self.sinks - self.recent, 0)
        return cache_cost(config, min(cached, self.scope), between)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReAttentionCache(GrowingCache):
    """The keys (not rotated) and the values of Z layers, in S slots, token j of a row in slot j.

    `length_B` counts the tokens of each row.
    """

    k_ZBKSH: Array
    v_ZBKSH: Array
    length_B: Array
    policy: ReAttention = dataclasses.field(metadata={"static": True})
    empty: bool = dataclasses.field(metadata={"static": True})

    def piece(self, rows: int, length: int, backend: Backend) -> int:
        """Return the policy's piece. A kernel reads at once as many tokens as all queries see anyway."""
        policy = self.policy
        if self.empty and backend != "xla" and length <= policy.sinks + policy.recent:
            return length
        return min(length, policy.piece)

    def by_token(self) -> "ReAttentionCache":
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, piece=1))

    def grows_by(self, rows: int) -> bool:
        return len(self.length_B) == rows

    def repeated(self, rows: int) -> "ReAttentionCache":
        cache = dataclasses.replace(self, empty=False)
        if self.grows_by(rows):
            return cache
        k, v = (jnp.repeat(x, rows, axis=1) for x in (self.k_ZBKSH, self.v_ZBKSH))
        return dataclasses.replace(cache, k_ZBKSH=k, v_ZBKSH=v, length_B=jnp.repeat(self.length_B, rows))

    def reading(self, config: DecoderConfig, real_BT: Array) -> "_Reading":
        """Return the reading. Rows must be padded on the right."""
        cache = self if self.grows_by(len(real_BT)) else self.repeated(len(real_BT))
        own_T = jnp.arange(real_BT.shape[1])
        before_B1 = jnp.minimum(cache.length_B, self.policy.scope - len(own_T))[:, None]
        seen_B = cache.length_B + real_BT.sum(axis=1)
        return _Reading(cache, before_B1 + own_T, config, real_BT, seen_B)

    def append(self, kept_Z: tuple[Array, Array], real_BT: Array) -> "ReAttentionCache":
        """Return the cache with the tokens. The caller ensures that they fit."""
        k, v = (
            written(x_ZBKSH, new_ZBTKH.swapaxes(2, 3), self.length_B, AXES)
            for x_ZBKSH, new_ZBTKH in zip((self.k_ZBKSH, self.v_ZBKSH), kept_Z, strict=True)
        )
        length_B = self.length_B + real_BT.sum(axis=1)
        return dataclasses.replace(self, k_ZBKSH=k, v_ZBKSH=v, length_B=length_B, empty=False)

    def longer(self, slots: int) -> "ReAttentionCache":
        more = [(0, 0)] * 3 + [(0, self.policy.room(slots) - self.k_ZBKSH.shape[3]), (0, 0)]
        k, v = (jnp.pad(x, more) for x in (self.k_ZBKSH, self.v_ZBKSH))
        return dataclasses.replace(self, k_ZBKSH=k, v_ZBKSH=v)

    def emptied(self, rows_B: Array) -> "ReAttentionCache":
        return dataclasses.replace(self, length_B=jnp.where(rows_B, 0, self.length_B))


class _Reading(NamedTuple):
    cache: ReAttentionCache
    positions_BT: Array
    config: DecoderConfig
    real_BT: Array
    seen_B: Array  # tokens of the text with the new ones

    def attend(self, index: Array, q_BTNH: Array, rotated_BTNH: Array) -> Partial:
        slots_BX, read_BX = self._read(q_BTNH, at(self.cache.k_ZBKSH, index))
        rope, head_dim = self.config.rope, self.config.head_dim
        positions_BX = jnp.where(read_BX, jnp.cumsum(read_BX, axis=1) - 1, 0)
        own_BT = read_BX.sum(axis=1, keepdims=True) + jnp.arange(q_BTNH.shape[1])
        k_BKXH, v_BKXH = (_in_slots(x, index, slots_BX) for x in (self.cache.k_ZBKSH, self.cache.v_ZBKSH))
        k_BXKH = rotate(k_BKXH.swapaxes(1, 2), rope_table(rope, head_dim, positions_BX))
        q_BTNH = rotate(q_BTNH, rope_table(rope, head_dim, own_BT))
        return attend_to_cache(q_BTNH, k_BXKH.swapaxes(1, 2), v_BKXH, Mask(valid_BS=read_BX))

    def _read(self, q_BTNH: Array, k_BKSH: Array) -> tuple[Array, Array]:
        """Return the slots that the layer reads, in the order of the text, and which of these it does read."""
        policy, length_B1, seen_B1 = self.cache.policy, self.cache.length_B[:, None], self.seen_B[:, None]
        S = k_BKSH.shape[2]
        first_B1 = jnp.maximum(seen_B1 - policy.recent, policy.sinks)  # of the last tokens
        sinks_BX = jnp.broadcast_to(jnp.arange(min(policy.sinks, S)), (len(length_B1), min(policy.sinks, S)))
        last_BX = first_B1 + jnp.arange(min(policy.recent, S))
        slots, read = [sinks_BX, last_BX], [sinks_BX < length_B1, last_BX < length_B1]
        if policy.sinks + policy.recent < S:
            spans_BX, chosen_BX = spans(
                selection(q_BTNH, k_BKSH, self.real_BT, policy.sinks, first_B1[:, 0], policy.top_k, policy.selected),
                policy.span,
                policy.sinks,
                first_B1[:, 0],
            )
            slots.insert(1, spans_BX)
            read.insert(1, chosen_BX)
        return jnp.concatenate(slots, axis=1), jnp.concatenate(read, axis=1)

    def keep(self, k_BTKH: Array, rotated_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        return k_BTKH, v_BTKH


def _in_slots(x_ZBKSH: Array, index: Array, slots_BX: Array) -> Array:
    """Return these slots of layer `index`, (B, K, X, H)."""
    _, B, K, _, H = x_ZBKSH.shape
    if H % LANES:
        # TPUs keep the slots of narrow heads side by side: a gather from all layers would transpose all of them.
        return jnp.take_along_axis(at(x_ZBKSH, index), slots_BX[:, None, :, None], axis=2, mode="clip")
    rows_B11, heads_K1 = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    return x_ZBKSH.at[index, rows_B11, heads_K1, slots_BX[:, None]].get(mode="clip")


def selection(
    q_BTNH: Array, k_BKSH: Array, real_BT: Array, first: int, end_B: Array, top_k: int, selected: int
) -> Array:
    """Return the slots from `first` to before `end_B` with most votes, (B, selected) in rising order.

    Every head of a real query votes for the `top_k` keys with the largest products. Of equal products and votes the
    first slots count. S marks an entry that is empty.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    top_k = min(top_k, S)
    q_BKQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    block = min(S, max(PIECE_PAIRS // (B * T), GROUP))
    starts = range(0, S, block)

    def of_block(start: Array | int) -> tuple[Array, Array]:
        """Return the best scores and their slots of a block of keys, which begins earlier where it would not fit."""
        begin = jnp.minimum(start, S - block)
        k_BKsH = jax.lax.dynamic_slice_in_dim(k_BKSH, begin, block, axis=2)
        wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        scores_BKQs = jnp.einsum("BKQH,BKsH->BKQs", q_BKQH, k_BKsH, preferred_element_type=wide)
        slots_s = begin + jnp.arange(block)
        there_Bs = (slots_s >= jnp.maximum(start, first)) & (slots_s < end_B[:, None])
        best, slots = largest(jnp.where(there_Bs[:, None, None], scores_BKQs, -jnp.inf), min(top_k, block))
        return best, (slots + begin).astype(jnp.int32)

    if len(starts) == 1:
        best_BKQk, slots_BKQk = of_block(0)
    else:

        def step(number: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
            both = zip(before, of_block(number * block), strict=True)
            best, slots = (jnp.concatenate(parts, axis=-1) for parts in both)  # earlier slots stand before later ones
            best, places = jax.lax.top_k(best, top_k)
            return best, jnp.take_along_axis(slots, places, axis=-1)

        none = jnp.full((B, K, q_BKQH.shape[2], top_k), -jnp.inf, jnp.promote_types(q_BTNH.dtype, jnp.float32))
        blocks = -(-jnp.max(end_B) // block)
        best_BKQk, slots_BKQk = jax.lax.fori_loop(0, blocks, step, (none, jnp.zeros(none.shape, jnp.int32)))
    real_BKQ = jnp.broadcast_to(real_BT[:, None, None], (B, K, N // K, T)).reshape(B, K, -1)
    counts = (best_BKQk > -jnp.inf) & real_BKQ[..., None]
    rows_B1 = jnp.arange(B)[:, None]
    slots_BV = jnp.where(counts, slots_BKQk, S).reshape(B, -1)
    votes_BS = jnp.zeros((B, S), jnp.int32).at[rows_B1, slots_BV].add(1, mode="drop")
    most_BX, chosen_BX = largest(votes_BS, min(selected, S))
    return jnp.sort(jnp.where(most_BX > 0, chosen_BX, S), axis=-1)


def spans(slots_BX: Array, span: int, first: int, end_B: Array) -> tuple[Array, Array]:
    """Return the slots around these, (B, X span) in rising order, and true for those that are read.

    Slot j brings `span` slots from j - span // 2 on, as far as they are from `first` to before `end_B`. A slot that two
    of them bring is read once. Slots from `end_B` on bring nothing.
    """
    around_BXs = slots_BX[..., None] + jnp.arange(span) - span // 2
    reached_BX = jnp.pad(around_BXs[:, :-1, -1], [(0, 0), (1, 0)], constant_values=-1)  # by the one before
    read_BXs = (around_BXs > reached_BX[..., None]) & (around_BXs >= first) & (around_BXs < end_B[:, None, None])
    read_BXs &= (slots_BX < end_B[:, None])[..., None]
    B = len(slots_BX)
    return around_BXs.reshape(B, -1), read_BXs.reshape(B, -1)


def largest(x: Array, count: int) -> tuple[Array, Array]:
    """Return the `count` largest values along the last axis and their places; of equal ones the first.

    They are in the `count` groups with the largest maxima, which a first pass finds; the rest is not sorted.
    """
    size = x.shape[-1]
    if size <= count * GROUP:
        return jax.lax.top_k(x, count)
    least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    grouped = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % GROUP)], constant_values=least)
    grouped = grouped.reshape(*x.shape[:-1], -1, GROUP)
    groups = jnp.sort(jax.lax.top_k(grouped.max(axis=-1), count)[1], axis=-1)
    few = jnp.take_along_axis(grouped, groups[..., None], axis=-2)
    values, places = jax.lax.top_k(few.reshape(*x.shape[:-1], -1), count)
    group = jnp.take_along_axis(groups, places // GROUP, axis=-1)
    return values, group * GROUP + places % GROUP
