"""A grid of models and evaluations, and the cells in it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import draccus

from cepe_jax.devices import Devices
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.sweep.cells import Cell
from cepe_jax.evaluation.tasks.evaluation import Evaluation
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.evaluation.tasks.task import FAMILIES, TaskConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every model on all data. The first model is the one that others are compared with."""

    out: Path  # gets cells/, results.json, report.md and plots; finished cells are not run again
    models: dict[str, ModelConfig]  # models by name; the others are compared with the first
    perplexity: dict[str, Perplexity] = field(default_factory=dict)  # perplexity evaluations by name
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # tasks by name
    mesh: Devices = Devices()  # how devices share the model and the contexts

    def __post_init__(self):
        if not self.models or not self.evaluations:
            raise ValueError("models, perplexity or tasks: give a model or more, and data to ask it about")
        for name in (*self.models, *self.evaluations):
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{name!r} names a model or data: use letters, digits, _ and -")
        if both := set(self.perplexity) & set(self.tasks):
            raise ValueError(f"{', '.join(sorted(both))}: perplexity and tasks have it, give different names")

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return self.perplexity | self.tasks

    def cells(self) -> list[list[Cell]]:
        """The cells of each model on each data, little context first: so peak memory is that of the last cell."""
        return [
            [Cell(model, data, point, model_config, evaluation) for point in evaluation.points()]
            for model, model_config in self.models.items()
            for data, evaluation in self.evaluations.items()
        ]


@dataclass(frozen=True, kw_only=True)
class OneModel:
    """The settings of a sweep of one model, beside those of the one evaluation."""

    model: ModelConfig  # the model, and who reads contexts
    out: Path  # gets cells/, results.json, report.md and plots; finished cells are not run again
    mesh: Devices = Devices()  # how devices share the model and the contexts


@dataclass(frozen=True, kw_only=True)
class PerplexityRun(Perplexity, OneModel):
    """The perplexity of one model on one set of data. It decodes to a sweep."""


class TaskRun(TaskConfig):
    """One model and one task. It decodes to a sweep; a setting that the family does not read is refused."""

    __dataclass_fields__ = TaskConfig.__dataclass_fields__ | OneModel.__dataclass_fields__
    FIELDS_OF = *FAMILIES.values(), OneModel


def _decode_run(values: dict, section: str, data: str) -> SweepConfig:
    """Return the sweep of one model and one evaluation."""
    run = {name: values[name] for name in OneModel.__dataclass_fields__ if name in values}
    evaluation = {name: value for name, value in values.items() if name not in run}
    models = {"model": run.pop("model")} if "model" in run else {}
    return draccus.decode(SweepConfig, run | {"models": models, section: {data: evaluation}})


draccus.decode.register(PerplexityRun, lambda values, _: _decode_run(values, "perplexity", "perplexity"))
draccus.decode.register(TaskRun, lambda values, _: _decode_run(values, "tasks", "task"))
