"""Questions that a model answers beside contexts: what every family of tasks shares, and what several do.

A family is a frozen dataclass in a file of its own, which `register` makes known to the command line and to sweeps.
"""

import copy
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import draccus

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import LanguageModel, Prompt, generate
from cepe_jax.evaluation.tasks.evaluation import SHARE, Point
from cepe_jax.evaluation.tasks.layouts import LAYOUTS, RECORDS, Layout, load
from cepe_jax.evaluation.tasks.metrics import METRICS, accuracies
from cepe_jax.evaluation.tasks.protocols import BETWEEN, Protocol, Words, join
from cepe_jax.evaluation.tasks.questions import Demonstration, Question
from cepe_jax.evaluation.tasks.selection import Groups, groups_of, sample_demonstrations, sample_questions
from cepe_jax.identity import as_json
from cepe_jax.inference.overflow import Overflow, fit, fit_continued
from cepe_jax.parsing import Seed
from cepe_jax.progress import track
from cepe_jax.settings import decode, is_required

Cut = Literal["truncate_left", "passages"]
FAMILIES: dict[str, type["Task"]] = {}


class TaskConfig:
    """A task of any family as the command line and files spell it. It decodes to the class of `family`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]] = {}  # of all families
    FIELDS_OF = FAMILIES.values()


def register(cls: type["Task"]) -> type["Task"]:
    """Return the class, whose settings are a task's where `family` is its name."""
    FAMILIES[cls.family] = cls
    for field in dataclasses.fields(cls):
        if is_required(field) and field.name not in Task.__dataclass_fields__:  # not in every family
            field = copy.copy(field)
            field.default = None
        TaskConfig.__dataclass_fields__.setdefault(field.name, field)
    TaskConfig.__dataclass_fields__["family"] = Task.__dataclass_fields__["family"]
    return cls


@draccus.decode.register(TaskConfig)
def task_of(values: dict, _=()) -> "Task":
    """Return the task with these settings. ValueError for one that its family does not read."""
    family = values.get("family")
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}: choose {', '.join(FAMILIES)}")
    if unread := values.keys() - FAMILIES[family].__dataclass_fields__:
        name = min(unread)
        raise ValueError(f"{name} is {values[name]}, and the {family} family does not read it: leave it out")
    return decode(FAMILIES[family], values)


