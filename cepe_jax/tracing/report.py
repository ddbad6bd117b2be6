"""The tables and plots of correlations, for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.evaluation.sweep.plots import save_figure
from cepe_jax.tracing.correlations import WIDTH, Correlation

Name = tuple[str, str]  # a table, and what is measured with it
Units = tuple[np.ndarray, np.ndarray, np.ndarray]  # log P by the corpus and by the model, and the example; (N,) each
COLUMNS = "table", "measure", "units", "examples", "rho", "interval", "p", "adjusted", "permuted", "share", "tau", "p"


@dataclass(frozen=True)
class Curve:
    """A point of an exposure curve: examples of about one exposure."""

    examples: int
    exposure: float  # mean
    log_prob: float  # mean of log P_LLM a token of the answer
    log_prob_error: float | None  # its standard error; None of one example
    accuracy: float  # share of answers of which each token is the most probable one, after the right ones before

    @classmethod
    def of(cls, exposures: np.ndarray, log_probs: np.ndarray, greedy: np.ndarray) -> "Curve":
        """Return the point of these examples."""
        count = len(exposures)
        error = float(log_probs.std(ddof=1)) / count**0.5 if count > 1 else None
        return cls(count, float(exposures.mean()), float(log_probs.mean()), error, float(greedy.mean()))


def report(
    tests: Mapping[Name, Correlation], curves: Mapping[str, Sequence[Curve]], unit: str, adjustment: str, compat: bool
) -> str:
    """Return the report in Markdown."""
    of = (
        "the whole rest of the answer from the n-gram on, as the authors' code has it" if compat else "the n-gram alone"
    )
    parts = [
        "# Correlations\n\n"
        f"P_LLM is of the tokens of {of}. The unit is the {unit}, of the infinity-gram the answer. rho is Spearman's, "
        f"with a {WIDTH}% interval by a bootstrap over examples; p is for independent units, and adjusted "
        f"({adjustment}) for the {len(tests)} rows. Permuted: the {WIDTH}% interval of rho when the corpus' measure is "
        "permuted among units, and the share of permutations as far from 0. tau is Kendall's, distance (1 - tau) / 2.",
        "\n".join([f"| {' | '.join(COLUMNS)} | distance |", "|---" * 13 + "|", *map(_row, tests, tests.values())]),
    ]
    for name, curve in curves.items():
        lines = [
            f"## Exposure, {name}\n",
            "| exposure | examples | log P_LLM a token | greedy answers |\n|---|---|---|---|",
        ]
        for point in curve:
            error = "" if point.log_prob_error is None else f" ± {point.log_prob_error:.3f}"
            share = f"{100 * point.accuracy:.0f}%"
            lines.append(f"| {point.exposure:,.1f} | {point.examples:,} | {point.log_prob:.3f}{error} | {share} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n\n![Correlations and exposure curves](report.png)\n"


def _row(name: Name, test: Correlation) -> str:
    cells = [*name, f"{test.units:,}", f"{test.groups:,}"]
    if test.rho is None:
        return f"| {' | '.join([*cells, 'constant', *[''] * 8])} |"
    cells += [f"{test.rho:+.3f}", _span(test.interval), f"{test.rho_p:.2g}", f"{test.adjusted_p:.2g}"]
    cells += [_span(test.permuted), f"{test.permuted_p:.2g}", f"{test.tau:+.3f}", f"{test.tau_p:.2g}"]
    return f"| {' | '.join([*cells, f'{test.distance:.3f}'])} |"


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def write_plots(
    measured: Mapping[Name, Units],
    tests: Mapping[Name, Correlation],
    curves: Mapping[str, Sequence[Curve]],
    path: Path,
) -> None:
    """Write a figure with a row for each table: its measures against log P_LLM, and its exposure curve.

    A unit of probability 0 has no place on a logarithmic axis, and is counted in the title.
    """
    with save_figure(path, nrows=len(curves), ncols=3, figsize=(13.2, 3.8 * len(curves)), squeeze=False) as panels:
        for row, (table, curve) in zip(panels, curves.items(), strict=True):
            names = [name for name in measured if name[0] == table]
            for panel, name in zip(row, names, strict=False):
                x, y, _ = measured[name]
                shown = np.isfinite(x)
                panel.scatter(x[shown], y[shown], s=6, alpha=0.4, linewidths=0)
                rho = "constant" if tests[name].rho is None else f"rho {tests[name].rho:+.2f}"
                zeros = f", {(~shown).sum():,} of probability 0" if not shown.all() else ""
                panel.set(title=f"{table}: {rho}{zeros}", xlabel=f"log P, {name[1]}", ylabel="log P_LLM")
            points = [point for point in curve if point.examples]
            errors = [2 * (point.log_prob_error or 0) for point in points]
            places = [point.exposure for point in points]
            row[2].errorbar(places, [p.log_prob for p in points], yerr=errors, marker="o", capsize=3)
            row[2].set_xscale("symlog", linthresh=1)
            row[2].set(title=f"{table}: exposure", xlabel="documents with a pair", ylabel="log P_LLM a token")
