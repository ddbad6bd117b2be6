"""The page of report.md."""

import math
from collections.abc import Callable, Iterable, Iterator

from cepe_jax.cost import gib
from cepe_jax.evaluation.estimates import Estimate
from cepe_jax.evaluation.results import LOWER_IS_BETTER, Result, Results

NOTHING = "-"  # where there is no result, or no pair
Rows = dict[tuple[str, str], dict[int, Result]]
Estimates = dict[tuple[str, str], dict[int, Estimate | None]]


def markdown(results: Results) -> str:
    """All tables, how the cells were measured, and why some have no result."""
    lines = ["# Evaluation"]
    for data in results.data:
        lines += ["", f"## {data}", "", *_of_data(results, data)]
    for (family, metric), by_model in results.averages.items():
        rows = {(model, ""): row for model, row in by_model.items()}
        axis = sorted({value for row in rows.values() for value in row})
        lines += ["", f"## All {family} tasks: {metric}", "", *_table(rows, axis, metric)]
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
    rows, config = results.rows(data), results.data[data]
    if not rows:
        yield "No cell has a result."
        return
    some = [result for row in rows.values() for result in row.values()]
    axis = sorted({value for row in rows.values() for value in row})
    if some[0].cell.family == "perplexity":
        yield (
            f"nll of the last {config.scored} of {config.window} tokens, in nats per token, and in brackets the "
            f"perplexity, exp of the mean. A column for each number of contexts, of {config.chunk_length} tokens or "
            f"fewer. ± is the standard error, which takes windows of one document for dependent; n counts windows, and "
            f"where they are fewer, documents. Gains are paired by window; positive is better."
        )
    else:
        yield (
            f"The {config.family} family, in percent. A column for each value of the axis. ± is the standard error, "
            f"which takes results of one example for dependent; n counts results, and where they are fewer, examples. "
            f"Gains are paired by result; positive is better."
        )
    over = {"no context": results.without_context, next(iter(results.config.models)): results.of_first_model}
    domains = sorted({domain for result in some for domain in result.domains})
    for metric in some[0].means:
        yield from _titled(metric, _table(_of_each(rows, lambda result, m=metric: result.estimate(m)), axis, metric))
        for name, other in over.items():
            gains = _of_each(rows, lambda result, m=metric, o=other: result.gain(m, o(result)) if o(result) else None)
            if any(gain for row in gains.values() for gain in row.values()):
                yield from _titled(f"Gain over {name}, {metric}", _table(gains, axis, metric, sign="+"))
        for domain in domains:
            of_domain = _of_each(rows, lambda result, m=metric, d=domain: result.in_domain(m, d))
            lines = list(_table(of_domain, axis, metric, domain=domain))
            yield from _titled(f"{metric} by domain", lines) if domain == domains[0] else lines[2:]
    yield from _titled("Tokens a second, and peak memory", _costs(rows, axis))
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


def _table(rows: Estimates, axis: list[int], metric: str, sign: str = "", domain: str = "") -> Iterator[str]:
    """A line for each model and kind of context, a column for each value on the axis."""
    names, first = _names(rows), [domain] if domain else []
    yield from _head([*(["domain"] if domain else []), *names, "n"], axis)
    for (model, kind), row in rows.items():
        cells = [number(row[value], metric, sign) if row.get(value) else NOTHING for value in axis]
        counts = ", ".join(dict.fromkeys(_count(estimate) for estimate in row.values() if estimate))
        yield f"| {' | '.join([*first, *[model, kind][: len(names)], counts or NOTHING, *cells])} |"


def _costs(rows: Rows, axis: list[int]) -> Iterator[str]:
    names = _names(rows)
    yield from _head(names, axis)
    for (model, kind), row in rows.items():
        cells = [_cost(row[value]) if value in row else NOTHING for value in axis]
        yield f"| {' | '.join([model, kind][: len(names)] + cells)} |"


def _cost(result: Result) -> str:
    speed = NOTHING if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}"
    return f"{speed}, {gib(result.facts['peak_memory'])}"


def _names(rows: Rows | Estimates) -> list[str]:
    return ["model", "contexts"] if any(kind for _, kind in rows) else ["model"]


def _head(names: list[str], axis: list[int]) -> list[str]:
    columns = [*names, *(f"{value:,}" for value in axis)]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _count(estimate: Estimate) -> str:
    return f"{estimate.records}" + (f" of {estimate.groups}" if estimate.groups < estimate.records else "")


def number(estimate: Estimate, metric: str, sign: str) -> str:
    """With its error where there is one. In percent, but nll: that has the perplexity after it where it is no gain."""
    of_nll = metric == LOWER_IS_BETTER
    scale, digits = (1, 4) if of_nll else (100, 1)
    error = "" if estimate.stderr is None else f" ± {scale * estimate.stderr:.{digits}f}"
    perplexity = f" ({math.exp(estimate.mean):.2f})" if of_nll and not sign else ""
    return f"{scale * estimate.mean:{sign}.{digits}f}{error}{perplexity}"