def without_unread(values: dict) -> dict:
    """Return the settings without those that the family does not read, which older sweeps stored too."""
    fields = FAMILIES.get(values["family"], TaskConfig).__dataclass_fields__
    return {name: value for name, value in values.items() if name in fields}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """The settings that every family reads, and its evaluation."""

    family: str  # qa: answers from passages; icl: choices after demonstrations; document, synthetic: one long text
    # Passages (qa), demonstrations (icl), tokens of context (document) or of the whole text (synthetic).
    axis: tuple[int, ...] = ()  # how much context there is, with a result for each number; of qa, retrieve.k sets it
    samples: int | None = None  # questions for each seed; None: all
    seeds: tuple[Seed, ...] = (42,)  # draw the questions and demonstrations; each gives `samples` results
    chunk_length: int = 256  # tokens of a context that the encoder reads at once: it cuts a longer one
    template: Words = Words()  # words of the prompt

    usual: ClassVar[Protocol]  # unless a layout or the settings say otherwise
    axis_name: ClassVar[str]
    section = "tasks"
    kinds = ("",)
    origin = Point("", 0)
    unit = SHARE

    def __post_init__(self):
        if not self.axis or min(self.axis) < 0 or len(set(self.axis)) < len(self.axis):
            raise ValueError(f"axis is {list(self.axis)}: give different numbers, 0 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: give one or more, all different")
        check_chunk_length(self.chunk_length)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples is {self.samples}: give a number above 0")
        self.protocol  # noqa: B018 (ValueError for words without their place)

    @property
    def default_protocol(self) -> Protocol:
        """The protocol without the settings' changes."""
        return self.usual

    @property
    def protocol(self) -> Protocol:
        return dataclasses.replace(
            self.default_protocol, template=self.template.put_into(self.default_protocol.template)
        )

    @abstractmethod
    def questions(self, value: int, tokenizer: Tokenizer) -> list[tuple[int, Question]]:
        """Return every question with the seed that drew it."""

    @abstractmethod
    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        """Return the prompt, and the ids of each choice after it."""

    def points(self) -> list[Point]:
        return [Point("", value) for value in sorted(self.axis)]

    def on_axis(self, value: int) -> int:
        return value

    def measure(self, point: Point, model: LanguageModel) -> Iterator[dict]:
        """Yield a record of each question for each seed.

        `prediction` is the model's text; of a question with choices there are instead of it `log_probs` (nats, of all
        tokens of a choice) and `lengths` (tokens). `read` counts the tokens of prompt and contexts, `seconds` is the
        model's time, `first_seconds` that to its first token, `depths` are those of needles, `sources` and `recall`
        of what was retrieved.
        """
        value, tokenizer = point.value, model.tokenizer
        if value not in self.axis:
            raise ValueError(f"{value} is not on the axis {list(self.axis)}: add it")
        for seed, question in track(self.questions(value, tokenizer), f"{self.family}, {value}"):
            prompt, continuations = self.prompt(value, question, tokenizer)
            begun_at = time.monotonic()
            try:
                reply = self._reply(question, prompt, continuations, model)
            except ValueError as error:
                raise ValueError(f"record {question.id}: {error}") from error
            seconds = time.monotonic() - begun_at
            if question.depths:
                reply["depths"] = question.depths
            if question.recall is not None:
                reply |= {"sources": question.sources, "recall": question.recall}
            tokens = len(prompt.ids) + sum(map(len, prompt.contexts))
            facts = {"id": f"{seed}:{question.id}", "seed": seed, "answers": question.answers}
            yield {**facts, **reply, "read": tokens, "seconds": seconds}

    def _reply(self, question: Question, prompt: Prompt, continuations: list[list[int]], model: LanguageModel) -> dict:
        if not question.choices:
            begun_at, first = time.monotonic(), []
            limits = self.protocol.max_new_tokens, self.protocol.stop
            (text,) = generate(model, [prompt], *limits, lambda: first.append(time.monotonic()))
            return {"prediction": text, "first_seconds": first[0] - begun_at}
        log_probs = [score.total for score in model.score(prompt, continuations)]
        return {"choices": question.choices, "log_probs": log_probs, "lengths": list(map(len, continuations))}

    def values(self, record: dict) -> dict[str, float]:
        """Return metric -> value, from the record alone: other metrics need no other run."""
        recall = {"recall": record["recall"]} if "recall" in record else {}
        if "log_probs" in record:
            right = [choice in record["answers"] for choice in record["choices"]]
            scores = record["log_probs"], record["lengths"], record.get("domain_log_probs")
            return accuracies(right, *scores) | recall
        metrics = self.protocol.metrics
        return {name: METRICS[name](record["prediction"], record["answers"]) for name in metrics} | recall

    def group_of(self, record: dict) -> str:
        """Return the question's id: its results under several seeds are dependent."""
        return record["id"].removeprefix(f"{record['seed']}:")

    def identity(self) -> dict:
        """Return all settings except the axis, which may grow, and the metrics, which are computed from records."""
        return {name: value for name, value in as_json(self).items() if name not in ("axis", "metrics")}

    def facts(self) -> dict:
        return {"protocol": as_json(self.protocol)}

    def places(self) -> dict[Path, str]:
        return {}

    def refusal(self, reads: str) -> str:
        return ""

    def note(self) -> str:
        return (
            f"The {self.family} family, in percent. A column for each value of the axis: {self.axis_name}. ± is the "
            f"standard error, which takes results of one example for dependent; n counts results, and where they are "
            f"fewer, examples. Gains are paired by result; positive is better."
        )

    def split(
        self,
        text: str,
        choices: Sequence[str],
        tokenizer: Tokenizer,
        window: int | None = None,
        overflow: Overflow = "error",
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """Return (contexts that moved to the encoder, ids for the decoder, ids of each choice)."""
        if choices:
            continuations = [self.protocol.template.answer.format(answer=choice) for choice in choices]
            return fit_continued(text, continuations, tokenizer, window, overflow, self.chunk_length)
        return *fit(text, tokenizer, window, self.protocol.max_new_tokens, overflow, self.chunk_length), []


@dataclass(frozen=True, kw_only=True)
class FromFiles(Task):
    """Questions that are read from files."""

    data: Path  # questions: a file, or a directory with test.jsonl and train.jsonl, for demonstrations
    layout: str | None = None  # of layouts.LAYOUTS, in which the data is published; None: questions as they stand

    num_shots = 0  # demonstrations that a question has at most

    def __post_init__(self):
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout}: choose of {', '.join(LAYOUTS)}")
        if self.source.family not in ("", self.family):
            raise ValueError(f"layout {self.layout} is of the {self.source.family} family: set family to it")
        super().__post_init__()

    @property
    def source(self) -> Layout:
        return RECORDS if self.layout is None else LAYOUTS[self.layout]

    @property
    def default_protocol(self) -> Protocol:
        return self.source.protocol or self.usual

    def places(self) -> dict[Path, str]:
        return {self.data: self.source.source}

    def questions(self, value: int, tokenizer: Tokenizer) -> list[tuple[int, Question]]:
        """Return the questions that each seed selects, with demonstrations for all of the axis."""
        questions, pool = load(self.data, self.source, shows=self.num_shots > 0)
        if len({bool(question.choices) for question in questions}) > 1:
            raise ValueError(f"{self.data}: some records have choices and some have not: give them apart")
        groups = groups_of(pool)
        return [
            (seed, self._with_demonstrations(question, groups, seed))
            for seed in self.seeds
            for question in sample_questions(questions, self.samples, seed)
        ]

    def _with_demonstrations(self, question: Question, groups: Groups, seed: int) -> Question:
        shots = question.demonstrations or sample_demonstrations(groups, self.num_shots, question, seed)
        return dataclasses.replace(question, demonstrations=tuple(shots))


