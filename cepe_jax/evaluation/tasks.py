"""Questions that a model answers beside contexts: open-domain QA, in-context learning, long documents, needles."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation import prompts, synthetic
from cepe_jax.evaluation.language_model import LanguageModel, Prompt, generate
from cepe_jax.evaluation.layouts import LAYOUTS, Layout, load, plain
from cepe_jax.evaluation.metrics import METRICS, accuracies
from cepe_jax.evaluation.protocols import Protocol, Words
from cepe_jax.evaluation.records import Demonstration, Record
from cepe_jax.evaluation.selection import Groups, chosen, draw, groups_of
from cepe_jax.inference.overflow import Overflow, begun, fit, fit_continued
from cepe_jax.progress import track

Family = Literal["qa", "icl", "document", "synthetic"]
Cut = Literal["truncate_left", "passages"]
# Of a setting that not all families read, those that do.
READ_BY: dict[str, tuple[Family, ...]] = {
    **dict.fromkeys(("data", "layout"), ("qa", "icl", "document")),
    **dict.fromkeys(("window", "overflow"), ("document", "synthetic")),
    **dict.fromkeys(("kind", "haystack"), ("synthetic",)),
    **dict.fromkeys(("max_new_tokens", "metrics"), ("qa", "document", "synthetic")),
    "demonstrations": ("qa", "icl"),
    "passages": ("qa",),
}


@dataclass(frozen=True)
class TaskConfig:
    """One task. What its axis counts depends on the family.

    qa: further passages for the encoder (0, 5, 10, 20, 50); icl: demonstrations for the encoder (0, 18, 38); document:
    the encoder's tokens (2048, 6144, 14336, 30720); synthetic: tokens of the whole text, with what is generated.
    """

    family: Family  # qa: answers from passages; icl: choices after demonstrations; document, synthetic: one long text
    axis: tuple[int, ...]  # passages (qa), demonstrations (icl), tokens of context (document), of the text (synthetic)
    data: Path | None = None  # records: a file, or a directory with test.jsonl and train.jsonl, for demonstrations
    layout: str | None = None  # of layouts.LAYOUTS, in which the data is published; None: records
    samples: int | None = None  # records for each seed; None: all
    seeds: tuple[int, ...] = (42,)  # draw the records and demonstrations; each gives `samples` results
    demonstrations: int = 2  # demonstrations that the decoder reads (qa, icl)
    passages: int = 10  # passages that the decoder reads (qa)
    window: int = 2048  # tokens that the decoder reads, with what it writes or chooses (document, synthetic)
    overflow: Cut = "truncate_left"  # how what the decoder does not read is cut off, for the encoder
    chunk_length: int = 256  # tokens of a context that the encoder reads at once: it cuts a longer one
    kind: synthetic.Kind = "single"  # what is to be found (synthetic)
    haystack: Path | None = None  # a text file (synthetic); None: sentences made up
    max_new_tokens: int | None = None  # tokens of an answer at most; None: as the family or the layout has it
    metrics: tuple[str, ...] | None = None  # scores of the answers; None: as the family or the layout has it
    template: Words = Words()  # words of the prompt

    def __post_init__(self):
        for name, choices in ("family", Family), ("overflow", Cut), ("kind", synthetic.Kind):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} is {value!r}: choose {', '.join(get_args(choices))}")
        for name, families in READ_BY.items():
            if self.family not in families and getattr(self, name) != getattr(TaskConfig, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!s}, and the {self.family} family does not read it: leave it out"
                )
        if not self.axis or min(self.axis) < 0 or len(set(self.axis)) < len(self.axis):
            raise ValueError(f"axis is {list(self.axis)}: give different numbers, 0 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: give one or more, all different")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout}: choose of {', '.join(LAYOUTS)}")
        if self.layout is not None and self.origin.family != self.family:
            raise ValueError(f"layout {self.layout} is of the {self.origin.family} family: set family to it")
        check_chunk_length(self.chunk_length)
        for name in ("samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give a number above 0")
        for name in ("demonstrations", "passages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.metrics == ():
            raise ValueError("metrics is []: give one or more, or leave it out")
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}: choose of {', '.join(METRICS)}")
        self.template.put_into(self.origin.protocol.template)  # ValueError for words without their place

    @property
    def origin(self) -> Layout:
        return plain(self.family) if self.layout is None else LAYOUTS[self.layout]

    @property
    def protocol(self) -> Protocol:
        """The task's, with what is said here."""
        protocol, names = self.origin.protocol, ("max_new_tokens", "metrics")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(protocol, template=self.template.put_into(protocol.template), **said)


