"""A grid of models and data, and the cells in it."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from cepe_jax.devices import Devices
from cepe_jax.evaluation.cells import Cell
from cepe_jax.evaluation.models import ModelConfig
from cepe_jax.evaluation.perplexity import NONE, PerplexityConfig
from cepe_jax.evaluation.tasks import TaskConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every model on all data. The first model is the one that others are compared with."""

    out: Path  # gets cells/, results.json, report.md and plots; what is finished there is not run again
    models: dict[str, ModelConfig]  # models by name; the others are compared with the first
    perplexity: dict[str, PerplexityConfig] = field(default_factory=dict)  # perplexity evaluations by name
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # tasks by name
    mesh: Devices = Devices()  # how devices share the model and the contexts

    def __post_init__(self):
        if not self.models or not (self.perplexity or self.tasks):
            raise ValueError("models, perplexity or tasks: give a model or more, and data to ask it about")
        for name in (*self.models, *self.perplexity, *self.tasks):
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{name!r} names a model or data: use letters, digits, _ and -")
        if both := set(self.perplexity) & set(self.tasks):
            raise ValueError(f"{', '.join(sorted(both))}: perplexity and tasks have it, give different names")

    def cells(self) -> list[list[Cell]]:
        """The cells of each model on each data, little context first: so peak memory is that of the last cell."""
        groups = []
        for model, model_config in self.models.items():
            for data, config in self.perplexity.items():
                places = [
                    (kind, chunks) for chunks in sorted(config.chunks) for kind in (config.kinds if chunks else (NONE,))
                ]
                groups.append([Cell("perplexity", model, data, *place, model_config, config) for place in places])
            for data, config in self.tasks.items():
                places = [("", value) for value in sorted(config.axis)]
                groups.append([Cell("tasks", model, data, *place, model_config, config) for place in places])
        return groups


@dataclass(frozen=True, kw_only=True)
class PerplexityRun(PerplexityConfig):
    """The perplexity of one model on one set of data."""

    model: ModelConfig  # the model, and who reads contexts
    out: Path  # gets cells/, results.json, report.md and plots; finished cells are not run again
    mesh: Devices = Devices()  # how devices share the model and the contexts

    def sweep(self) -> SweepConfig:
        return SweepConfig(**_one_model(self), perplexity={"perplexity": _only(PerplexityConfig, self)})


@dataclass(frozen=True, kw_only=True)
class TaskRun(TaskConfig):
    """One model and one task."""

    model: ModelConfig  # the model, and who reads contexts
    out: Path  # gets cells/, results.json, report.md and plots; finished cells are not run again
    mesh: Devices = Devices()  # how devices share the model and the contexts

    def sweep(self) -> SweepConfig:
        return SweepConfig(**_one_model(self), tasks={"task": _only(TaskConfig, self)})


def _only(base: type, run):
    """The settings of `run` that are of this class."""
    return base(**{each.name: getattr(run, each.name) for each in dataclasses.fields(base)})


def _one_model(run: PerplexityRun | TaskRun) -> dict:
    return {"out": run.out, "models": {"model": run.model}, "mesh": run.mesh}
