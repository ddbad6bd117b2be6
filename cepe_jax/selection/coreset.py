"""A coreset of examples by their features: clusters, and a matching pursuit of each one's centroid.

TAGCOS (arXiv 2407.15235), section 3: k-means, then orthogonal matching pursuit (OMP) with a ridge and weights that are
not negative. Everything is fp64 numpy, except that k-means reads what it is given.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from cepe_jax.data.sampling import apportion

ORTHOGONAL = 1e-12  # cosine of an atom and the residual from which on the atom explains nothing of it


@dataclass(frozen=True)
class PursuitConfig:
    """The settings of the matching pursuit."""

    ridge: float = 1.0  # added to the diagonal of the atoms' inner products, except for a single atom
    tolerance: float = 1e-4  # residual, relative to the target, below which the pursuit ends
    positive: bool = True  # weights are not negative

    def __post_init__(self):
        for name in ("ridge", "tolerance"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"pursuit.{name} is {getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class Choice:
    """The part of a coreset that comes from one cluster."""

    cluster_size: int  # examples of the cluster
    rows: np.ndarray  # the examples, by their rows in the features, ascending
    weights: np.ndarray  # of the examples in a sum near the sum of the whole cluster
    fills: int  # examples that the pursuit did not choose
    weighted_residual: float  # ||centroid - weighted sum|| / ||centroid||
    mean_residual: float  # ||centroid - mean|| / ||centroid||


def import_sklearn():
    try:
        import sklearn.cluster
        import sklearn.exceptions
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: clusters need scikit-learn, pip install '.[selection]' in the checkout") from None
    return sklearn


def clusters_of(features_ND: np.ndarray, count: int, seed: int, starts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster (N) of each row, and the centroids (count, D), by k-means from the best of several starts.

    ValueError if there are fewer different rows than clusters: one cluster would be empty.
    """
    sklearn = import_sklearn()
    if count > len(features_ND):
        raise ValueError(f"clusters is {count}, and there are {len(features_ND)} examples: lower it")
    with warnings.catch_warnings():
        # Of rows that are equal, which are refused below.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        means = sklearn.cluster.KMeans(count, n_init=starts, random_state=seed).fit(features_ND)
    if (filled := len(np.unique(means.labels_))) < count:
        raise ValueError(
            f"clusters is {count}, and {count - filled} of them are empty: the {len(features_ND)} examples have too "
            f"few different features; lower it"
        )
    return means.labels_, means.cluster_centers_.astype(np.float64)


def matching_pursuit(
    atoms_ND: np.ndarray, target_D: np.ndarray, most: int, config: PursuitConfig
) -> tuple[list[int], np.ndarray]:
    """Return the rows of up to `most` atoms, chosen one by one, and their weights in a sum near the target (OMP).

    Each time the atom of the largest product with the residual joins, and all weights are fitted again. If they may not
    be negative, the most negative one leaves until none is. The pursuit ends early if the residual is within the
    tolerance, or the best atom is one of those already or orthogonal to the residual.
    """
    from scipy.linalg import LinAlgWarning, solve  # a quarter of a second: only who selects pays for it

    products_N, lengths_N = atoms_ND @ target_D, np.linalg.norm(atoms_ND, axis=1)
    target_length = np.linalg.norm(target_D)
    support: list[int] = []
    gram_KK, weights_K, residual_D = np.zeros((0, 0)), np.zeros(0), target_D

    def fitted(ridge: float) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", LinAlgWarning)  # of weights without a correct digit
                return solve(gram_KK + ridge * np.eye(len(support)), products_N[support], assume_a="pos")
        except (np.linalg.LinAlgError, LinAlgWarning):
            raise ValueError(f"pursuit.ridge is {ridge}, and chosen examples depend on each other: raise it") from None

    for _ in range(most):
        residual_length = np.linalg.norm(residual_D)
        if residual_length <= config.tolerance * target_length:
            break
        gains_N = atoms_ND @ residual_D
        best = int(np.argmax(gains_N if config.positive else abs(gains_N)))
        gain = gains_N[best] if config.positive else abs(gains_N[best])
        if best in support or gain <= ORTHOGONAL * lengths_N[best] * residual_length:
            break
        support.append(best)
        column_K = atoms_ND[support] @ atoms_ND[best]
        gram_KK = np.block([[gram_KK, column_K[:-1, None]], [column_K[None]]])
        weights_K = fitted(config.ridge if len(support) > 1 else 0.0)
        while config.positive and weights_K.min(initial=0.0) < 0:
            worst = int(np.argmin(weights_K))
            del support[worst]
            gram_KK = np.delete(np.delete(gram_KK, worst, axis=0), worst, axis=1)
            weights_K = fitted(config.ridge) if support else np.zeros(0)
        residual_D = target_D - weights_K @ atoms_ND[support]
    return support, weights_K


