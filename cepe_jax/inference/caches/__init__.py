"""Cache policies, one file each, and the setting that selects one."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax

from cepe_jax.config import DecoderConfig, Dtype
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.inference.caches.rolling import RollingCache
from cepe_jax.model.cache import Cache
from cepe_jax.model.llama import Llama


@dataclass(frozen=True)
class CacheConfig:
    """The selection of a policy. `full` keeps every token, `rolling` the first and the last ones (StreamingLLM)."""

    kind: Literal["full", "rolling"] = "full"  # full keeps every token; rolling the first and the last ones
    window: int | None = None  # tokens that a rolling cache keeps; None: as many as the model has positions
    sinks: int = 4  # how many of these are the first tokens of the text

    def __post_init__(self):
        if self.kind not in ("full", "rolling"):
            raise ValueError(f"cache.kind is {self.kind!r}: choose full or rolling")
        if self.kind == "full" and (self.window is not None or self.sinks != CacheConfig.sinks):
            raise ValueError("cache.window and cache.sinks are for cache.kind rolling: leave them out, or choose it")
        if not 0 < self.sinks < (self.sinks + 1 if self.window is None else self.window):
            raise ValueError(
                f"cache.sinks is {self.sinks} and cache.window {self.window}: give 1 sink or more, and a larger window"
            )

    @property
    def bounded(self) -> bool:
        """True if the size does not grow with the text."""
        return self.kind == "rolling"

    def of(self, positions: int | None) -> "CacheConfig":
        """Return the setting for a model with this many positions, the default of `window`."""
        if not self.bounded or self.window is not None:
            return self
        if positions is None:
            raise ValueError("nothing says how many positions the model has: give cache.window")
        return dataclasses.replace(self, window=positions)


FULL = CacheConfig()


def new_cache(decoder: Llama, cache: CacheConfig, rows: int, slots: int) -> Cache:
    """Return an empty cache. `slots` bounds the length of a text if the policy keeps every token."""
    return _new_cache(decoder.config, decoder.compute.dtype, cache, rows, slots)


@partial(jax.jit, static_argnums=range(5))
def _new_cache(config: DecoderConfig, dtype: Dtype, cache: CacheConfig, rows: int, slots: int) -> Cache:
    if cache.kind == "rolling":
        return RollingCache.create(config, dtype, rows, cache.window, cache.sinks)
    return FullCache.create(config, dtype, rows, slots)
