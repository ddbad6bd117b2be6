"""What a decoder keeps of the tokens it has read. A policy is a `Cache`; `cepe_jax.inference.caches` has them."""

from typing import Protocol, Self

import jax

from cepe_jax.config import DecoderConfig
from cepe_jax.model.attention import Partial

Array = jax.Array


class Reading(Protocol):
    """A cache beside the new tokens of one call, ready for the layers' queries; what the layers share is made once.

    `positions_BT`: where the new tokens stand to each other, (B or 1, T): their queries and keys are turned by it.
    """

    positions_BT: Array

    def attend(self, index: Array, q_BTNH: Array, turned_BTNH: Array) -> Partial:
        """The attention of the new queries to what the cache keeps of layer `index`.

        `q_BTNH` is not turned, so that a policy may choose other angles; `turned_BTNH` is, by `positions_BT`.
        """

    def keep(self, k_BTKH: Array, turned_BTKH: Array, v_BTKH: Array):
        """What of a layer's new keys, as they are and turned, and values `Cache.append` gets, with layers in front."""


class Cache(Protocol):
    """A pytree, so that it is an argument and a result of programs. Rows do not know of each other.

    `empty` is static: nothing is kept yet, and attention to it is left out of the program.
    """

    @property
    def empty(self) -> bool: ...

    def piece(self, config: DecoderConfig, rows: int, length: int) -> int:
        """How many of `length` new tokens of so many rows are read at once. Those that do not divide are filled up."""

    def grows_by(self, rows: int) -> bool:
        """Whether tokens of so many rows are appended: a cache of one row is read by several and stays as it is."""

    def repeated(self, rows: int) -> Self:
        """A cache to be read in pieces: one of one row `rows` times, which is not `empty` for a program."""

    def reading(self, config: DecoderConfig, real_BT: Array) -> Reading:
        """Beside new tokens, of which those in `real_BT` are real."""

    def append(self, kept_Z, real_BT: Array) -> Self:
        """The cache with these tokens. What `Reading.keep` gave is stacked over layers."""

    def emptied(self, rows_B: Array) -> Self:
        """The cache, new in the rows of this boolean mask: other texts begin there while the others go on."""
