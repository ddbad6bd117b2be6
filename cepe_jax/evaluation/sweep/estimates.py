"""Means and paired differences with their standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    mean: float
    stderr: float | None  # None of one group: nothing is known of how groups differ
    records: int
    groups: int

    @classmethod
    def of(cls, values: Sequence[float], groups: Sequence[str]) -> "Estimate":
        """The mean of all values; its error takes values of one group, such as a document, for dependent.

        That is the cluster-robust error, sqrt(G / (G - 1) * sum over groups of (sum of deviations)^2) / N; with groups
        of one value it is the standard deviation (ddof 1) over sqrt(N).
        """
        x = np.asarray(values, np.float64)
        names, numbers = np.unique(np.asarray(groups), return_inverse=True)
        count, mean = len(names), float(x.mean())
        stderr = None
        if count > 1:
            sums = np.bincount(numbers, x - mean, count)
            stderr = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(x)
        return cls(mean, stderr, len(x), count)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float], groups: Mapping[str, str]) -> Estimate | None:
    """ours - theirs on the records that both have, by name; None where there are none."""
    names = [name for name in ours if name in theirs]
    if not names:
        return None
    return Estimate.of([ours[name] - theirs[name] for name in names], [groups[name] for name in names])


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each counting alike."""
    errors = [estimate.stderr for estimate in estimates]
    return Estimate(
        sum(estimate.mean for estimate in estimates) / len(estimates),
        None if None in errors else math.hypot(*errors) / len(estimates),
        sum(estimate.records for estimate in estimates),
        sum(estimate.groups for estimate in estimates),
    )
