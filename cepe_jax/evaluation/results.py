"""The results of a grid, from the kept records of its cells alone: what each came to, and how it compares."""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cepe_jax.evaluation import cells as store
from cepe_jax.evaluation import tasks
from cepe_jax.evaluation.cells import Cell, Missing
from cepe_jax.evaluation.estimates import Estimate, average, paired
from cepe_jax.evaluation.grid import SweepConfig
from cepe_jax.evaluation.metrics import means
from cepe_jax.evaluation.perplexity import NONE, PerplexityConfig
from cepe_jax.evaluation.tasks import TaskConfig
from cepe_jax.settings import decode
from cepe_jax.weights.files import read_json

LOWER_IS_BETTER = "nll"  # of all metrics this one alone


@dataclass(frozen=True, eq=False)
class Result:
    """A finished cell."""

    cell: Cell
    facts: dict
    records: list[dict]

    @cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """Metric -> name of the record -> its value."""
        scores = {record["id"]: self._scores(record) for record in self.records}
        return {metric: {name: of[metric] for name, of in scores.items()} for metric in next(iter(scores.values()))}

    def _scores(self, record: dict) -> dict[str, float]:
        if self.cell.family == "perplexity":
            return {"nll": record["nll"]}
        return tasks.values(self.cell.data_config, record)

    @cached_property
    def means(self) -> dict[str, float]:
        """Of every metric; of some, as ROUGE's geometric mean, all records together have one and no record alone."""
        columns = [values.values() for values in self.values.values()]
        return means([dict(zip(self.values, row, strict=True)) for row in zip(*columns, strict=True)])

    @cached_property
    def groups(self) -> dict[str, str]:
        """Name of the record -> what it is of: a document of several windows, an example of several seeds."""
        if self.cell.family == "perplexity":
            return {record["id"]: record["document"] for record in self.records}
        return {record["id"]: record["id"].removeprefix(f"{record['seed']}:") for record in self.records}

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        """Domain -> the names of its records; {} where there is but one."""
        found: dict[str, list[str]] = {}
        for record in self.records if self.cell.family == "perplexity" else ():
            found.setdefault(record["domain"], []).append(record["id"])
        return dict(sorted(found.items())) if len(found) > 1 else {}

    def estimate(self, metric: str) -> Estimate:
        """The mean and its error; without the error where no record alone has a value."""
        if metric not in self.values:
            return Estimate(self.means[metric], None, len(self.records), len(set(self.groups.values())))
        return self._of(metric, list(self.values[metric]))

    def in_domain(self, metric: str, domain: str) -> Estimate | None:
        """None where no record is of the domain."""
        return self._of(metric, self.domains[domain]) if domain in self.domains else None

    def _of(self, metric: str, names: list[str]) -> Estimate:
        return Estimate.of([self.values[metric][name] for name in names], [self.groups[name] for name in names])

    def gain(self, metric: str, over: "Result") -> Estimate | None:
        """How much better than the other result this one is, paired by record; None where there are no pairs."""
        if metric not in self.values or metric not in over.values:
            return None
        pair = (over.values, self.values) if metric == LOWER_IS_BETTER else (self.values, over.values)
        return paired(*(values[metric] for values in pair), self.groups)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all tokens that were given to read, the median of all records but the first, which waits for compilation;
        None where there is no other.
        """
        rest = [record["read"] / max(record["seconds"], 1e-9) for record in self.records[1:]]
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

    @property
    def data(self) -> dict[str, PerplexityConfig | TaskConfig]:
        return self.config.perplexity | self.config.tasks

    def rows(self, data: str) -> dict[tuple[str, str], dict[int, Result]]:
        """(model, kind of context) -> value on the axis -> result, where there is one; 0 has its place in every row."""
        found: dict[tuple[str, str], dict[int, Result]] = {}
        for result in self.finished.values():
            if (cell := result.cell).data == data:
                for kind in cell.data_config.kinds if cell.kind == NONE else (cell.kind,):
                    found.setdefault((cell.model, kind), {})[cell.value] = result
        return found

    @cached_property
    def averages(self) -> dict[tuple[str, str], dict[str, dict[int, Estimate]]]:
        """(family, metric) -> model -> value on the axis -> the mean over the family's tasks, each counting alike.

        Of several tasks, and only where all of them have a result with this metric.
        """
        families: dict[str, list[str]] = {}
        for name, task in self.config.tasks.items():
            families.setdefault(task.family, []).append(name)
        found: dict[tuple[str, str], dict[str, dict[int, Estimate]]] = {}
        for (family, names), model in itertools.product(families.items(), self.config.models):
            rows = [self.rows(name).get((model, ""), {}) for name in names]
            for value in sorted(set.intersection(*map(set, rows))) if len(rows) > 1 else ():
                results = [row[value] for row in rows]
                for metric in results[0].means:
                    if all(metric in result.means for result in results):
                        estimate = average([result.estimate(metric) for result in results])
                        found.setdefault((family, metric), {}).setdefault(model, {})[value] = estimate
        return found

    def without_context(self, result: Result) -> Result | None:
        """The same model's on the same data, with the axis' value 0."""
        return self._other(result, kind=NONE if result.cell.kind else "", value=0)

    def of_first_model(self, result: Result) -> Result | None:
        """The first model's on the same data and value; None too where its tokens are others: then windows are."""
        first = self._other(result, model=next(iter(self.config.models)))
        return first if first and first.facts["tokenizer"] == result.facts["tokenizer"] else None

    def _other(self, result: Result, **changes) -> Result | None:
        other = dataclasses.replace(result.cell, **changes).name
        return self.finished.get(other) if other != result.cell.name else None


def gather(out: Path) -> Results:
    """All results of the sweep at `out`; FileNotFoundError where there is none."""
    settings = out / "sweep.json"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: no such file: give the --out of a sweep")
    config = dataclasses.replace(decode(SweepConfig, read_json(settings)), out=out)
    finished, missing = {}, {}
    for cell in (cell for group in config.cells() for cell in group):
        try:
            finished[cell.name] = Result(cell, *store.read(out, cell))
        except Missing as reason:
            missing[cell.name] = str(reason)
    return Results(config, finished, missing)
