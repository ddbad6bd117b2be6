"""Rank correlations with their controls: permutations, a bootstrap over groups, and adjustment for several tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Adjustment = Literal["holm", "benjamini-hochberg"]
WIDTH = 95  # percent of an interval


@dataclass(frozen=True)
class Correlation:
    """The rank correlation of two measures over units, which come in dependent groups."""

    units: int
    groups: int
    rho: float | None  # Spearman's; None if a measure is constant, or there are fewer than three units
    rho_p: float | None = None  # two-sided, for independent units
    tau: float | None = None  # Kendall's tau-b
    tau_p: float | None = None
    distance: float | None = None  # Kendall's, normalised: (1 - tau) / 2
    interval: tuple[float, float] | None = None  # of rho, by a bootstrap over groups; None if there is one group
    permuted: tuple[float, float] | None = None  # interval of rho when one measure is permuted
    permuted_p: float | None = None  # share of permutations whose rho is as far from 0
    adjusted_p: float | None = None  # rho_p for all tests of a report


def correlate_ranks(x: np.ndarray, y: np.ndarray, groups: np.ndarray, resamples: int, seed: int) -> Correlation:
    """Return the correlation of `x` and `y` (N,), which may be -inf, over units of these `groups` (N,), integers."""
    from scipy import stats

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    order, starts = np.argsort(groups, kind="stable"), np.unique(np.sort(groups), return_index=True)[1]
    members, count = np.split(order, starts[1:]), len(starts)
    if len(x) < 3 or (x == x[0]).all() or (y == y[0]).all():
        return Correlation(len(x), count, None)
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    rho, tau = stats.spearmanr(ranks_x, ranks_y), stats.kendalltau(ranks_x, ranks_y)
    rng = np.random.default_rng(seed)
    null = np.array([_pearson(rng.permutation(ranks_x), ranks_y) for _ in range(resamples)])
    as_far = int((np.abs(null) >= abs(rho.statistic) - 1e-12).sum())
    drawn = []
    for _ in range(resamples if count > 1 else 0):  # one group drawn again and again is always itself
        units = np.concatenate([members[n] for n in rng.integers(0, count, count)])
        drawn.append(_pearson(stats.rankdata(x[units]), stats.rankdata(y[units])))
    return Correlation(
        len(x),
        count,
        float(rho.statistic),
        float(rho.pvalue),
        float(tau.statistic),
        float(tau.pvalue),
        (1 - float(tau.statistic)) / 2,
        _interval(np.array(drawn)) if drawn else None,
        _interval(null),
        (1 + as_far) / (1 + resamples),
    )


def adjusted(correlations: Sequence[Correlation], kind: Adjustment) -> list[Correlation]:
    """Return the correlations with p values that hold for all of them together: Holm's, or Benjamini and Hochberg's."""
    from scipy import stats

    tested = [n for n, one in enumerate(correlations) if one.rho_p is not None]
    p = np.array([correlations[n].rho_p for n in tested])
    if kind == "holm":
        order = np.argsort(p)
        p[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1)
    elif tested:
        p = stats.false_discovery_control(p)
    values = dict(zip(tested, p.tolist(), strict=True))
    return [replace(one, adjusted_p=values.get(n)) for n, one in enumerate(correlations)]


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of two arrays; NaN if one is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else np.nan


def _interval(values: np.ndarray) -> tuple[float, float]:
    return tuple(np.nanpercentile(values, [(100 - WIDTH) / 2, (100 + WIDTH) / 2]).tolist())