def measure(config: TaskConfig, axis: int, model: LanguageModel) -> Iterator[dict]:
    """A result of each chosen record for each seed, of what `values` needs: id, seed, answers, and what was said.

    `prediction` is what the model wrote; or of each choice `log_probs` (nats, of all its tokens), `lengths` (tokens)
    and, of the icl family, `domain_log_probs`: after the question's words with an empty input, without demonstrations.
    `read` counts the tokens of prompt and contexts, `seconds` is the model's time; `depths` are those of needles.
    """
    if axis not in config.axis:
        raise ValueError(f"{axis} is not on the axis {list(config.axis)}: add it")
    protocol, tokenizer = config.protocol, model.tokenizer
    rounds, groups = _rounds(config, axis, tokenizer)
    of_domain: dict[tuple[str, ...], list[float]] = {}
    for seed, record in track(rounds, f"{config.family}, {axis}"):
        prompt, continuations = _prompt(config, axis, record, groups, seed, tokenizer)
        begun_at = time.monotonic()
        try:
            said = _said(model, record, prompt, continuations, protocol)
        except ValueError as error:
            raise ValueError(f"record {record.id}: {error}") from error
        seconds = time.monotonic() - begun_at
        if config.family == "icl":
            if record.choices not in of_domain:
                _, ids, continuations = _fitted(protocol.template.asked(""), record, config, tokenizer)
                of_domain[record.choices] = [score.total for score in model.score(Prompt(ids), continuations)]
            said["domain_log_probs"] = of_domain[record.choices]
        if record.depths:
            said["depths"] = record.depths
        tokens = len(prompt.ids) + sum(map(len, prompt.contexts))
        known = {"id": f"{seed}:{record.id}", "seed": seed, "answers": record.answers}
        yield {**known, **said, "read": tokens, "seconds": seconds}


def values(config: TaskConfig, record: dict) -> dict[str, float]:
    """Metric -> value of a result of `measure`, which is read alone: other metrics need no other run."""
    if "log_probs" in record:
        right = [choice in record["answers"] for choice in record["choices"]]
        return accuracies(right, record["log_probs"], record["lengths"], record.get("domain_log_probs"))
    return {name: METRICS[name](record["prediction"], record["answers"]) for name in config.protocol.metrics}


def _rounds(config: TaskConfig, axis: int, tokenizer: Tokenizer) -> tuple[list[tuple[int, Record]], Groups]:
    """(seed, record) of all that is asked, and what demonstrations are drawn from for records that have none."""
    if config.family != "synthetic":
        if config.data is None:
            raise ValueError(
                f"the {config.family} family needs data: give a .jsonl file, or a directory with test.jsonl"
            )
        records, shown = load(config.data, config.origin, shows=_most_shown(config) > 0)
        if len({bool(record.choices) for record in records}) > 1:
            raise ValueError(f"{config.data}: some records have choices and some have not: give them apart")
        drawn = [(seed, record) for seed in config.seeds for record in chosen(records, config.samples, seed)]
        return drawn, groups_of(shown)
    if config.samples is None:
        raise ValueError("samples is not given: say how many synthetic texts there are to be for each seed")
    protocol = config.protocol
    sentences = synthetic.sentences_of(config.haystack) if config.haystack else []

    def tokens_of(record: Record) -> int:
        return len(begun("".join(prompts.document(record, protocol.template)), tokenizer)) + protocol.max_new_tokens

    def made(seed: int) -> Iterator[Record]:
        texts = synthetic.records(config.kind, axis, config.samples, seed, sentences, tokens_of)
        return track(texts, f"make {config.kind}, {axis}", config.samples)

    return [(seed, record) for seed in config.seeds for record in made(seed)], []


