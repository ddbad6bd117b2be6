"""The projection against a matrix of signs that is written out, and its moments."""

import jax
import numpy as np
import pytest

from cepe_jax.selection import projection
from cepe_jax.selection.projection import BLOCK, project, signs


def matrix(seed: int, parameters: int, dim: int) -> np.ndarray:
    blocks = -(-parameters // BLOCK)
    return np.concatenate([np.asarray(signs(seed, n, dim), np.float64) for n in range(blocks)])[:parameters]


@pytest.mark.parametrize("parameters", [3, BLOCK, 2 * BLOCK + 5])
def test_blocks_are_one_matrix(parameters):
    vectors = np.random.default_rng(0).standard_normal((4, parameters)).astype(np.float32)
    wanted = vectors.astype(np.float64) @ matrix(7, parameters, 40) / np.sqrt(40)
    ours = jax.jit(project, static_argnums=(1, 2))(vectors, 40, 7)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_signs_are_fair_and_independent():
    """Products of two columns, two rows and two blocks are coins too: their means are within five deviations of 0."""
    one, other = (np.asarray(signs(3, block, 96), np.float64) for block in (0, 1))
    assert set(np.unique(one)) == {-1.0, 1.0}
    for coins in (one, one[:, 1:] * one[:, :-1], one[:, 32:] * one[:, :-32], one[1:] * one[:-1], one * other):
        assert abs(coins.mean()) < 5 * coins.size**-0.5


def test_lengths_and_angles_are_kept():
    """Over 200 seeds: the mean squared length and product are the vectors' own, and the spread is that of theory."""
    rng, dim = np.random.default_rng(1), 64
    x, y = rng.standard_normal((2, 300))
    of_seed = jax.jit(project, static_argnums=1)
    images = np.stack([of_seed(np.stack([x, y]), dim, seed) for seed in range(200)]).astype(np.float64)
    products = (images[:, 0] * images[:, 1]).sum(axis=1)
    squares = (images[:, 0] ** 2).sum(axis=1)
    # Variances of Rademacher projections: (|x|^2 |y|^2 + (x.y)^2 - 2 sum x_i^2 y_i^2) / dim, and that with y = x.
    spread = np.sqrt(((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / dim)
    assert abs(products.mean() - x @ y) < 4 * spread / np.sqrt(200)
    assert products.std() == pytest.approx(spread, rel=0.2)
    assert squares.mean() == pytest.approx(x @ x, rel=4 * np.sqrt(2 / dim / 200))


def test_seed_decides_and_no_dense_matrix_is_made():
    vectors = np.ones((2, 3 * BLOCK), np.float32)
    first, again, other = (np.asarray(project(vectors, 16, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    compiled = jax.jit(project, static_argnums=(1, 2)).lower(np.ones((2, 64 * BLOCK), np.float32), 512, 0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * BLOCK * 512 * 4 / 8


def test_cost_is_two_operations_a_sign():
    assert projection.projection_flops(1000, 512) == 2 * 1000 * 512
