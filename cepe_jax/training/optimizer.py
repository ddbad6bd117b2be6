"""The optimiser of a run: AdamW, with which the paper trained, or Muon."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

Kind = Literal["adamw", "muon"]
ADAMW_RMS = 0.2  # of AdamW's updates per learning rate, which Muon's are scaled to (Liu et al. 2025, section 2.2)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser with a linear warm-up from 0 and a cosine back to 0, as the reference's trainer runs it.

    `muon` (Jordan et al. 2024) makes the updates of the layers' matrices orthogonal, scaled so that AdamW's learning
    rate fits. AdamW with Nesterov momentum updates the rest: embeddings, norms, heads and
    low-rank factors.
    """

    kind: Kind = "adamw"  # muon: for the layers' matrices, and AdamW for the rest
    learning_rate: float = 3e-4  # the highest, at the end of warm-up
    warmup_fraction: float = 0.04  # share of the steps in which the learning rate rises; then it falls to 0 as a cosine
    weight_decay: float = 0.0  # decoupled, per learning rate
    clip_norm: float = 1.0  # largest norm of the whole gradient, to which it is scaled down
    beta1: float = 0.9  # decay of the mean gradient in AdamW
    beta2: float = 0.999  # decay of the mean squared gradient in AdamW
    eps: float = 1e-8  # added to the denominator of an update

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"optimizer.kind is {self.kind!r}: choose {' or '.join(get_args(Kind))}")
        for name in ("learning_rate", "clip_norm", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: give a number above 0")
        for name in ("warmup_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: give 0 or more, and less than 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}: give 0 or more")

    def schedule(self, steps: int) -> optax.Schedule:
        warmup = int(self.warmup_fraction * steps)
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        adamw = optax.adamw(schedule, self.beta1, self.beta2, self.eps, weight_decay=self.weight_decay)
        if self.kind == "adamw":
            return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)
        muon = optax.contrib.muon(
            schedule,
            eps=self.eps,
            weight_decay=self.weight_decay,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            adam_weight_decay=self.weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=ADAMW_RMS,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), muon)


def matrices(params):
    """Return a tree like `params` that says which axes of a stack of matrices are inputs and outputs; None elsewhere.

    The heads of an attention are one axis of its matrix.
    """

    def dimensions(leaf: nnx.Variable) -> MuonDimensionNumbers | None:
        stack, *axes = leaf.get_metadata()["axes"]
        if stack != "layer" or len(axes) < 2 or "embed" not in axes or None in axes:  # biases of heads; factors
            return None
        first_output = 2 if axes[0] == "embed" else len(axes)
        return MuonDimensionNumbers(tuple(range(1, first_output)), tuple(range(first_output, len(axes) + 1)))

    return jax.tree.map(dimensions, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
