"""The full cache, which keeps the keys and values of every token."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cepe_jax.config import Backend, DecoderConfig, Dtype
from cepe_jax.cost import CacheCost, cache_cost
from cepe_jax.model.attention import Mask, Partial, attend_to_cache
from cepe_jax.model.cache import Cache
from cepe_jax.model.layers import at
from cepe_jax.sharding import constrain, on_shards, rows_of_a_device

Array = jax.Array
PIECE_PAIRS = 1 << 22  # of a query and a key whose scores in a head exist at once, where no kernel does without them
LEAST_PIECE = 128  # tokens
AXES = "layer", "batch", "kv_heads", "length", "head_dim"


@dataclass(frozen=True)
class Full:
    """The policy that keeps every token."""

    pools = False
    any_length = False
    window = None

    def of(self, path: Path, decoder: DecoderConfig, positions: int | None) -> "Full":
        return self

    def create(self, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> "FullCache":
        return FullCache.create(config, dtype, rows, slots)

    def cost(self, config: DecoderConfig, cached: int) -> CacheCost:
        return cache_cost(config, cached)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullCache(Cache):
    """The rotated keys and the values of Z layers, in S slots. Each row fills its slots from the left.

    `valid_BS` marks slots that hold a real token; padding between real tokens leaves holes. `length_B` counts the slots
    up to a row's last real token. Heads come before slots: in the other order, every step would transpose the cache.
    """

    k_ZBKSH: Array
    v_ZBKSH: Array
    valid_BS: Array
    length_B: Array
    empty: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, config: DecoderConfig, dtype: str, rows: int, slots: int) -> "FullCache":
        shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)  # two buffers: both are donated
        k, v = (constrain(x, *AXES) for x in (k, v))
        return cls(k, v, jnp.zeros((rows, slots), bool), jnp.zeros(rows, jnp.int32), empty=True)

    @property
    def slots(self) -> int:
        return self.k_ZBKSH.shape[3]

    def piece(self, rows: int, length: int, backend: Backend) -> int:
        """Return a divisor of `length`, because padding would take slots.

        A kernel stores no scores and reads all tokens at once. Kernels cannot read a cache; once it holds tokens, XLA
        computes the scores, of at most PIECE_PAIRS pairs at once.
        """
        rows, keys = rows_of_a_device(rows), length if self.empty else self.slots
        if (backend != "xla" and self.empty) or rows * length * keys <= PIECE_PAIRS:
            return length
        most = 1 << (PIECE_PAIRS // (rows * self.slots)).bit_length() >> 1  # a power of two
        return math.gcd(length, max(most, LEAST_PIECE))

    def grows_by(self, rows: int) -> bool:
        return len(self.length_B) == rows

    def repeated(self, rows: int) -> "FullCache":
        if self.grows_by(rows):
            return dataclasses.replace(self, empty=False)
        k, v = (jnp.repeat(x, rows, axis=1) for x in (self.k_ZBKSH, self.v_ZBKSH))
        return FullCache(k, v, jnp.repeat(self.valid_BS, rows, 0), jnp.repeat(self.length_B, rows), empty=False)

    def reading(self, config: DecoderConfig, real_BT: Array) -> "_Reading":
        """Return the reading. Raise ValueError if the tokens do not fit, as far as a trace can know."""
        rows, count = real_BT.shape
        if self.grows_by(rows):
            used = 0 if isinstance(self.length_B, jax.core.Tracer) else int(max(self.length_B))
            if used + count > self.slots:
                raise ValueError(
                    f"{count} tokens after {used} exceed the cache of {self.slots} slots: create a longer one"
                )
        positions_BT = jnp.cumsum(real_BT, axis=1) - 1 + self.valid_BS.sum(axis=1, keepdims=True)
        return _Reading(self, jnp.where(real_BT, positions_BT, 0))

    def append(self, kept_Z: tuple[Array, Array], real_BT: Array) -> "FullCache":
        """Return the cache with the tokens in the slots after each row's last real token.

        The caller ensures that they fit. Later tokens overwrite padding on the right.
        """
        k_ZBKTH, v_ZBKTH = (x_ZBTKH.swapaxes(2, 3) for x_ZBTKH in kept_Z)
        end_T = jnp.arange(1, real_BT.shape[1] + 1)
        return FullCache(
            written(self.k_ZBKSH, k_ZBKTH, self.length_B, AXES),
            written(self.v_ZBKSH, v_ZBKTH, self.length_B, AXES),
            written(self.valid_BS, real_BT, self.length_B, ("batch", "length")),
            self.length_B + jnp.where(real_BT, end_T, 0).max(axis=1),
            empty=False,
        )

    def emptied(self, rows_B: Array) -> "FullCache":
        valid_BS, length_B = self.valid_BS & ~rows_B[:, None], jnp.where(rows_B, 0, self.length_B)
        return dataclasses.replace(self, valid_BS=valid_BS, length_B=length_B)


class _Reading(NamedTuple):
    cache: FullCache
    positions_BT: Array

    def attend(self, index: Array, q_BTNH: Array, rotated_BTNH: Array) -> Partial:
        k_BKSH, v_BKSH = at(self.cache.k_ZBKSH, index), at(self.cache.v_ZBKSH, index)
        return attend_to_cache(rotated_BTNH, k_BKSH, v_BKSH, Mask(valid_BS=self.cache.valid_BS))

    def keep(self, k_BTKH: Array, rotated_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        return rotated_BTKH, v_BTKH


def written(x: Array, new: Array, start_B: Array, axes: tuple[str, ...]) -> Array:
    """Return `x` with `new` written to each row, starting at the row's own slot.

    Rows are written one after another. A single scatter would first transpose all of `x`.
    """
    row_axis, slot_axis = axes.index("batch"), axes.index("length")

    def write(x: Array, new: Array, start_B: Array) -> Array:
        def write_row(row: Array | int, x: Array) -> Array:
            starts = [jnp.zeros_like(start_B[0])] * x.ndim
            starts[row_axis], starts[slot_axis] = jnp.astype(row, start_B.dtype), start_B[row]
            return jax.lax.dynamic_update_slice(x, jax.lax.dynamic_slice_in_dim(new, row, 1, row_axis), starts)

        return write_row(0, x) if len(start_B) == 1 else jax.lax.fori_loop(0, len(start_B), write_row, x)

    return on_shards(write, (axes, axes, ("batch",)), axes)(x, new, start_B)
