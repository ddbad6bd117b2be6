"""Questions that a model answers beside contexts: open-domain QA, in-context learning, long documents, needles."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation import prompts
from cepe_jax.evaluation.language_model import LanguageModel, Prompt, generate
from cepe_jax.evaluation.metrics import METRICS, accuracies
from cepe_jax.evaluation.protocols import PROTOCOLS, Protocol, Template
from cepe_jax.evaluation.records import SUFFIXES, Demonstration, Record, read
from cepe_jax.progress import track


@dataclass(frozen=True)
class TaskConfig:
    """One task. What its axis counts depends on the family.

    qa: further passages for the encoder (0, 5, 10, 20, 50); icl: demonstrations for the encoder (0, 18, 38); document:
    the encoder's tokens (2048, 6144, 14336, 30720); synthetic: tokens of the whole text, with what is generated.
    """

    family: Literal["qa", "icl", "document", "synthetic"]
    axis: tuple[int, ...]
    data: Path | None = None  # records: a file, or a directory with test.jsonl and train.jsonl, for demonstrations
    samples: int | None = None  # records of each seed; None: all
    seeds: tuple[int, ...] = (42,)  # of the choice of records and demonstrations: each gives `samples` results
    demonstrations: int = 2  # that the decoder reads (qa, icl)
    passages: int = 10  # that the decoder reads (qa)
    max_new_tokens: int | None = None  # None, here and below: as the protocol of the task has it
    metrics: tuple[str, ...] | None = None
    template: Template | None = None

    def __post_init__(self):
        if not self.axis or min(self.axis) < 0 or len(set(self.axis)) < len(self.axis):
            raise ValueError(f"axis is {list(self.axis)}: give different numbers, 0 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: give one or more, all different")
        for name in ("samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give a number above 0")
        for name in ("demonstrations", "passages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}: choose of {', '.join(METRICS)}")

    @property
    def protocol(self) -> Protocol:
        """The task's, with what is said here."""
        names = ("max_new_tokens", "metrics", "template")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(PROTOCOLS[self.family], **said)


def measure(config: TaskConfig, axis: int, model: LanguageModel) -> Iterator[dict]:
    """A result of each chosen record for each seed, of what `values` needs: id, seed, answers, and what was said.

    `prediction` is what the model wrote; or of each choice `log_probs` (nats, of all its tokens), `lengths` (tokens)
    and, of the icl family, `domain_log_probs`: after the question's words with an empty input, without demonstrations.
    `read` counts the tokens of prompt and contexts, `seconds` is the model's time.
    """
    if axis not in config.axis:
        raise ValueError(f"{axis} is not on the axis {list(config.axis)}: add it")
    protocol, (records, pool) = config.protocol, _load(config)
    rounds = [(seed, record) for seed in config.seeds for record in prompts.chosen(records, config.samples, seed)]
    of_domain: dict[tuple[str, ...], list[float]] = {}
    for seed, record in track(rounds, f"{config.family}, {axis}"):
        prompt, continuations = _prompt(config, axis, record, pool, seed, model.tokenizer)
        begun = time.monotonic()
        if record.choices:
            scores = model.score(prompt, continuations)
            said = {"choices": record.choices, "log_probs": [score.total for score in scores]}
            said["lengths"] = [len(continuation) for continuation in continuations]
        else:
            (text,) = generate(model, [prompt], protocol.max_new_tokens, protocol.stop)
            said = {"prediction": text}
        seconds = time.monotonic() - begun
        if config.family == "icl":
            if record.choices not in of_domain:
                asked = protocol.template.asked("")
                before, after = _cut(asked, _continuations(record, protocol.template), model.tokenizer)
                of_domain[record.choices] = [score.total for score in model.score(Prompt(before), after)]
            said["domain_log_probs"] = of_domain[record.choices]
        tokens = len(prompt.ids) + sum(map(len, prompt.contexts))
        known = {"id": f"{seed}:{record.id}", "seed": seed, "answers": record.answers}
        yield {**known, **said, "read": tokens, "seconds": seconds}


def values(config: TaskConfig, record: dict) -> dict[str, float]:
    """Metric -> value of a result of `measure`, which is read alone: other metrics need no other run."""
    if "log_probs" in record:
        right = [choice in record["answers"] for choice in record["choices"]]
        return accuracies(right, record["log_probs"], record["lengths"], record.get("domain_log_probs"))
    return {name: METRICS[name](record["prediction"], record["answers"]) for name in config.protocol.metrics}


def _load(config: TaskConfig) -> tuple[list[Record], list[list[Demonstration]]]:
    """The records, and in groups by answer what demonstrations are drawn from where a record has none."""
    if config.data is None:
        raise ValueError(f"the {config.family} family needs data: give a .jsonl file, or a directory with test.jsonl")
    if config.data.is_file():
        return list(read(config.data)), []
    files = {split: _split(config.data, split) for split in ("test", "train")}
    if files["test"] is None:
        raise FileNotFoundError(f"{config.data}: no such file, and no directory with test.jsonl or test.jsonl.gz")
    shown = [prompts.as_demonstration(record) for record in read(files["train"])] if files["train"] else []
    return list(read(files["test"])), prompts.groups_of(shown)


def _split(directory: Path, name: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := directory / f"{name}{suffix}").exists()), None)


def _prompt(
    config: TaskConfig, axis: int, record: Record, pool: list[list[Demonstration]], seed: int, tokenizer: Tokenizer
) -> tuple[Prompt, list[list[int]]]:
    """What the model is asked, and the ids of each choice after it."""
    template = config.protocol.template
    most = config.demonstrations + (max(config.axis) if config.family == "icl" else 0)
    shown = record.demonstrations or prompts.draw(pool, most, record, seed)
    in_encoder = axis if config.family == "icl" else 0
    if len(shown) < config.demonstrations + in_encoder:
        raise ValueError(
            f"record {record.id} has {len(shown)} demonstrations, and {config.demonstrations} for the decoder and "
            f"{in_encoder} for the encoder are asked for: ask for fewer"
        )
    shown = shown[: config.demonstrations + in_encoder]
    if config.family == "qa":
        parts = prompts.qa(record, template, shown, config.passages, axis)
    else:
        if not record.choices:
            raise ValueError(f"record {record.id} has no choices: the icl family compares them, give them")
        parts = prompts.icl(record, template, shown, config.demonstrations)
    before, after = _cut(parts.text, _continuations(record, template), tokenizer)
    return Prompt(before, [tokenizer.encode(context) for context in parts.contexts], parts.scores), after


def _continuations(record: Record, template: Template) -> list[str]:
    return [template.answer.format(answer=choice) for choice in record.choices]


def _cut(prompt: str, continuations: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """BOS and the ids that all wholes of prompt and continuation begin with, and what follows them in each."""
    if not continuations:
        return tokenizer.encode(prompt, bos=True), []
    wholes = [tokenizer.encode(prompt + continuation, bos=True) for continuation in continuations]
    before = os.path.commonprefix([tokenizer.encode(prompt.rstrip(), bos=True), *wholes])
    return before, [whole[len(before) :] for whole in wholes]