@dataclass(frozen=True, kw_only=True)
class FewShot(FromFiles):
    """Questions after demonstrations, which the decoder reads."""

    demonstrations: int = 2  # demonstrations that the decoder reads (qa, icl)

    def __post_init__(self):
        if self.demonstrations < 0:
            raise ValueError(f"demonstrations is {self.demonstrations}: give 0 or more")
        super().__post_init__()

    @property
    def num_shots(self) -> int:
        return self.demonstrations

    def shots(self, question: Question, in_encoder: int) -> Sequence[Demonstration]:
        """Return the demonstrations of a prompt, which are the first ones of one with more in the encoder."""
        shots = question.demonstrations
        if len(shots) < self.demonstrations + in_encoder:
            raise ValueError(
                f"record {question.id} has {len(shots)} demonstrations, and {self.demonstrations} for the decoder and "
                f"{in_encoder} for the encoder are asked for: ask for fewer"
            )
        return shots[: self.demonstrations + in_encoder]


@dataclass(frozen=True, kw_only=True)
class Generative(Task):
    """Questions that the model answers in its own words."""

    max_new_tokens: int | None = None  # tokens of an answer at most; None: as the family or the layout has it
    metrics: tuple[str, ...] | None = None  # scores of the answers; None: as the family or the layout has it

    def __post_init__(self):
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give a number above 0")
        if self.metrics == ():
            raise ValueError("metrics is []: give one or more, or leave it out")
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}: choose of {', '.join(METRICS)}")
        super().__post_init__()

    @property
    def protocol(self) -> Protocol:
        settings = {"max_new_tokens": self.max_new_tokens, "metrics": self.metrics}
        return dataclasses.replace(super().protocol, **{k: v for k, v in settings.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class LongText(Generative):
    """Questions on one long text: the decoder reads its end, the encoder what stands before."""

    window: int = 2048  # tokens that the decoder reads, with what it writes or chooses
    overflow: Cut = "truncate_left"  # how what the decoder does not read is cut off, for the encoder

    def document(self, question: Question) -> tuple[str, str]:
        """Return the text, and what is asked of it, which follows: the instruction and the question."""
        template = self.protocol.template
        text = join(*map(template.read, question.contexts)) + BETWEEN
        return text, join(template.instruction, template.asked(question.question))

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        text, asked = self.document(question)
        positions = self.window - 1  # the answer's last token is in the window and takes none
        contexts, ids, after = self.split(text + asked, question.choices, tokenizer, positions, self.overflow)
        if contexts and len(ids) - len(tokenizer.begin) < (needed := len(tokenizer.encode(asked))):
            raise ValueError(
                f"record {question.id}: instruction and question have {needed} tokens, and the decoder's window of "
                f"{self.window} leaves {len(ids) - len(tokenizer.begin)} for them: raise window"
            )
        return Prompt(ids, contexts, None, self.chunk_length), after