def chosen_atoms(
    atoms_ND: np.ndarray, target_D: np.ndarray, budget: int, config: PursuitConfig
) -> tuple[np.ndarray, int]:
    """Return the rows, ascending, of `budget` atoms, and how many of them the pursuit did not choose.

    A pursuit that ends early is repeated on the remaining atoms, towards the same target. Once it chooses nothing, the
    atoms with the largest products with the target fill the budget, of equal ones the first.
    """
    pool, rows = np.arange(len(atoms_ND)), np.zeros(0, int)
    while missing := budget - len(rows):
        places, _ = matching_pursuit(atoms_ND[pool], target_D, missing, config)
        if not places:
            places = np.argsort(-(atoms_ND[pool] @ target_D), kind="stable")[:missing]
            return np.sort([*rows, *pool[places]]), missing
        rows, pool = np.concatenate([rows, pool[places]]), np.delete(pool, places)
    return np.sort(rows), 0


def weights_for(atoms_KD: np.ndarray, target_D: np.ndarray, ridge: float) -> np.ndarray:
    """Return weights x, none of them negative, that minimise ||target - atoms^T x||^2 + ridge ||x||^2."""
    from scipy.optimize import nnls

    matrix = np.concatenate([atoms_KD.T, np.sqrt(ridge) * np.eye(len(atoms_KD))])
    return nnls(matrix, np.concatenate([target_D, np.zeros(len(atoms_KD))]))[0]


def coreset(
    features_ND: np.ndarray, labels_N: np.ndarray, centroids_CD: np.ndarray, budget: int, config: PursuitConfig
) -> list[Choice]:
    """Return `budget` examples, of each cluster its share by size (largest remainder), near its centroid.

    ValueError if there are fewer examples.
    """
    if budget > len(features_ND):
        raise ValueError(f"the budget is {budget} examples, and there are {len(features_ND)}: lower the fraction")
    sizes = np.bincount(labels_N, minlength=len(centroids_CD)).tolist()
    choices = []
    for cluster, share in enumerate(apportion(budget, sizes)):
        members, target_D = np.flatnonzero(labels_N == cluster), centroids_CD[cluster]
        atoms_ND, length = features_ND[members].astype(np.float64), np.linalg.norm(target_D)
        rows, fills = chosen_atoms(atoms_ND, target_D, share, config)
        atoms_KD = atoms_ND[rows]
        weights_K = weights_for(atoms_KD, target_D, config.ridge) if share else np.zeros(0)
        mean_D = atoms_KD.mean(axis=0) if share else np.zeros_like(target_D)
        weighted, plain = (
            np.linalg.norm(target_D - sum_D) / length if length else 0.0 for sum_D in (weights_K @ atoms_KD, mean_D)
        )
        choices.append(Choice(len(members), members[rows], len(members) * weights_K, fills, weighted, plain))
    return choices


def repeats_of(weights_K: np.ndarray, total: int) -> np.ndarray:
    """Return how often each example comes if all together come `total` times in proportion to the weights.

    Whole numbers by largest remainder. ValueError if no weight is above 0.
    """
    if not weights_K.max(initial=0.0) > 0:
        raise ValueError("no example has a weight above 0: give --use_weights=false")
    exact = np.round(weights_K / weights_K.max() * 2**40).astype(int).tolist()
    return np.array(apportion(total, exact))
