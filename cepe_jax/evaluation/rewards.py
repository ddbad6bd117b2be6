"""Reward models measured on pairs of answers (arXiv 2407.14916): with and without context, and contexts inferred.

Pairs of one line, such as both of a row of RPR, are dependent; a tie counts half.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cepe_jax.config import Dtype
from cepe_jax.data.preferences import NEGATED, Pair, Route, pairs_in
from cepe_jax.data.sources import plan, read
from cepe_jax.devices import Devices, on_devices
from cepe_jax.directories import one_writer_in, write_json, write_text
from cepe_jax.evaluation.sweep.estimates import Estimate
from cepe_jax.identity import as_json
from cepe_jax.inference.rewards import RewardModel, load_reward
from cepe_jax.inference.text import CHUNK_LENGTH
from cepe_jax.parsing import Seed

log = logging.getLogger(__name__)

NONSENSE = ("it was written on a Tuesday", "the reader owns a bicycle", "it rained in the morning", "seven is odd")


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    model: Path  # a reward model, in any format
    data: Path  # a directory of .jsonl files of pairs, in our layout or RPR's
    out: Path  # gets rewards.json and report.md
    patterns: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")  # files below `data`
    rpr: Literal["criteria", "scenario"] = "criteria"  # what is the context, in lines of RPR's layout
    context: Route | None = None  # where contexts go; None: to the encoder, or of a model without one into the prompt
    samples: int = 1000  # lines that are drawn at most
    labelled: tuple[int, ...] = ()  # numbers of labelled pairs from which a context is inferred; []: none is inferred
    candidates: int = 16  # contexts among which it is inferred, the most frequent ones
    batch_size: int = 16  # texts at once
    chunk_length: int = CHUNK_LENGTH  # tokens of a chunk that the encoder reads
    dtype: Dtype = "float32"  # type of weights and activations
    mesh: Devices = Devices()  # how devices share the model
    seed: Seed = 0  # draws lines, nonsense and labelled pairs

    def __post_init__(self):
        for name in ("samples", "candidates", "batch_size", "chunk_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if any(count < 1 for count in self.labelled):
            raise ValueError(f"labelled is {list(self.labelled)}: give numbers above 0")


@dataclass(frozen=True)
class Judged:
    """A pair, and the line that it is of."""

    pair: Pair
    line: str


def read_pairs(config: RewardsConfig) -> list[Judged]:
    """Return the pairs of lines that are drawn; ValueError names the first bad line."""
    lines = []
    for unit in plan(config.data, config.patterns, (), 1 << 40):
        for extent in unit:
            for document in read(config.data, extent, "", lambda line: json.dumps(pairs_in(line, config.rpr))):
                if document.fault:
                    raise ValueError(document.fault)
                lines.append((document.name, json.loads(document.text)))
    rng = np.random.default_rng(config.seed)
    chosen = sorted(rng.permutation(len(lines))[: config.samples])
    return [Judged(pair, lines[n][0]) for n in chosen for pair in lines[n][1]]


def margins(model: RewardModel, pairs: Sequence[Pair], contexts: Sequence[str], **how) -> np.ndarray:
    """Return r(chosen) - r(rejected) of each pair under these contexts, in fp64."""
    texts = [
        [*pair["messages"], {"role": "assistant", "content": pair[answer]}]
        for pair in pairs
        for answer in ("chosen", "rejected")
    ]
    both = model.scores(texts, [context for context in contexts for _ in range(2)], **how).astype(np.float64)
    return both[::2] - both[1::2]


def right(margins: np.ndarray) -> np.ndarray:
    """Return 1 for each pair whose better answer has the higher score, 0.5 for a tie."""
    return np.where(margins == 0, 0.5, margins > 0)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def posterior(margins_ZN: np.ndarray, prior_Z: np.ndarray) -> np.ndarray:
    """Return p(z | N labelled pairs): the prior times the Bradley-Terry likelihood of each label."""
    logs_Z = np.log(prior_Z) + log_sigmoid(margins_ZN).sum(axis=1)
    weights_Z = np.exp(logs_Z - logs_Z.max())
    return weights_Z / weights_Z.sum()


def preference(margins_ZN: np.ndarray, weights_Z: np.ndarray) -> np.ndarray:
    """Return p(chosen is better), the mean over contexts of these weights: a posterior, or the profile of a user."""
    return weights_Z @ np.exp(log_sigmoid(margins_ZN))


def infer(
    margins_of: Callable[[Sequence[Pair], Sequence[str]], np.ndarray], judged: Sequence[Judged], config: RewardsConfig
) -> dict[str, Estimate]:
    """Return the accuracy on other pairs of a context that is inferred from labelled ones, by their number.

    Beside it that with the context known (`known`). The labelled pairs of a context are drawn, and judge all others.
    """
    by_context: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        by_context[one.pair["context"]].append(one)
    contexts = sorted(by_context, key=lambda context: (-len(by_context[context]), context))[: config.candidates]
    most, rng = max(config.labelled), np.random.default_rng(config.seed)
    hits: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[str]] = defaultdict(list)
    used = [context for context in contexts if len(by_context[context]) > most]
    if not used:
        raise ValueError(f"no context has more than {most} pairs: lower labelled, or raise samples")
    for context in used:
        own = [by_context[context][n] for n in rng.permutation(len(by_context[context]))]
        pairs = [one.pair for one in own for _ in contexts]
        margins_ZN = margins_of(pairs, contexts * len(own)).reshape(len(own), len(contexts)).T
        tests, known = slice(most, None), contexts.index(context)
        for count in config.labelled:
            weights_Z = posterior(margins_ZN[:, :count], np.full(len(contexts), 1 / len(contexts)))
            chosen = preference(margins_ZN[:, tests], weights_Z)
            hits[str(count)] += right(chosen - 0.5).tolist()
        hits["known"] += right(margins_ZN[known, tests]).tolist()
        for name in (*map(str, config.labelled), "known"):
            groups[name] += [context] * (len(own) - most)
    return {name: Estimate.of(values, groups[name]) for name, values in hits.items()}


def evaluate_rewards(config: RewardsConfig) -> None:
    """Write accuracies of a reward model to `config.out`, and print the report."""
    judged = read_pairs(config)
    rng = np.random.default_rng(config.seed)
    judged_by = [one for one in judged if one.pair["context"]]
    contexts = [one.pair["context"] for one in judged_by]
    nonsense = [NONSENSE[n] for n in rng.integers(0, len(NONSENSE), len(contexts))]
    variants = {  # the pairs, their contexts, and -1 where the worse answer is right
        "its context": (judged_by, contexts, 1),
        "no context": (judged, [""] * len(judged), 1),
        "negated, the worse answer right": (judged_by, [NEGATED.format(context=context) for context in contexts], -1),
        "nonsense": (judged_by, nonsense, 1),
    }
    how = {"batch_size": config.batch_size, "chunk_length": config.chunk_length}
    with one_writer_in(config.out), on_devices(config.mesh):
        model = load_reward(config.model, config.dtype, route=config.context)
        hits = {
            name: right(sign * margins(model, [one.pair for one in pairs], given, **how))
            for name, (pairs, given, sign) in variants.items()
            if pairs
        }
        found = {name: Estimate.of(values, [one.line for one in variants[name][0]]) for name, values in hits.items()}
        of_category: dict[str, list[int]] = defaultdict(list)
        first = next(iter(hits))
        for n, one in enumerate(variants[first][0]):
            of_category[one.pair["category"]].append(n)
        by_category = {
            category: Estimate.of(hits[first][chosen], [variants[first][0][n].line for n in chosen])
            for category, chosen in sorted(of_category.items())
            if category
        }
        inferred = {}
        if config.labelled:
            inferred = infer(lambda pairs, given: margins(model, pairs, given, **how), judged_by, config)
        result = {"accuracy": found, "categories": by_category, "inferred": inferred}
        stored = {name: {key: vars(one) for key, one in part.items()} for name, part in result.items()}
        write_json(config.out / "rewards.json", {"config": as_json(config)} | stored)
        text = report(result)
        write_text(config.out / "report.md", text)
    print(text)


def report(result: dict[str, dict[str, Estimate]]) -> str:
    """Return the tables for people."""
    titles = {
        "accuracy": ("Accuracy", "context"),
        "categories": ("By category, each pair with its context if it has one", "category"),
        "inferred": ("Other pairs of a context that is inferred from labelled ones", "labelled pairs"),
    }
    parts = [
        "# Rewards\n\nPairs whose better answer has the higher score, in percent; a tie counts half. ± is the "
        "standard error, which takes pairs of one line for dependent, and of the last table those of one context."
    ]
    for name, (title, what) in titles.items():
        if rows := result[name]:
            lines = [f"## {title}", "", f"| {what} | pairs | accuracy |", "|---|---|---|"]
            for key, one in rows.items():
                error = "" if one.stderr is None else f" ± {100 * one.stderr:.1f}"
                lines.append(f"| {key} | {one.records:,} | {100 * one.mean:.1f}{error} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
