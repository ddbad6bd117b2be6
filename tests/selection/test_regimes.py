"""The pursuit's choice against random ones by regime: clusters that are tight, and one that is diffuse.

The table of `cepe_jax/selection/README.md` is printed (`pytest -s`).
"""

import numpy as np
import pytest

from cepe_jax.selection.coreset import PursuitConfig, coreset

SEEDS, DRAWS, FRACTION = 10, 20, 0.05
# examples, dimensions, spread: the length of what an example adds to its cluster's common direction, which has length 1
REGIMES = {
    "tight": (200, 256, 1.0),
    "tight, larger": (1000, 256, 1.0),
    "tight, wider": (1000, 1024, 1.0),
    "diffuse": (2000, 64, 3.0),
}


def cluster(seed: int, count: int, dim: int, spread: float) -> np.ndarray:
    """Return the features of a cluster, each of length 1."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(dim)
    features = common / np.linalg.norm(common) + spread * rng.standard_normal((count, dim)) / np.sqrt(dim)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def residuals(seed: int, count: int, dim: int, spread: float) -> tuple[float, float, float]:
    """Return ||centroid - m|| / ||centroid|| for the mean of the chosen, the median of random means, a weighted sum."""
    features, budget = cluster(seed, count, dim, spread), round(FRACTION * count)
    centroid, rng = features.mean(axis=0), np.random.default_rng(seed + 1000)
    (choice,) = coreset(features, np.zeros(count, int), centroid[None], budget, PursuitConfig())
    draws = [features[rng.permutation(count)[:budget]].mean(axis=0) for _ in range(DRAWS)]
    random = np.median([np.linalg.norm(centroid - mean) for mean in draws]) / np.linalg.norm(centroid)
    return choice.mean_residual, float(random), choice.weighted_residual


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    table = {name: np.array([residuals(seed, *sizes) for seed in range(SEEDS)]) for name, sizes in REGIMES.items()}
    columns = ["cluster", "examples", "width", "spread", "TAGCOS", "random", "wins", "weighted"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, rows in table.items():
        ours, random, weighted = np.median(rows, axis=0)
        wins = (rows[:, 0] < rows[:, 1]).sum()
        sizes = " | ".join(f"{size:,}" for size in REGIMES[name])
        print(f"| {name} | {sizes} | {ours:.3f} | {random:.3f} | {wins} of {SEEDS} | {weighted:.3f} |")
    return table


@pytest.mark.parametrize("name", ["tight", "tight, larger", "tight, wider"])
def test_tight_clusters_win(table, name):
    ours, random, _ = table[name].T
    assert (ours < random).all()
    count, _, spread = REGIMES[name]
    expected = spread * ((1 - FRACTION) / (FRACTION * count)) ** 0.5  # of a mean of draws without replacement
    assert np.median(random) == pytest.approx(expected, rel=0.05)


def test_diffuse_cluster_loses_without_weights_alone(table):
    """The first round takes those that are nearest; later rounds aim at what it has explained already."""
    ours, random, weighted = table["diffuse"].T
    assert (ours > 1.5 * random).all()
    assert (weighted < 0.5 * random).all()
