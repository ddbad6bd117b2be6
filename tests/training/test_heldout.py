"""The loss over held-out sequences: the mean over all their labels, whatever the batches, and nothing else changes."""

import jax
import numpy as np
import pytest

from cepe_jax.data.examples import IGNORE
from cepe_jax.model.parts import split
from cepe_jax.training.heldout import EvalConfig, HeldOut
from cepe_jax.training.objectives import Distill, DistillConfig, NextToken


def batch_of(number: int) -> dict[str, np.ndarray]:
    """4 rows, with other numbers of kept labels in each batch and row."""
    rng = np.random.default_rng(number)
    kept = rng.random((4, 8)) < [[0.1], [0.9], [0.5], [0.3 * number]]
    labels = np.where(kept, rng.integers(0, 64, (4, 8)), IGNORE)
    context = rng.integers(0, 64, (4, 2, 5))
    mask = rng.random((4, 2, 5)) < 0.8
    teacher = {"teacher_prob": rng.dirichlet(np.ones(4), (4, 3)), "teacher_index": rng.integers(0, 64, (4, 3, 3))}
    return {"tokens": rng.integers(0, 64, (4, 8)), "labels": labels, "context": context, "context_mask": mask} | teacher


@pytest.mark.parametrize("objective", [NextToken(), Distill(DistillConfig(top_k=3))])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_is_over_the_whole(cepe, objective, accumulate):
    """Not the mean of the batches' means: those are another number."""
    batches = [batch_of(number) for number in range(3)]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    evaluate = jax.jit(lambda model, batch: objective(model, batch, objective.weights(batch)))
    trainable, frozen = split(cepe, ("encoder", "cross"))
    loss, terms = evaluate(cepe, whole)
    found = HeldOut(objective, type(cepe), frozen, batches, accumulate)(trainable)
    assert found == pytest.approx({"loss": float(loss)} | {name: float(x) for name, x in terms.items()}, rel=1e-5)
    means = np.mean([evaluate(type(cepe).from_parts(trainable | frozen), batch)[1]["nll"] for batch in batches])
    assert abs(means - found["nll"]) > 1e-2


def test_bad_settings():
    with pytest.raises(ValueError, match="evaluation.batches is 0"):
        EvalConfig(batches=0)
