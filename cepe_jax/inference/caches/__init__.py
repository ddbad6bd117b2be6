"""Cache policies, one file each, and the settings that select one."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

import jax

from cepe_jax.config import DecoderConfig, Dtype
from cepe_jax.cost import CacheCost
from cepe_jax.inference.caches.full import Full
from cepe_jax.inference.caches.razor import Razor
from cepe_jax.inference.caches.reattention import ReAttention
from cepe_jax.inference.caches.rolling import Rolling
from cepe_jax.model.cache import Cache
from cepe_jax.model.llama import Llama
from cepe_jax.parsing import shortened


class Policy(Protocol):
    """A rule for which tokens a cache keeps and a query reads. It is hashable: programs are compiled for it."""

    any_length: ClassVar[bool]  # True: texts may have more tokens than the model has positions
    # True: tokens that are read together choose together what they read, later ones for earlier ones too. A token whose
    # prediction counts must then be read by itself.
    pools: ClassVar[bool]

    @property
    def window(self) -> int | None:
        """The number of tokens that stay, the oldest of them leaving; None if every token stays."""

    def of(self, path: Path, decoder: DecoderConfig, positions: int | None) -> Self:
        """Return the policy for the model at `path`; ValueError if it does not suit the model.

        `positions`: how many the model has, None if nothing says it.
        """

    def create(self, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> Cache:
        """Return an empty cache; ValueError if the present mesh cannot hold it.

        `slots` bounds the length of a text if every token stays.
        """

    def cost(self, config: DecoderConfig, cached: int) -> CacheCost:
        """Return the cost of one token that reads the cache of `cached` tokens."""


POLICIES: dict[str, type[Policy]] = {"full": Full, "rolling": Rolling, "reattention": ReAttention, "razor": Razor}


@dataclass(frozen=True)
class CacheConfig:
    """The selection of a policy by settings. Those that are None get the policy's default, if it has such a setting."""

    kind: Literal["full", "rolling", "reattention", "razor"] = "full"  # what is kept and read: see the README of caches
    window: int | None = None  # tokens that a rolling cache keeps; None: as many as the model has positions
    sinks: int | None = None  # first tokens of the text, which are always read; None: 4, of reattention 32
    recent: int | None = None  # last tokens that are read; None: reattention's 4,096, of razor at least 4,000
    top_k: int | None = None  # tokens that each head of a query selects (reattention); None: 4
    selected: int | None = None  # of these, how many are read, those that most heads select (reattention); None: 127
    span: int | None = None  # tokens around each of these that are read with it (reattention); None: 32
    piece: int | None = None  # tokens of a prompt that select together (reattention); None: 512
    compression: int | None = None  # the other heads keep this part of the text, 1 / compression (razor); None: 5
    induction: float | None = None  # share of heads that keep all tokens for their induction score (razor); None: 0.14
    echo: float | None = None  # share of heads that keep all tokens for their echo score (razor); None: 0.01

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in POLICIES:
            *others, last = POLICIES
            raise ValueError(f"cache.kind is {shortened(self.kind)}: choose {', '.join(others)} or {last}")
        if self.kind == "full" and self.sinks == Rolling.sinks:  # as earlier versions stored it
            object.__setattr__(self, "sinks", None)
        for name, value in vars(self.policy).items():
            if name in vars(self):
                object.__setattr__(self, name, value)

    @property
    def policy(self) -> Policy:
        """The policy, which is not yet that of a model."""
        settings = {name: value for name, value in vars(self).items() if name != "kind" and value is not None}
        for name in settings:
            kinds = [kind for kind, policy in POLICIES.items() if name in policy.__dataclass_fields__]
            if self.kind not in kinds:
                raise ValueError(
                    f"cache.{name} is for cache.kind {', '.join(kinds)}: leave it out, or choose that kind"
                )
        return POLICIES[self.kind](**settings)


FULL = Full()


def new_cache(decoder: Llama, policy: Policy, rows: int, slots: int) -> Cache:
    """Return an empty cache. `slots` bounds the length of a text if every token stays."""
    return _new_cache(policy, decoder.config, decoder.compute.dtype, rows, slots)


@partial(jax.jit, static_argnums=range(5))
def _new_cache(policy: Policy, config: DecoderConfig, dtype: Dtype, rows: int, slots: int) -> Cache:
    return policy.create(config, dtype, rows, slots)
