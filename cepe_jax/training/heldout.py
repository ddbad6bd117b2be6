"""The loss over held-out sequences while training: the same batches, with the same masks, at every time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp

from cepe_jax.model.parts import Model, Parts
from cepe_jax.training.objectives import Batch, Objective
from cepe_jax.training.trainer import sum_over_rows


@dataclass(frozen=True)
class EvalConfig:
    data: Path | None = None  # a dataset of sequences that training does not read; None: no evaluation
    split: str = "test"  # split of the dataset
    every: int = 500  # steps between evaluations; one more is after the last step
    batches: int = 8  # batches of batch_size sequences

    def __post_init__(self):
        if self.batches < 1:
            raise ValueError(f"evaluation.batches is {self.batches}: give a number above 0")


class HeldOut:
    """`held_out(trainable)`: the loss and its terms over all batches, the mean over what each term is a mean of.

    A batch is taken in `accumulate` micro-batches, as in training.
    """

    def __init__(
        self,
        objective: Objective,
        model: type[Model],
        frozen: Parts,
        batches: Sequence[Batch],
        accumulate: int = 1,
    ):
        @jax.jit
        def terms_of(trainable: Parts, frozen: Parts, batch: Batch, weights):
            def terms(rows):
                loss, terms = objective(model.from_parts(trainable | frozen), rows, weights)
                return terms | {"loss": loss}

            return sum_over_rows(terms, batch, accumulate)

        weigh, add = jax.jit(objective.weights), jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self._weights = reduce(add, map(weigh, batches))
        self._terms_of, self._frozen, self._batches = terms_of, frozen, batches

    def __call__(self, trainable: Parts) -> dict[str, float]:
        shares = [self._terms_of(trainable, self._frozen, batch, self._weights) for batch in self._batches]
        shares = jax.device_get(shares)
        return {name: float(sum(share[name] for share in shares)) for name in shares[0]}
