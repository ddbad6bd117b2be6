"""Sampling against its definition in numpy."""

from functools import partial

import jax
import numpy as np
import pytest

from cepe_jax.inference.generate import Sampling, sample

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.9, -40.0, 1.7, 0.0], np.float32)
DRAWS = 20_000


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """By the book: of the k most probable tokens the fewest that reach top_p, scaled to 1."""
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)[: top_k or len(logits)]
    within = probabilities[order] / probabilities[order].sum()
    order = order[: np.searchsorted(np.cumsum(within), top_p * (1 - 1e-9)) + 1]
    kept = np.zeros_like(probabilities)
    kept[order] = probabilities[order]
    return kept / kept.sum()


def drawn(sampling: Sampling, logits=LOGITS) -> np.ndarray:
    """Shares of each token in many draws."""
    draw = jax.jit(partial(sample, sampling=sampling))
    tokens = draw(np.tile(logits, (DRAWS, 1)), key=jax.random.key(sampling.seed))
    return np.bincount(tokens, minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (3, 0, 1), (1, 3, 1), (1, 0, 0.5), (1, 0, 0.8), (2, 5, 0.7), (1, 100, 0.3), (1, 2, 0.99)],
)
def test_distribution(temperature, top_k, top_p):
    """Exactly the tokens of the definition come up, as often as it says."""
    wanted = distribution(LOGITS, temperature, top_k, top_p)
    shares = drawn(Sampling(temperature, top_k, top_p))
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(wanted > 1e-5))
    assert (np.abs(shares - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-9).all()


def test_the_support_is_exact():
    """Random logits, sharp and flat; a token that is left out never comes, each that stays can."""
    rng = np.random.default_rng(0)
    for top_k, top_p in ((0, 0.6), (4, 1.0), (6, 0.6)):
        logits = rng.normal(size=(6, 12)).astype(np.float32)
        draw = jax.jit(partial(sample, sampling=Sampling(1.0, top_k, top_p)))
        tokens = np.asarray(draw(np.repeat(logits, 2000, axis=0), key=jax.random.key(1))).reshape(6, 2000)
        for row in range(6):
            wanted = distribution(logits[row], 1.0, top_k, top_p)
            assert set(tokens[row]) <= set(np.flatnonzero(wanted))
            assert set(np.flatnonzero(wanted > 0.01)) <= set(tokens[row])


def test_greedy():
    """Temperature 0, top_k 1 and a tiny top_p take the most probable token, whatever else is set."""
    logits = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)
    for sampling in (Sampling(), Sampling(0, 5, 0.5, 3), Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6)):
        np.testing.assert_array_equal(sample(logits, sampling, jax.random.key(2)), logits.argmax(1))


def test_rows_are_drawn_each_for_itself():
    logits = np.tile(LOGITS, (200, 1))
    tokens = np.asarray(sample(logits, Sampling(1.0), jax.random.key(0)))
    assert len(set(tokens)) > 4
    logits[:100] = -LOGITS
    np.testing.assert_array_equal(np.asarray(sample(logits, Sampling(1.0), jax.random.key(0)))[100:], tokens[100:])


def test_keys():
    logits = np.tile(LOGITS, (50, 1))
    draw = jax.jit(partial(sample, sampling=Sampling(1.0)))
    first = draw(logits, key=jax.random.key(5))
    np.testing.assert_array_equal(first, draw(logits, key=jax.random.key(5)))
    assert not np.array_equal(first, draw(logits, key=jax.random.key(6)))
