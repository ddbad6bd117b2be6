"""The rolling cache of StreamingLLM (Xiao et al. 2023), which keeps the first tokens of a text and the last ones.

Positions are those in the cache, not in the text. Attention depends on distances only. Recent tokens are at their true
distance. The first tokens, the sinks, are never further away than the cache is long. A piece of new tokens can
therefore be read at once: its queries attend to recent keys and to the sinks with different angles, and the two results
are merged by log-sum-exp.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cepe_jax.config import Backend, DecoderConfig, Dtype
from cepe_jax.cost import CacheCost, cache_cost
from cepe_jax.inference.caches.counts import check_counts
from cepe_jax.model.attention import Mask, Partial, attend_partial, combine
from cepe_jax.model.cache import Cache
from cepe_jax.model.layers import at
from cepe_jax.model.rope import rope_table, rotate
from cepe_jax.sharding import constrain, on_shards

Array = jax.Array
PIECE = 256  # tokens that are read at once
AXES = "layer", "batch", "length", "kv_heads", "head_dim"


@dataclass(frozen=True)
class Rolling:
    """The policy that keeps the first `sinks` tokens and the last ones, `window` in all.

    `window` is None until the policy is a model's: then it is as many as the model has positions.
    """

    window: int | None = None
    sinks: int = 4
    pools = False
    any_length = True

    def __post_init__(self):
        check_counts(**{name: value for name, value in vars(self).items() if value is not None})
        if not 0 < self.sinks < (self.sinks + 1 if self.window is None else self.window):
            raise ValueError(
                f"cache.sinks is {self.sinks} and cache.window {self.window}: give 1 sink or more, and a larger window"
            )

    def of(self, path: Path, decoder: DecoderConfig, positions: int | None) -> "Rolling":
        if self.window is not None:
            return self
        if positions is None:
            raise ValueError("nothing says how many positions the model has: give cache.window")
        return dataclasses.replace(self, window=positions)

    def create(self, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> "RollingCache":
        if self.window is None:
            raise ValueError("nothing says how many tokens a rolling cache keeps: give cache.window")
        shape = (config.num_layers, rows, self.window, config.num_kv_heads, config.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), *AXES) for _ in range(2))
        return RollingCache(k, v, jnp.zeros(rows, jnp.int32), self.sinks)

    def cost(self, config: DecoderConfig, cached: int) -> CacheCost:
        return cache_cost(config, min(cached, self.window))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RollingCache(Cache):
    """The keys (not rotated) and the values of Z layers, in S slots: first the sinks, then a ring of the last tokens.

    `read_B` counts the tokens that each row has read. A new token overwrites the oldest one in the ring.
    """

    k_ZBSKH: Array
    v_ZBSKH: Array
    read_B: Array
    sinks: int = dataclasses.field(metadata={"static": True})
    empty = False  # its slots are masked where there is nothing yet

    @property
    def slots(self) -> int:
        return self.k_ZBSKH.shape[2]

    def piece(self, rows: int, length: int, backend: Backend) -> int:
        """Return the most tokens for which every token of a piece still sees the piece's first one."""
        return min(length, PIECE, self.slots - self.sinks)

    def grows_by(self, rows: int) -> bool:
        return len(self.read_B) == rows

    def repeated(self, rows: int) -> "RollingCache":
        if self.grows_by(rows):
            return self
        k, v = (jnp.repeat(x, rows, axis=1) for x in (self.k_ZBSKH, self.v_ZBSKH))
        return RollingCache(k, v, jnp.repeat(self.read_B, rows), self.sinks)

    def reading(self, config: DecoderConfig, real_BT: Array) -> "_Reading":
        """Return the reading. Rows must be padded on the right."""
        T, sinks, recent = real_BT.shape[1], self.sinks, self.slots - self.sinks
        read_B1 = self.read_B[:, None]
        age_BS = (
            1 + (read_B1 - sinks - 1 - jnp.arange(recent)) % recent
        )  # distance of the ring's tokens to the first new
        distance_BTS = jnp.arange(T)[:, None] + age_BS[:, None]
        # If several rows read a cache of one row, attention takes their queries as one row, one text after another.
        near_BTS = jnp.tile(distance_BTS < recent, (1, len(real_BT) // len(read_B1), 1))
        near = Mask(valid_BS=jnp.arange(recent) < read_B1 - sinks, seen_BTS=near_BTS)
        first = Mask(valid_BS=jnp.arange(sinks) < read_B1)
        positions_BT = recent + jnp.arange(T)[None]  # in the cache and the piece: they stay small in a long text
        far_BT = jnp.minimum(read_B1 + jnp.arange(T), self.slots - 1)
        tables = (
            rope_table(config.rope, config.head_dim, at_BT)
            for at_BT in (recent - age_BS, far_BT, jnp.arange(sinks)[None])
        )
        return _Reading(self, positions_BT, near, first, *tables)

    def append(self, kept_Z: tuple[Array, Array], real_BT: Array) -> "RollingCache":
        token_BT = self.read_B[:, None] + jnp.arange(real_BT.shape[1])
        slot_BT = jnp.where(
            token_BT < self.sinks, token_BT, self.sinks + (token_BT - self.sinks) % (self.slots - self.sinks)
        )
        slot_BT = jnp.where(real_BT, slot_BT, self.slots)
        write = on_shards(_written, (AXES, AXES, ("batch", "length")), AXES)
        k_ZBSKH, v_ZBSKH = (write(x, new, slot_BT) for x, new in zip((self.k_ZBSKH, self.v_ZBSKH), kept_Z, strict=True))
        return RollingCache(k_ZBSKH, v_ZBSKH, self.read_B + real_BT.sum(axis=1), self.sinks)

    def emptied(self, rows_B: Array) -> "RollingCache":
        return dataclasses.replace(self, read_B=jnp.where(rows_B, 0, self.read_B))


def _written(x: Array, new: Array, slot_BT: Array) -> Array:
    """Return `x` with `new` in these slots of each row. Slots that do not exist are left out."""
    return x.at[:, jnp.arange(len(slot_BT))[:, None], slot_BT].set(new, mode="drop")


class _Reading(NamedTuple):
    cache: RollingCache
    positions_BT: Array
    near: Mask
    first: Mask
    old_table: tuple[Array, Array]  # of the ring's keys
    far_table: tuple[Array, Array]  # of queries to the sinks
    sinks_table: tuple[Array, Array]

    def attend(self, index: Array, q_BTNH: Array, rotated_BTNH: Array) -> Partial:
        k_BSKH, v_BSKH = at(self.cache.k_ZBSKH, index), at(self.cache.v_ZBSKH, index)
        sinks = self.cache.sinks
        near = attend_partial(rotated_BTNH, rotate(k_BSKH[:, sinks:], self.old_table), v_BSKH[:, sinks:], self.near)
        far_BTNH, first_BSKH = rotate(q_BTNH, self.far_table), rotate(k_BSKH[:, :sinks], self.sinks_table)
        return combine(near, attend_partial(far_BTNH, first_BSKH, v_BSKH[:, :sinks], self.first))

    def keep(self, k_BTKH: Array, rotated_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        return k_BTKH, v_BTKH