def _prompt(
    config: TaskConfig, axis: int, record: Record, groups: Groups, seed: int, tokenizer: Tokenizer
) -> tuple[Prompt, list[list[int]]]:
    """What the model is asked, and the ids of each choice after it."""
    template, scores = config.protocol.template, None
    if config.family in ("document", "synthetic"):
        document, asked = prompts.document(record, template)
        contexts, ids, after = _fitted(document + asked, record, config, tokenizer, config.window, config.overflow)
        if contexts and len(ids) - len(tokenizer.begin) < (needed := len(tokenizer.encode(asked))):
            raise ValueError(
                f"record {record.id}: instruction and question have {needed} tokens, and the decoder's window of "
                f"{config.window} leaves {len(ids) - len(tokenizer.begin)} for them: raise window"
            )
        if config.family == "document":
            contexts = _last(contexts, axis)
    else:
        in_encoder = axis if config.family == "icl" else 0
        shown = _shown(config, in_encoder, record, groups, seed)
        if config.family == "qa":
            parts = prompts.qa(record, template, shown, config.passages, axis)
        else:
            parts = prompts.icl(record, template, shown, config.demonstrations)
        _, ids, after = _fitted(parts.text, record, config, tokenizer)
        contexts, scores = [tokenizer.encode(context) for context in parts.contexts], parts.scores
    return Prompt(ids, contexts, scores, config.chunk_length), after


def _said(
    model: LanguageModel, record: Record, prompt: Prompt, continuations: list[list[int]], protocol: Protocol
) -> dict:
    """Of what the model says, what a result of `measure` keeps."""
    if not record.choices:
        (text,) = generate(model, [prompt], protocol.max_new_tokens, protocol.stop)
        return {"prediction": text}
    log_probs = [score.total for score in model.score(prompt, continuations)]
    return {"choices": record.choices, "log_probs": log_probs, "lengths": list(map(len, continuations))}


def _shown(config: TaskConfig, in_encoder: int, record: Record, groups: Groups, seed: int) -> Sequence[Demonstration]:
    """The demonstrations of a prompt, which are the first ones of one with more in the encoder."""
    shown = record.demonstrations or draw(groups, _most_shown(config), record, seed)
    if len(shown) < config.demonstrations + in_encoder:
        raise ValueError(
            f"record {record.id} has {len(shown)} demonstrations, and {config.demonstrations} for the decoder and "
            f"{in_encoder} for the encoder are asked for: ask for fewer"
        )
    return shown[: config.demonstrations + in_encoder]


def _most_shown(config: TaskConfig) -> int:
    """How many demonstrations a record needs for all of the axis."""
    return {"qa": config.demonstrations, "icl": config.demonstrations + max(config.axis)}.get(config.family, 0)


def _fitted(
    text: str,
    record: Record,
    config: TaskConfig,
    tokenizer: Tokenizer,
    window: int | None = None,
    overflow: Overflow = "error",
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """(what moves to the encoder, ids for the decoder, ids of each choice)."""
    template, length = config.protocol.template, config.chunk_length
    if record.choices:
        continuations = [template.answer.format(answer=choice) for choice in record.choices]
        return fit_continued(text, continuations, tokenizer, window, overflow, length)
    return *fit(text, tokenizer, window, config.protocol.max_new_tokens, overflow, length), []


def _last(contexts: list[list[int]], most: int) -> list[list[int]]:
    """The last `most` tokens of them."""
    kept: list[list[int]] = []
    for context in reversed(contexts):
        if most > 0:
            kept.insert(0, context[-most:])
        most -= len(context)
    return kept
