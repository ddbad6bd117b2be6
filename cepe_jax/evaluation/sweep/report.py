"""The report of a grid: results.json, report.md and plots."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cepe_jax.directories import write_json, write_text
from cepe_jax.evaluation.sweep.cells import SCHEMA
from cepe_jax.evaluation.sweep.plots import plot
from cepe_jax.evaluation.sweep.results import Result, Results, gather
from cepe_jax.evaluation.sweep.tables import markdown
from cepe_jax.identity import as_json


@dataclass(frozen=True)
class ReportConfig:
    out: Path  # the --out of a sweep, a perplexity evaluation or a task


def report(config: ReportConfig) -> str:
    """The page of report.md, which is in `config.out` with the plots, and with results.json, written last."""
    results = gather(config.out)
    for name in results.config.evaluations:
        plot(results, name, config.out / f"{name}.png")
    page = markdown(results)
    write_text(config.out / "report.md", page)
    write_json(config.out / "results.json", _as_json(results))
    return page


def _as_json(results: Results) -> dict:
    return {
        "schema": SCHEMA,
        "config": as_json(results.config),
        "cells": [dict(_cell(results, result)) for result in results.finished.values()],
        "averages": [
            {"family": family, "metric": metric, "model": model, "value": value} | dataclasses.asdict(estimate)
            for (family, metric), by_model in results.averages.items()
            for model, row in by_model.items()
            for value, estimate in row.items()
        ],
        "failures": [{"name": name, "message": message} for name, message in results.missing.items()],
    }


def _cell(results: Results, result: Result) -> Iterator[tuple[str, object]]:
    yield from result.facts.items()
    yield "tokens_per_second", result.tokens_per_second
    yield "first_seconds", result.first_seconds
    yield "read", result.read
    without, first = results.without_context(result), results.of_first_model(result)
    metrics = {}
    for metric in result.means:
        estimate = result.estimate(metric)
        numbers = dataclasses.asdict(estimate)
        if name := result.unit.exponential:
            numbers[name] = math.exp(estimate.mean)
        for name, other in ("gain_over_no_context", without), ("gain_over_first_model", first):
            gain = other and result.gain(metric, other)
            numbers[name] = gain and dataclasses.asdict(gain)
        numbers["domains"] = {domain: dataclasses.asdict(result.in_domain(metric, domain)) for domain in result.domains}
        metrics[metric] = numbers
    yield "metrics", metrics
