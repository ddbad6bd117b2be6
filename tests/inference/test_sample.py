"""Sampling against its definition in numpy."""

import jax
import numpy as np
import pytest

from cepe_jax.inference.generate import Draws, Sampling, sample

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


draw = jax.jit(sample)


def draws_of(rows: int, *settings, number: int = 0) -> Draws:
    """Each row with a seed of its own, from 0 on."""
    draws = Draws.of([Sampling(*settings)] * rows)
    return draws._replace(seed_B=np.arange(rows, dtype=np.uint32)).at(number)


def drawn(*settings) -> np.ndarray:
    """Shares of each token in many draws."""
    tokens = draw(np.tile(LOGITS, (DRAWS, 1)), draws_of(DRAWS, *settings))
    return np.bincount(tokens, minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        *((1, 0, 1), (0.5, 0, 1), (3, 0, 1), (1, 3, 1), (1, 0, 0.5), (1, 0, 0.8), (2, 5, 0.7), (1, 2, 0.99)),
        *((1, 10**6, 0.3), (1, 2**31 - 1, 1), (1e30, 0, 1)),
    ],
)
def test_distribution(temperature, top_k, top_p):
    """Exactly the tokens of the definition come up, as often as it says."""
    wanted = distribution(LOGITS, temperature, top_k, top_p)
    shares = drawn(temperature, top_k, top_p)
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(wanted > 1e-5))
    assert (np.abs(shares - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-9).all()


def test_the_support_is_exact():
    """Random logits, sharp and flat; a token that is left out never comes, each that stays can."""
    rng = np.random.default_rng(0)
    for top_k, top_p in ((0, 0.6), (4, 1.0), (6, 0.6)):
        logits = rng.normal(size=(6, 12)).astype(np.float32)
        tokens = draw(np.repeat(logits, 2000, axis=0), draws_of(12_000, 1.0, top_k, top_p))
        for row, found in enumerate(np.asarray(tokens).reshape(6, 2000)):
            wanted = distribution(logits[row], 1.0, top_k, top_p)
            assert set(found) <= set(np.flatnonzero(wanted))
            assert set(np.flatnonzero(wanted > 0.01)) <= set(found)


GREEDY = Sampling(), Sampling(0, 5, 0.5, 3), Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-30), Sampling(1e-30)


def test_greedy():
    """Temperature 0 or next to it, top_k 1 and a tiny top_p take the most probable token, whatever else is set."""
    logits = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)
    for sampling in GREEDY:
        np.testing.assert_array_equal(draw(logits, Draws.of([sampling] * 50)), logits.argmax(1))


def test_rows_are_drawn_each_in_its_own_way():
    """A batch of mixed settings is each row alone."""
    rng = np.random.default_rng(2)
    settings = [Sampling(1.0), Sampling(), Sampling(3.0, 2), Sampling(1.0, 0, 0.5), Sampling(0.5, 5, 0.9)]
    samplings = [Sampling(s.temperature, s.top_k, s.top_p, seed) for seed in range(8) for s in settings]
    logits = rng.normal(size=(len(samplings), 12)).astype(np.float32)
    alone = [int(draw(row[None], Draws.of([s]))[0]) for row, s in zip(logits, samplings, strict=True)]
    np.testing.assert_array_equal(draw(logits, Draws.of(samplings)), alone)
    np.testing.assert_array_equal(alone[1::5], logits[1::5].argmax(1))
    assert alone != logits.argmax(1).tolist()


def test_a_draw_is_of_seed_and_number():
    """The key of a draw is that of the row's seed with the token's number folded in."""
    rows, logits = [5, 5, 6, 2**32 - 1], np.tile(LOGITS, (4, 1))
    draws = Draws.of([Sampling(2.0, seed=seed) for seed in rows])
    tokens = [np.asarray(draw(logits, draws.at(number))) for number in range(30)]
    for number, found in enumerate(tokens):
        keys = [jax.random.fold_in(jax.random.key(np.uint32(seed)), number) for seed in rows]
        assert found.tolist() == [int(jax.random.categorical(key, LOGITS / 2)) for key in keys]
    columns = [tuple(column) for column in np.transpose(tokens)]
    assert columns[0] == columns[1]
    assert len(set(columns)) == 3
