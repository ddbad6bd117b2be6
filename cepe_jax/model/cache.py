"""The decoder's key/value cache."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cepe_jax.config import DecoderConfig
from cepe_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of every layer in S slots; slots fill from the left, rows may leave holes.

    Heads stand before slots, as the products of a step want them: the other way each step would turn all of it around.
    `k_ZBKSH`, `v_ZBKSH`: Z layers. `valid_BS`: slots that hold a real token. `length`: slots up to the last real token
    of any row. `empty` is static: attention over an empty cache is left out of the compiled program.
    """

    k_ZBKSH: jax.Array
    v_ZBKSH: jax.Array
    valid_BS: jax.Array
    length: jax.Array
    empty: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, config: DecoderConfig, batch: int, slots: int) -> "KVCache":
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        k, v = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)  # two buffers: both are donated
        k, v = (constrain(x, "layer", "batch", "kv_heads", "length", "head_dim") for x in (k, v))
        return cls(k, v, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32), empty=True)

    @property
    def slots(self) -> int:
        return self.k_ZBKSH.shape[3]

    def grows_by(self, rows: int) -> bool:
        """Whether tokens of so many rows are appended: a cache of one row is read by several and stays as it is."""
        return self.k_ZBKSH.shape[1] == rows

    def check_room(self, count: int) -> None:
        """ValueError where it is known that `count` more slots do not fit (outside of a trace, all of it)."""
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + count > self.slots:
            raise ValueError(f"{count} tokens after {used} exceed the cache of {self.slots} slots: create a longer one")

    def append(self, k_ZBTKH: jax.Array, v_ZBTKH: jax.Array, valid_BT: jax.Array) -> "KVCache":
        """The cache with T more slots written after the present ones. The caller sees to it that they fit.

        It goes on after the last of them that is real in any row: padding on the right is written over by what follows.
        """
        write = jax.lax.dynamic_update_slice_in_dim
        end_T = jnp.arange(1, valid_BT.shape[1] + 1)
        return KVCache(
            write(self.k_ZBKSH, k_ZBTKH.swapaxes(2, 3), self.length, 3),
            write(self.v_ZBKSH, v_ZBTKH.swapaxes(2, 3), self.length, 3),
            write(self.valid_BS, valid_BT, self.length, 1),
            self.length + jnp.where(valid_BT.any(axis=0), end_T, 0).max(),
            empty=False,
        )
