"""Distributional memorisation (arXiv 2407.14985, definition 3): a model's probabilities against those of its corpus.

The unit `pair` is a pair of the table in an example. All pairs of one n-gram of an answer share the model's
probability, and units of one example are dependent. The unit `answer` is an n-gram of an answer in an example, with the
mean of log P_{n,D} over its pairs that stand in a document together, as in the authors' code. The infinity-gram has the
unit `answer`.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cepe_jax.config import Dtype
from cepe_jax.directories import one_writer_in, write_json, write_text
from cepe_jax.identity import as_json
from cepe_jax.inference.text import load
from cepe_jax.parsing import Seed
from cepe_jax.tracing.correlations import Adjustment, adjusted, correlate_ranks
from cepe_jax.tracing.index import Index
from cepe_jax.tracing.probabilities import Scored, infinity_of_targets, score_targets
from cepe_jax.tracing.report import Curve, Name, Units, report, write_plots
from cepe_jax.tracing.table import Table, Target

Unit = Literal["pair", "answer"]


@dataclass(frozen=True, kw_only=True)
class CorrelateConfig:
    model: Path  # a decoder or a CEPE, in any format; a CEPE reads no context
    index: Path  # the index of the corpus that it was trained on
    tables: tuple[Path, ...]  # tables of one task, such as one for each n
    out: Path  # gets correlate.json, values.jsonl, report.md and report.png
    unit: Unit = "pair"  # pair: each pair in each example; answer: each n-gram of an answer, with its mean over pairs
    zero_counts: bool = True  # keep what no document has, at the lowest rank; a pair whose first n-gram is absent never
    compat: bool = False  # P_LLM as the authors' code has it: of the whole rest of the answer
    bins: int = 8  # of examples by their exposure, besides one for an exposure of 0
    resamples: int = 1000  # permutations of counts, and bootstrap samples of examples
    adjustment: Adjustment = "holm"  # of p values for the number of tests
    window: int | None = None  # tokens of a text at most; None: those that the model's files say
    dtype: Dtype = "float32"  # type of weights and activations
    seed: Seed = 0  # draws permutations and bootstrap samples

    def __post_init__(self):
        for name in ("bins", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not self.tables:
            raise ValueError("tables is []: give one or more")


@dataclass(frozen=True)
class Values:
    """The measures of a target."""

    target: Target
    log_model: float  # log P_LLM
    log_infinity: float  # NaN: its words follow nothing

    def line(self) -> dict:
        """Return the measures as JSON; a pair is its first n-gram, C(s_x, s_y) and C(s_x)."""
        pairs = [[pair["x"], pair["documents"], pair["count"]] for pair in self.target.pairs]
        infinity = None if math.isnan(self.log_infinity) else self.log_infinity
        example, y = self.target.example, " ".join(self.target.y)
        return {"example": example, "y": y, "log_model": self.log_model, "log_infinity": infinity, "pairs": pairs}


def log_frequency(documents: int, count: int) -> float:
    """Return log P_{n,D} = log C(s_x, s_y) / C(s_x) (definition 2); -inf if no document has both."""
    return math.log(documents / count) if documents else -math.inf


def units_of(values: Sequence[Values], unit: Unit, zero_counts: bool) -> Units:
    """Return log P_{n,D}, log P_LLM and the example of each unit."""
    rows = []
    for value in values:
        logs = [log_frequency(pair["documents"], pair["count"]) for pair in value.target.pairs if pair["count"]]
        finite = [log for log in logs if log > -math.inf]
        if unit == "answer":
            logs = [float(np.mean(finite)) if finite else -math.inf] * bool(logs)
        rows += [(log, value.log_model, value.target.example) for log in logs if zero_counts or log > -math.inf]
    return _columns(rows)


def infinity_units(values: Sequence[Values]) -> Units:
    """Return the log-probability by the infinity-gram, log P_LLM and the example of each target that has the first."""
    rows = [(value.log_infinity, value.log_model, value.target.example) for value in values]
    return _columns([row for row in rows if not math.isnan(row[0])])


def _columns(rows: list[tuple[float, float, int]]) -> Units:
    x, y, groups = np.array(rows, np.float64).reshape(-1, 3).T
    return x, y, groups.astype(int)


def exposure_curve(values: Sequence[Values], scores: Sequence[Scored], bins: int) -> list[Curve]:
    """Return the performance on examples by exposure: the sum of C(s_x, s_y) over their pairs (equation 4).

    Bins have about as many examples each; an exposure of 0 is a bin of its own, and equal ones share a bin.
    """
    exposure_E = np.zeros(len(scores))
    for value in values:
        exposure_E[value.target.example] += sum(pair["documents"] for pair in value.target.pairs)
    positive = exposure_E[exposure_E > 0]
    edges = np.unique(np.quantile(positive, np.arange(1, bins) / bins)) if len(positive) else np.zeros(0)
    numbers_E = np.where(exposure_E > 0, np.searchsorted(edges, exposure_E, side="left") + 1, 0)
    per_token_E = np.array([score.total / score.tokens for score in scores])
    greedy_E = np.array([score.greedy for score in scores], float)
    groups = [numbers_E == number for number in np.unique(numbers_E)]
    return [Curve.of(exposure_E[at], per_token_E[at], greedy_E[at]) for at in groups]


def measure(config: CorrelateConfig, index: Index, tables: Sequence[Table]) -> tuple[list[list[Values]], list[Scored]]:
    """Return the measures of each table's targets, and the scores of the examples, each of which is read once."""
    model = load(config.model, config.dtype, window=config.window)
    index.check_tokenizer(model.tokenizer.fingerprint(), config.model)
    targets = [list(table.targets()) for table in tables]
    together, examples = list(itertools.chain(*targets)), tables[0].examples
    scores, logs_N = score_targets(model, examples, together, config.compat)
    rows = map(Values, together, logs_N.tolist(), infinity_of_targets(index, examples, together).tolist())
    return [list(itertools.islice(rows, len(of_table))) for of_table in targets], scores


