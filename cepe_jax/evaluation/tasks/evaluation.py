"""The seam between what is asked and what runs and reports it: a sweep knows an evaluation by this alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from cepe_jax.evaluation.readers.language_model import LanguageModel


class Point(NamedTuple):
    """A place where a model is measured: a kind of contexts, "" where there is one kind, and how much of it."""

    kind: str
    value: int


@dataclass(frozen=True)
class Unit:
    """The way in which the values of a metric are written."""

    name: str  # on a plot
    scale: float  # of a table's numbers
    digits: int
    lower_is_better: bool = False
    exponential: str = ""  # the name of exp(mean), which tables and results have too; "": they have not


SHARE = Unit("share", scale=100, digits=1)


class Evaluation(Protocol):
    """Settings, as a frozen dataclass, and what they mean: what is asked at each point, and how records are read."""

    section: ClassVar[str]  # the group of a sweep's settings that it stands in
    family: str  # results of evaluations of one family are averaged
    kinds: tuple[str, ...]  # of contexts
    origin: ClassVar[Point]  # which all kinds share, and gains are measured from
    axis_name: ClassVar[str]  # on a plot
    unit: ClassVar[Unit]  # of all its metrics

    def points(self) -> list[Point]:
        """Return the points in the order in which they are measured, little context first."""

    def on_axis(self, value: int) -> int:
        """Return where a point of this value stands on a plot's axis."""

    def measure(self, point: Point, model: LanguageModel) -> Iterator[dict]:
        """Yield a record of each question: `id`, `read` (tokens), `seconds` and what `values` needs.

        Some have a `domain`, and `first_seconds`, the time to the first token that is written.
        """

    def values(self, record: dict) -> dict[str, float]:
        """Return metric -> value of a record."""

    def group_of(self, record: dict) -> str:
        """Return the name that dependent records share: those of one document, of one example."""

    def identity(self) -> dict:
        """Return the settings that the records depend on."""

    def facts(self) -> dict:
        """Return what a cell's file says of the evaluation beside its identity."""

    def places(self) -> dict[Path, str]:
        """Return the files and directories that are read, and of each where its data comes from, "" if unknown."""

    def refusal(self, reads: str) -> str:
        """Return why no model can be asked whose contexts are read as its setting `reads` says, "" if it can."""

    def note(self) -> str:
        """Return the sentences above the tables."""
