"""Clusters and matching pursuit against scikit-learn, scipy and the statement of the method in plain steps."""

import builtins

import numpy as np
import pytest
from scipy.optimize import nnls
from support.refusals import one_line

from cepe_jax.selection.coreset import (
    PursuitConfig,
    chosen_atoms,
    clusters_of,
    coreset,
    matching_pursuit,
    repeats_of,
    weights_for,
)

PLAIN = PursuitConfig(ridge=0.0, positive=False, tolerance=0.0)
PAPER = PursuitConfig()


def atoms_and_target(seed: int, count: int = 40, dim: int = 12, centre: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((count, dim)) + centre
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return atoms, atoms.mean(axis=0)


@pytest.mark.parametrize("seed", range(5))
def test_plain_pursuit_is_scikit_learns(seed):
    linear_model = pytest.importorskip("sklearn.linear_model")
    atoms, target = atoms_and_target(seed)
    for most in (1, 4, 9):
        chosen, weights = matching_pursuit(atoms, target, most, PLAIN)
        theirs = linear_model.OrthogonalMatchingPursuit(n_nonzero_coefs=most, fit_intercept=False)
        coefficients = theirs.fit(atoms.T, target).coef_
        assert sorted(chosen) == np.flatnonzero(coefficients).tolist()
        np.testing.assert_allclose(weights, coefficients[chosen], rtol=1e-9)


def stated(atoms: np.ndarray, target: np.ndarray, most: int, ridge: float) -> tuple[list[int], np.ndarray, int]:
    """The method in plain steps, every fit a least-squares problem with the ridge as rows; and how many atoms left."""
    chosen, weights, left = [], np.zeros(0), 0

    def fit(rows, ridge):
        matrix = np.vstack([atoms[rows].T, np.sqrt(ridge) * np.eye(len(rows))])
        return np.linalg.lstsq(matrix, np.append(target, np.zeros(len(rows))), rcond=None)[0]

    for _ in range(most):
        residual = target - sum((w * atoms[n] for w, n in zip(weights, chosen, strict=True)), np.zeros_like(target))
        if np.sqrt(residual @ residual) < 1e-4 * np.sqrt(target @ target):
            break
        gains = [atom @ residual for atom in atoms]
        best = gains.index(max(gains))
        if best in chosen:
            break
        chosen = [*chosen, best]
        weights = fit(chosen, ridge if len(chosen) > 1 else 0.0)
        while len(chosen) and min(weights) < 0:
            worst = list(weights).index(min(weights))
            chosen, left = chosen[:worst] + chosen[worst + 1 :], left + 1
            weights = fit(chosen, ridge) if chosen else np.zeros(0)
    return chosen, weights, left


@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_papers_pursuit_is_the_statement(ridge):
    """Among the cases are pursuits that end early, and such in which atoms with negative weights leave."""
    early = left = 0
    for seed in range(30):
        atoms, target = atoms_and_target(seed, count=60, dim=10, centre=seed % 3 * 0.2)
        chosen, weights = matching_pursuit(atoms, target, 12, PursuitConfig(ridge=ridge))
        wanted, wanted_weights, wanted_left = stated(atoms, target, 12, ridge)
        assert chosen == wanted
        np.testing.assert_allclose(weights, wanted_weights, rtol=1e-8, atol=1e-12)
        assert (weights >= 0).all()
        early, left = early + (len(chosen) < 12), left + wanted_left
    assert early
    assert left or ridge == 1.0


def test_first_atom_has_no_ridge_and_later_ones_have():
    atoms, target = np.eye(3), np.array([3.0, 2.0, 1.0])
    assert matching_pursuit(atoms, target, 1, PAPER)[1].tolist() == [3.0]
    chosen, weights = matching_pursuit(atoms, target, 2, PAPER)
    assert chosen == [0, 1]
    assert weights.tolist() == pytest.approx([1.5, 1.0])  # the target's 3 and 2, halved by a ridge of 1


def test_residual_falls_and_scipy_bounds_it():
    atoms, target = atoms_and_target(3)
    bound = nnls(atoms.T, target)[1]
    lengths = []
    for most in range(1, 12):
        chosen, weights = matching_pursuit(atoms, target, most, PursuitConfig(ridge=0.0, tolerance=0.0))
        lengths.append(np.linalg.norm(target - weights @ atoms[chosen]))
    assert all(later <= earlier + 1e-12 for earlier, later in zip(lengths, lengths[1:], strict=False))
    assert bound <= lengths[-1] < lengths[0]


def test_weights_minimise_the_ridge_problem():
    """At the minimum the gradient is 0 where a weight is above 0, and not negative elsewhere (KKT)."""
    atoms, target = atoms_and_target(4)
    weights = weights_for(atoms, target, 0.1)
    gradient = 0.1 * weights - atoms @ (target - weights @ atoms)
    assert 0 < (weights > 0).sum() < len(weights)
    assert np.abs(gradient[weights > 0]).max() < 1e-10
    assert gradient.min() > -1e-10


@pytest.mark.parametrize("target", [np.zeros(3), np.array([-1.0, -1.0, -1.0])])
def test_hopeless_targets_choose_nothing_and_budgets_fill(target):
    """A centroid of zero, and one that no atom points to: the largest products fill the budget, the first of equals."""
    atoms = np.array([[1.0, 0, 0], [0, 2.0, 0], [0.5, 0, 0], [0, 0, 0]])
    assert matching_pursuit(atoms, target, 2, PAPER)[0] == []
    rows, fills = chosen_atoms(atoms, target, 2, PAPER)
    assert fills == 2
    assert rows.tolist() == ([0, 1] if not target.any() else [2, 3])


def test_copies_are_chosen_in_later_rounds():
    """A pursuit takes one of four copies, of which the next explains no more; rounds take the others."""
    atoms = np.array([[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [0, -1.0]])
    rows, fills = chosen_atoms(atoms, np.array([1.0, 0]), 4, PAPER)
    assert rows.tolist() == [0, 1, 2, 3]
    assert fills == 0
    rows, fills = chosen_atoms(atoms, np.array([1.0, 0]), 5, PAPER)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert fills == 1


def test_clusters_are_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    features = np.random.default_rng(0).standard_normal((200, 5)) + np.repeat(np.eye(5) * 6, 40, axis=0)
    labels, centroids = clusters_of(features, 5, 3, 2)
    theirs = cluster.KMeans(5, init=features[::40], n_init=1).fit(features)
    inertia = ((features - centroids[labels]) ** 2).sum()
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(centroids, [features[labels == n].mean(axis=0) for n in range(5)], atol=1e-8)
    again = clusters_of(features, 5, 3, 2)
    np.testing.assert_array_equal(again[0], labels)
    np.testing.assert_array_equal(again[1], centroids)


def test_budgets_are_met_exactly_by_size():
    """Clusters of 150, 45 and 5 examples and a budget of 10 (5%): 7.5, 2.25 and 0.25, so 8, 2 and 0."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [150, 45, 5])
    features = rng.standard_normal((200, 6)) + 4 * np.eye(6)[labels]
    centroids = np.stack([features[labels == n].mean(axis=0) for n in range(3)])
    choices = coreset(features, labels, centroids, 10, PAPER)
    assert [len(choice.rows) for choice in choices] == [8, 2, 0]
    assert [choice.cluster_size for choice in choices] == [150, 45, 5]
    for n, choice in enumerate(choices):
        assert (labels[choice.rows] == n).all()
        assert len(set(choice.rows)) == len(choice.rows)
    everything = coreset(features, labels, centroids, 200, PAPER)
    assert np.concatenate([choice.rows for choice in everything]).tolist() == list(range(200))
    with pytest.raises(ValueError, match="201.*200") as refusal:
        coreset(features, labels, centroids, 201, PAPER)
    one_line(refusal)


def test_residuals_are_of_the_weighted_sum_and_the_mean():
    """Centroid (1, 1) of a cluster of two, one chosen: weight 1 leaves a residual of 1 in length, of sqrt(2)."""
    features = np.array([[2.0, 0.0], [0.0, 2.0]])
    (choice,) = coreset(features, np.zeros(2, int), np.ones((1, 2)), 1, PursuitConfig(ridge=0.0))
    assert choice.rows.tolist() == [0]
    assert choice.weights.tolist() == pytest.approx([1.0])  # 2 members x a weight of 1/2
    assert choice.weighted_residual == pytest.approx(0.5**0.5)
    assert choice.mean_residual == pytest.approx(1.0)


def test_repeats_are_in_proportion_and_exact():
    assert repeats_of(np.array([1.0, 0.0, 2.5, 0.5]), 8).tolist() == [2, 0, 5, 1]
    repeats = repeats_of(np.random.default_rng(0).random(97), 1000)
    assert repeats.sum() == 1000
    with pytest.raises(ValueError, match="0") as refusal:
        repeats_of(np.zeros(3), 8)
    one_line(refusal)


def test_empty_clusters_are_refused():
    pytest.importorskip("sklearn")
    features = np.repeat(np.eye(3), 4, axis=0)
    for count, words in ((13, "13.*12"), (5, "5.*2 of them")):
        with pytest.raises(ValueError, match=words) as refusal:
            clusters_of(features, count, 0, 1)
        one_line(refusal)


def test_absent_scikit_learn_names_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"\[selection\]") as refusal:
        clusters_of(np.eye(3), 2, 0, 1)
    one_line(refusal)


@pytest.mark.parametrize("positive", [True, False])
def test_dependent_atoms_want_a_ridge(positive):
    """More atoms than they have numbers, and no tolerance at which a pursuit would end before."""

    def refusal(seed: int) -> str:
        rng = np.random.default_rng(seed)
        try:
            matching_pursuit(rng.normal(size=(30, 4)), rng.normal(size=4), 30, PursuitConfig(0.0, 0.0, positive))
        except ValueError as error:
            return str(error)
        return ""

    refusals = set(map(refusal, range(30))) - {""}
    assert len(refusals) == 1
    assert "pursuit.ridge is 0.0" in refusals.pop()


@pytest.mark.parametrize(("name", "value"), [("ridge", -1.0), ("tolerance", float("inf"))])
def test_bad_pursuits_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}") as refusal:
        PursuitConfig(**{name: value})
    one_line(refusal)
