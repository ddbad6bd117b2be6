"""The interface of a decoder's cache. `cepe_jax.inference.caches` holds the policies."""

from typing import Protocol, Self

import jax

from cepe_jax.config import Backend, DecoderConfig
from cepe_jax.model.attention import Partial

Array = jax.Array


class Reading(Protocol):
    """A cache together with the new tokens of one call. Values that all layers share are computed when it is made.

    `positions_BT`, (B or 1, T), are the positions of the new tokens; their queries and keys are rotated by these.
    """

    positions_BT: Array

    def attend(self, index: Array, q_BTNH: Array, rotated_BTNH: Array) -> Partial:
        """Return the attention of the new queries to the cached keys of layer `index`.

        `q_BTNH` is not rotated, so that a policy can choose other angles. `rotated_BTNH` is rotated by `positions_BT`.
        """

    def keep(self, k_BTKH: Array, rotated_BTKH: Array, v_BTKH: Array):
        """Return the part of a layer's new keys (as projected, and rotated) and values that the cache stores.

        The decoder stacks these trees over the layers and passes them to `Cache.append`.
        """


class Cache(Protocol):
    """A pytree that programs take and return. Its rows are independent of each other.

    `empty` is static. While it is true, programs leave out the attention to the cache.
    """

    empty: bool

    def by_token(self) -> Self:
        """Return the same cache, which reads one token at a time if the tokens of a piece affect one another."""
        return self

    def piece(self, rows: int, length: int, backend: Backend) -> int:
        """Return how many of `length` new tokens one pass reads. The decoder scans over such pieces.

        `backend` computes the attention of the new tokens to each other.
        """

    def grows_by(self, rows: int) -> bool:
        """Return whether tokens of `rows` rows are appended. Several rows may read a cache of one row, unchanged."""

    def repeated(self, rows: int) -> Self:
        """Return a cache of `rows` rows, never `empty`, for a scan over pieces. A cache of one row is copied."""

    def reading(self, config: DecoderConfig, real_BT: Array) -> Reading:
        """Return the cache's reading of new tokens. Those marked in `real_BT` are real, the others are padding."""

    def append(self, kept_Z, real_BT: Array) -> Self:
        """Return the cache with the new tokens. `kept_Z` holds the layers' `Reading.keep`, stacked."""

    def emptied(self, rows_B: Array) -> Self:
        """Return the cache without the texts of the rows marked in `rows_B`. New texts may begin there."""


class GrowingCache(Cache, Protocol):
    """A cache of a policy for texts of any length, of which every token stays."""

    def longer(self, slots: int) -> Self:
        """Return the cache with room for texts of `slots` tokens."""
