"""A model as parts with names: the units that train or are frozen, and under whose names tensors are stored."""

from typing import Any, Protocol, Self

import jax
from flax import nnx

from cepe_jax.sharding import is_variable

Parts = dict[str, nnx.Module]


class Model(Protocol):
    """A model that stages train and directories hold: a decoder, an encoder, a CEPE, or one with a head of its own."""

    @property
    def config(self) -> Any:
        """The config from which `weights/kinds.py` makes such a model."""
        ...

    @property
    def parts(self) -> Parts:
        """The parts by name. Together they hold every weight, each one once."""
        ...

    @classmethod
    def from_parts(cls, parts: Parts) -> Self:
        """Return the model of these parts, over the same arrays, whatever is frozen in them."""
        ...


class Frozen(nnx.Variable):
    """A weight that does not train. It is no nnx.Param, so a selection of these leaves it out."""


def held_as(kind: type[nnx.Variable], module):
    """Return the module with every Variable of this kind, over the same arrays."""

    def held(leaf: nnx.Variable) -> nnx.Variable:
        return leaf if type(leaf) is kind else kind.from_metadata(leaf.get_raw_value(), leaf.get_metadata())

    return jax.tree.map(held, module, is_leaf=is_variable)


def split(model: Model, train: tuple[str, ...]) -> tuple[Parts, Parts]:
    """Return (trainable, frozen): every leaf is in exactly one of them, as an nnx.Param or as `Frozen`.

    `jax.grad` over the first is the whole gradient mask.
    """
    parts = model.parts
    if unknown := set(train) - set(parts):
        raise ValueError(f"cannot train {', '.join(sorted(unknown))}: this model has {', '.join(parts)}")
    trainable = {name: held_as(nnx.Param, part) for name, part in parts.items() if name in train}
    return trainable, {name: held_as(Frozen, part) for name, part in parts.items() if name not in train}
