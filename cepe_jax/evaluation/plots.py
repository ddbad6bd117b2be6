"""The plots of a report."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cepe_jax.directories import staged
from cepe_jax.evaluation.results import LOWER_IS_BETTER, Result, Results

ERRORS = 2  # standard errors that a bar is long, up and down


def plot(results: Results, data: str, path: Path) -> None:
    """A figure of this data at `path`: a panel for each metric, then tokens a second and memory. Nothing where nothing
    was measured.

    Metrics stand against the axis of the data, or for perplexity against the tokens of context, and cost against the
    tokens that were given to read. Bars are of the gain over no context, where that was measured: the errors that tell
    the points of a line apart; else of the mean.
    """
    rows = results.rows(data)
    if not rows:
        return
    some = next(iter(next(iter(rows.values())).values()))
    metrics = list(some.means)
    columns = len(metrics) + 2
    with save_figure(path, ncols=columns, figsize=(4.4 * columns, 3.8)) as panels:
        _fill(panels, results, rows, some, metrics)


def _fill(panels, results: Results, rows: dict, some: Result, metrics: list[str]) -> None:
    several = len({model for model, _ in rows}) > 1
    for (model, kind), row in rows.items():
        label = ", ".join([*[model] * (several or not kind), *([kind] if kind else [])])
        points = [row[value] for value in sorted(row)]
        for panel, metric in zip(panels, metrics, strict=False):
            estimates = [_with_error(results, point, metric) for point in points]
            means, errors = zip(*estimates, strict=True)
            panel.errorbar(list(map(_place, points)), means, yerr=errors, marker="o", capsize=3, label=label)
        read = [point.read for point in points]
        speeds = [float("nan") if point.tokens_per_second is None else point.tokens_per_second for point in points]
        panels[-2].plot(read, speeds, marker="o", label=label)
        panels[-1].plot(read, [point.facts["peak_memory"] / 2**30 for point in points], marker="o", label=label)
    axis = "tokens of context" if some.cell.family == "perplexity" else "the axis' value"
    for panel, metric in zip(panels, metrics, strict=False):
        places = sorted({_place(point) for row in rows.values() for point in row.values()})
        panel.set_xscale("symlog", linthresh=max(min(filter(None, places), default=1), 1))
        panel.set_xticks(places, [f"{place:,}" for place in places], rotation=45)
        panel.minorticks_off()
        unit = "nats per token" if metric == LOWER_IS_BETTER else "share"
        panel.set(xlabel=axis, title=f"{metric}, {unit}")
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


def _place(result: Result) -> int:
    """Where on the axis a result stands: for perplexity the tokens of context."""
    cell = result.cell
    return cell.value * cell.data_config.chunk_length if cell.family == "perplexity" else cell.value


def _with_error(results: Results, result: Result, metric: str) -> tuple[float, float]:
    """The mean and the length of its bar; that without context is what the others are measured from."""
    estimate, without = result.estimate(metric), results.without_context(result)
    gain = without and result.gain(metric, without)
    return estimate.mean, 0.0 if result.cell.value == 0 else ERRORS * ((gain or estimate).stderr or 0.0)
