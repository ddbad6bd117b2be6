"""The page of report.md."""

import math
from collections.abc import Callable, Iterable, Iterator

from cepe_jax.cost import gib
from cepe_jax.evaluation.sweep.estimates import Estimate
from cepe_jax.evaluation.sweep.results import Result, Results
from cepe_jax.evaluation.tasks.evaluation import Unit

NOTHING = "-"  # where there is no result, or no pair
Rows = dict[tuple[str, str], dict[int, Result]]
Estimates = dict[tuple[str, str], dict[int, Estimate | None]]


def markdown(results: Results) -> str:
    """All tables, how the cells were measured, and why some have no result."""
    lines = ["# Evaluation"]
    for data in results.config.evaluations:
        lines += ["", f"## {data}", "", *_of_data(results, data)]
    units = {evaluation.family: evaluation.unit for evaluation in results.config.evaluations.values()}
    for (family, metric), by_model in results.averages.items():
        rows = {(model, ""): row for model, row in by_model.items()}
        axis = sorted({value for row in rows.values() for value in row})
        lines += ["", f"## All {family} tasks: {metric}", "", *_table(rows, axis, units[family])]
    if results.finished:
        lines += ["", "## How it was measured", ""]
        lines += [f"- {line}" for line in sorted({_circumstances(result) for result in results.finished.values()})]
    if results.missing:
        lines += ["", f"## Without a result: {len(results.missing)}", ""]
        lines += [f"- `{name}`: {message}" for name, message in results.missing.items()]
    return "\n".join(lines) + "\n"


def _circumstances(result: Result) -> str:
    facts = result.facts
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    return f"{facts['device']}, jax {facts['jax']}, Python {facts['python']}{commit}, {facts['date']}"


def _of_data(results: Results, data: str) -> Iterator[str]:
    rows, evaluation = results.rows(data), results.config.evaluations[data]
    if not rows:
        yield "No cell has a result."
        return
    some = [result for row in rows.values() for result in row.values()]
    axis, unit = sorted({value for row in rows.values() for value in row}), evaluation.unit
    yield evaluation.note()
    over = {"no context": results.without_context, next(iter(results.config.models)): results.of_first_model}
    domains = sorted({domain for result in some for domain in result.domains})
    for metric in some[0].means:
        yield from _titled(metric, _table(_of_each(rows, lambda result, m=metric: result.estimate(m)), axis, unit))
        for name, other in over.items():
            gains = _of_each(rows, lambda result, m=metric, o=other: result.gain(m, o(result)) if o(result) else None)
            if any(gain for row in gains.values() for gain in row.values()):
                yield from _titled(f"Gain over {name}, {metric}", _table(gains, axis, unit, sign="+"))
        for domain in domains:
            of_domain = _of_each(rows, lambda result, m=metric, d=domain: result.in_domain(m, d))
            lines = list(_table(of_domain, axis, unit, domain=domain))
            yield from _titled(f"{metric} by domain", lines) if domain == domains[0] else lines[2:]
    yield from _titled("Tokens a second, and peak memory", _costs(rows, axis, _cost))
    if any(result.first_seconds is not None for result in some):
        yield from _titled("Tokens read, and seconds to the first token", _costs(rows, axis, _wait))
    yield ""
    yield (
        "Tokens are those given to read, also where a model's window holds fewer; medians of all records but the "
        "first, which waits for compilation."
    )
    yield from ["", f"![{data}]({data}.png)"]


def _titled(title: str, lines: Iterable[str]) -> list[str]:
    return ["", f"**{title}**", "", *lines]


def _of_each(rows: Rows, function: Callable[[Result], Estimate | None]) -> Estimates:
    return {name: {value: function(result) for value, result in row.items()} for name, row in rows.items()}


def _table(rows: Estimates, axis: list[int], unit: Unit, sign: str = "", domain: str = "") -> Iterator[str]:
    """A line for each model and kind of context, a column for each value on the axis."""
    names, first = _names(rows), [domain] if domain else []
    yield from _head([*(["domain"] if domain else []), *names, "n"], axis)
    for (model, kind), row in rows.items():
        cells = [number(row[value], unit, sign) if row.get(value) else NOTHING for value in axis]
        counts = ", ".join(dict.fromkeys(_count(estimate) for estimate in row.values() if estimate))
        yield f"| {' | '.join([*first, *[model, kind][: len(names)], counts or NOTHING, *cells])} |"


def _costs(rows: Rows, axis: list[int], cost: Callable[[Result], str]) -> Iterator[str]:
    names = _names(rows)
    yield from _head(names, axis)
    for (model, kind), row in rows.items():
        cells = [cost(row[value]) if value in row else NOTHING for value in axis]
        yield f"| {' | '.join([model, kind][: len(names)] + cells)} |"


def _cost(result: Result) -> str:
    speed = NOTHING if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}"
    return f"{speed}, {gib(result.facts['peak_memory'])}"


def _wait(result: Result) -> str:
    seconds = NOTHING if result.first_seconds is None else f"{result.first_seconds:.3f}"
    return f"{result.read:,.0f}, {seconds}"


def _names(rows: Rows | Estimates) -> list[str]:
    return ["model", "contexts"] if any(kind for _, kind in rows) else ["model"]


def _head(names: list[str], axis: list[int]) -> list[str]:
    columns = [*names, *(f"{value:,}" for value in axis)]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _count(estimate: Estimate) -> str:
    return f"{estimate.records}" + (f" of {estimate.groups}" if estimate.groups < estimate.records else "")


def number(estimate: Estimate, unit: Unit, sign: str) -> str:
    """Return the mean, with its error if there is one, and unless it is a gain (`sign`), with its exponential."""
    error = "" if estimate.stderr is None else f" ± {unit.scale * estimate.stderr:.{unit.digits}f}"
    exponential = f" ({math.exp(estimate.mean):.2f})" if unit.exponential and not sign else ""
    return f"{unit.scale * estimate.mean:{sign}.{unit.digits}f}{error}{exponential}"
