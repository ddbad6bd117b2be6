"""The plots of a report."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cepe_jax.directories import staged
from cepe_jax.evaluation.sweep.results import Result, Results
from cepe_jax.evaluation.tasks.evaluation import Evaluation

ERRORS = 2  # standard errors that a bar is long, up and down


def plot(results: Results, data: str, path: Path) -> None:
    """Write a figure of this data: a panel for each metric, then tokens a second and memory; none if none was measured.

    Metrics stand against the evaluation's axis, and cost against the tokens that were given to read. Bars are of the
    gain over no context, where that was measured: the errors that tell the points of a line apart; else of the mean.
    """
    rows = results.rows(data)
    if not rows:
        return
    metrics = list(next(iter(next(iter(rows.values())).values())).means)
    columns = len(metrics) + 2
    with save_figure(path, ncols=columns, figsize=(4.4 * columns, 3.8)) as panels:
        _fill(panels, results, results.config.evaluations[data], rows, metrics)


def _fill(panels, results: Results, evaluation: Evaluation, rows: dict, metrics: list[str]) -> None:
    several = len({model for model, _ in rows}) > 1
    for (model, kind), row in rows.items():
        label = ", ".join([*[model] * (several or not kind), *([kind] if kind else [])])
        points = [row[value] for value in sorted(row)]
        places = [evaluation.on_axis(value) for value in sorted(row)]
        for panel, metric in zip(panels, metrics, strict=False):
            estimates = [_with_error(results, point, metric) for point in points]
            means, errors = zip(*estimates, strict=True)
            panel.errorbar(
                [evaluation.on_axis(value) for value in sorted(row)],
                means,
                yerr=errors,
                marker="o",
                capsize=3,
                label=label,
            )
        read = [point.read for point in points]
        speeds = [float("nan") if point.tokens_per_second is None else point.tokens_per_second for point in points]
        panels[-2].plot(read, speeds, marker="o", label=label)
        panels[-1].plot(read, [point.facts["peak_memory"] / 2**30 for point in points], marker="o", label=label)
    places = sorted({evaluation.on_axis(value) for row in rows.values() for value in row})
    for panel, metric in zip(panels, metrics, strict=False):
        panel.set_xscale("symlog", linthresh=max(min(filter(None, places), default=1), 1))
        panel.set_xticks(places, [f"{place:,}" for place in places], rotation=45)
        panel.minorticks_off()
        panel.set(xlabel=evaluation.axis_name, title=f"{metric}, {evaluation.unit.name}")
    read = sorted({point.read for row in rows.values() for point in row.values()})
    for panel, title in zip(panels[-2:], ("tokens a second", "peak memory, GiB"), strict=True):
        panel.set(xlabel="tokens given to read", title=title, xscale="log")
        panel.set_ylim(bottom=0)
        panel.set_xticks(read, [f"{length:,.0f}" for length in read], rotation=45)
        panel.minorticks_off()
    panels[0].legend(frameon=False)


@contextlib.contextmanager
def save_figure(path: Path, **subplots) -> Iterator:
    """The panels of a figure, which is at `path` once the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(**subplots, layout="constrained")
    try:
        yield panels
        with staged(path) as place:
            figure.savefig(place, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def _with_error(results: Results, result: Result, metric: str) -> tuple[float, float]:
    """The mean and the length of its bar; that without context is what the others are measured from."""
    estimate, without = result.estimate(metric), results.without_context(result)
    gain = without and result.gain(metric, without)
    at_origin = result.cell.point == result.cell.evaluation.origin
    return estimate.mean, 0.0 if at_origin else ERRORS * ((gain or estimate).stderr or 0.0)