def correlate(config: CorrelateConfig) -> None:
    """Write the correlations of a model's probabilities with a corpus' to `config.out`, and print the report."""
    index, tables = Index(config.index), [Table(path) for path in config.tables]
    for table in tables:
        table.check_is_of(index)
        if table.examples != tables[0].examples:
            raise ValueError(f"{table.path} and {tables[0].path} are of different examples: give tables of one task")
    names = [table.path.name for table in tables]
    if len(set(names)) < len(names):
        raise ValueError(f"tables {', '.join(names)} have the same name: give each its own")
    with one_writer_in(config.out):
        values, scores = measure(config, index, tables)
        measured: dict[Name, Units] = {}
        for table, own in zip(tables, values, strict=True):
            measured[table.path.name, f"{table.n}-gram pairs"] = units_of(own, config.unit, config.zero_counts)
            measured[table.path.name, "infinity-gram"] = infinity_units(own)
        tests = [correlate_ranks(*units, config.resamples, config.seed) for units in measured.values()]
        tests = dict(zip(measured, adjusted(tests, config.adjustment), strict=True))
        curves = {name: exposure_curve(own, scores, config.bins) for name, own in zip(names, values, strict=True)}
        lines = [value.line() | {"table": name} for name, own in zip(names, values, strict=True) for value in own]
        write_text(config.out / "values.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        rows = [dict(zip(("table", "measure"), name, strict=True)) | vars(test) for name, test in tests.items()]
        points = {name: [vars(point) for point in curve] for name, curve in curves.items()}
        write_json(config.out / "correlate.json", {"config": as_json(config), "correlations": rows, "curves": points})
        write_plots(measured, tests, curves, config.out / "report.png")
        text = report(tests, curves, config.unit, config.adjustment, config.compat)
        write_text(config.out / "report.md", text)
    print(text)
