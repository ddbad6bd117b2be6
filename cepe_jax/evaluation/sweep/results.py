"""The results of a grid, from the kept records of its cells alone: what each came to, and how it compares."""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np

from cepe_jax.evaluation.sweep import cells as store
from cepe_jax.evaluation.sweep.cells import Cell, Missing
from cepe_jax.evaluation.sweep.estimates import Estimate, average, paired
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.tasks.evaluation import Unit
from cepe_jax.evaluation.tasks.metrics import means
from cepe_jax.evaluation.tasks.task import without_unread
from cepe_jax.parsing import read_json, typed
from cepe_jax.settings import decode


@dataclass(frozen=True, eq=False)
class Result:
    """A finished cell."""

    cell: Cell
    facts: dict
    records: list[dict]

    @cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """Metric -> name of the record -> its value."""
        scores = {record["id"]: self.cell.evaluation.values(record) for record in self.records}
        return {metric: {name: of[metric] for name, of in scores.items()} for metric in next(iter(scores.values()))}

    @cached_property
    def means(self) -> dict[str, float]:
        """Metric -> mean. One metric, ROUGE's geometric mean, is of all records together and of none alone."""
        columns = [values.values() for values in self.values.values()]
        return means([dict(zip(self.values, row, strict=True)) for row in zip(*columns, strict=True)])

    @cached_property
    def groups(self) -> dict[str, str]:
        """Name of the record -> the group of records that it depends on."""
        return {record["id"]: self.cell.evaluation.group_of(record) for record in self.records}

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        """Domain -> the names of its records; {} if there are not several."""
        domains: dict[str, list[str]] = {}
        for record in self.records:
            domains.setdefault(record.get("domain", ""), []).append(record["id"])
        return dict(sorted(domains.items())) if len(domains) > 1 else {}

    @property
    def unit(self) -> Unit:
        return self.cell.evaluation.unit

    def estimate(self, metric: str) -> Estimate:
        """The mean and its error; without the error where no record alone has a value."""
        if metric not in self.values:
            return Estimate(self.means[metric], None, len(self.records), len(set(self.groups.values())))
        return self._of(metric, list(self.values[metric]))

    def in_domain(self, metric: str, domain: str) -> Estimate | None:
        """The estimate over the domain's records; None if there are none."""
        return self._of(metric, self.domains[domain]) if domain in self.domains else None

    def _of(self, metric: str, names: list[str]) -> Estimate:
        return Estimate.of([self.values[metric][name] for name in names], [self.groups[name] for name in names])

    def gain(self, metric: str, over: "Result") -> Estimate | None:
        """Return by how much this result is better than the other, paired by record; None if there are no pairs."""
        if metric not in self.values or metric not in over.values:
            return None
        pair = (over.values, self.values) if self.unit.lower_is_better else (self.values, over.values)
        return paired(*(values[metric] for values in pair), self.groups)

    @property
    def tokens_per_second(self) -> float | None:
        """The median throughput of the records, except the first, which waits for compilation. None for one record."""
        rest = [record["read"] / max(record["seconds"], 1e-9) for record in self.records[1:]]
        return float(np.median(rest)) if rest else None

    @property
    def first_seconds(self) -> float | None:
        """The median time to the first token, as above. None if nothing is written."""
        rest = [record["first_seconds"] for record in self.records[1:] if "first_seconds" in record]
        return float(np.median(rest)) if rest else None

    @property
    def read(self) -> float:
        """Tokens of a record, the median."""
        return float(np.median([record["read"] for record in self.records]))


@dataclass(frozen=True)
class Results:
    """A grid's finished cells by name, and why the others have no result."""

    config: SweepConfig
    finished: dict[str, Result]
    missing: dict[str, str]

    def rows(self, data: str) -> dict[tuple[str, str], dict[int, Result]]:
        """(model, kind of context) -> value on the axis -> result, if there is one; the origin is in every row."""
        rows: dict[tuple[str, str], dict[int, Result]] = {}
        for result in self.finished.values():
            cell, evaluation = result.cell, result.cell.evaluation
            if cell.data == data:
                for kind in evaluation.kinds if cell.point == evaluation.origin else (cell.point.kind,):
                    rows.setdefault((cell.model, kind), {})[cell.point.value] = result
        return rows

    @cached_property
    def averages(self) -> dict[tuple[str, str], dict[str, dict[int, Estimate]]]:
        """(family, metric) -> model -> value on the axis -> the mean over the family's tasks, each counting alike.

        Of several tasks, and only where all of them have a result with this metric.
        """
        families: dict[str, list[str]] = {}
        for name, evaluation in self.config.evaluations.items():
            families.setdefault(evaluation.family, []).append(name)
        averages: dict[tuple[str, str], dict[str, dict[int, Estimate]]] = {}
        for (family, names), model in itertools.product(families.items(), self.config.models):
            rows = [self.rows(name).get((model, ""), {}) for name in names]
            for value in sorted(set.intersection(*map(set, rows))) if len(rows) > 1 else ():
                results = [row[value] for row in rows]
                for metric in results[0].means:
                    if all(metric in result.means for result in results):
                        estimate = average([result.estimate(metric) for result in results])
                        averages.setdefault((family, metric), {}).setdefault(model, {})[value] = estimate
        return averages

    def without_context(self, result: Result) -> Result | None:
        """The same model's on the same data, at the origin of the axis."""
        return self._other(result, point=result.cell.evaluation.origin)

    def of_first_model(self, result: Result) -> Result | None:
        """The first model's on the same data and value; None too where its tokens are others: then windows are."""
        first = self._other(result, model=next(iter(self.config.models)))
        return first if first and first.facts["tokenizer"] == result.facts["tokenizer"] else None

    def _other(self, result: Result, **changes) -> Result | None:
        other = dataclasses.replace(result.cell, **changes).name
        return self.finished.get(other) if other != result.cell.name else None


class StoredTask(TypedDict):
    family: str


class StoredSweep(TypedDict):
    """The part of a sweep's settings that `gather` reads itself; `decode` checks them all."""

    tasks: dict[str, StoredTask]


def gather(out: Path) -> Results:
    """All results of the sweep at `out`; FileNotFoundError where there is none."""
    settings = out / "sweep.json"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: no such file: give the --out of a sweep")
    stored = read_json(settings)
    typed(stored, StoredSweep, str(settings))
    tasks = {name: without_unread(task) for name, task in stored["tasks"].items()}
    config = decode(SweepConfig, stored | {"tasks": tasks, "out": str(out)})
    finished, missing = {}, {}
    for cell in (cell for group in config.cells() for cell in group):
        try:
            finished[cell.name] = Result(cell, *store.read(out, cell))
        except Missing as reason:
            missing[cell.name] = str(reason)
    return Results(config, finished, missing)
