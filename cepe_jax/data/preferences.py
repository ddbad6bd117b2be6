"""Pairs of answers of which one is preferred, under a context: from lines of JSON to tokens (arXiv 2407.14916)."""

import copy
import logging
from dataclasses import dataclass
from typing import Literal, NotRequired, Self, TypedDict

import msgspec
import numpy as np

from cepe_jax.data.builder import ShardWriter, array, text, token_dtype
from cepe_jax.data.conversations import Said, at
from cepe_jax.data.corpus import RawConfig, build, count_bad, documents_of, no_counts
from cepe_jax.data.recipes import PairsOfAnswers, Recipe
from cepe_jax.data.records import PREFERENCES, Record, open_joined, shard_path
from cepe_jax.data.sources import Extent
from cepe_jax.data.template import Message, Template
from cepe_jax.data.tokenizer import Tokenizer, opened_tokenizer
from cepe_jax.data.units import Work, one_job
from cepe_jax.directories import Place
from cepe_jax.parsing import in_words

log = logging.getLogger(__name__)

SPLITS = "train", "test"
Route = Literal["prompt", "encoder", "none"]
IN_PROMPT = "{prompt}\n\nThe answer is judged by this: {context}"
NEGATED = "the opposite of this: {context}"  # a context under which the worse answer is the better one


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(RawConfig):
    tokenizer: str  # a directory with the model's tokenizer and chat template
    context: Route = "prompt"  # where a pair's context goes: into the prompt, to the encoder, or nowhere (none)
    rpr: Literal["criteria", "scenario"] = "criteria"  # what is the context, in lines of RPR's layout


class Pair(TypedDict):
    """Two answers to a question, the better one first."""

    messages: list[Said]  # up to the user's turn that is answered
    chosen: str
    rejected: str
    context: str  # what the answers are judged by; "" = nothing is said
    category: str


class _Line(TypedDict):
    chosen: str
    rejected: str
    prompt: NotRequired[str]
    messages: NotRequired[list[Said]]
    context: NotRequired[str]
    category: NotRequired[str]


class _Rpr(TypedDict):
    """A row of RPR (microsoft/rpr): under x the first answer is better, under y the second."""

    prompt: str
    response_a: str
    response_b: str
    criteria_x: NotRequired[str]
    criteria_y: NotRequired[str]
    scenario_x: NotRequired[str]
    scenario_y: NotRequired[str]
    category_x: NotRequired[str]
    category_y: NotRequired[str]


def pairs_in(line, rpr: str = "criteria") -> list[Pair]:
    """Return the pairs of a parsed line, two of a row of RPR's; ValueError says what is wrong with it."""
    is_rpr = isinstance(line, dict) and "response_a" in line
    try:
        read = msgspec.convert(line, _Rpr if is_rpr else _Line)
    except msgspec.ValidationError as error:
        wanted = "prompt, response_a, response_b, criteria" if is_rpr else "prompt or messages, chosen and rejected"
        raise ValueError(f"{in_words(str(error))}: give {wanted}") from None
    if not is_rpr:
        if ("prompt" in read) == ("messages" in read):
            raise ValueError("give one of prompt and messages")
        messages = read["messages"] if "messages" in read else [{"role": "user", "content": read["prompt"]}]
        if not messages:
            raise ValueError("messages is empty: give the turns up to the question")
        pairs = [Pair(messages=messages, context="", category="") | {k: read[k] for k in _KEPT if k in read}]
    else:
        missing = [name for side in "xy" if not read.get(name := f"{rpr}_{side}")]
        if missing:
            raise ValueError(f"no {' and no '.join(missing)}: give both, or another --rpr")
        messages, a, b = [{"role": "user", "content": read["prompt"]}], read["response_a"], read["response_b"]
        pairs = [
            Pair(messages=messages, chosen=chosen, rejected=rejected, context=read[f"{rpr}_{side}"],
                 category=read.get(f"category_{side}", ""))
            for side, chosen, rejected in (("x", a, b), ("y", b, a))
        ]  # fmt: skip
    for pair in pairs:
        if pair["chosen"] == pair["rejected"]:
            raise ValueError("the two answers are equal: there is nothing to prefer")
    return pairs


_KEPT = "chosen", "rejected", "context", "category"


def texts_of(pair: Pair, route: Route) -> tuple[list[Message], list[str]]:
    """Return a pair's messages before the answer, and its documents, with its context where `route` says."""
    messages, context = [dict(message) for message in pair["messages"]], pair["context"].strip()
    if context and route == "prompt":
        asked = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=None)
        if asked is None:
            raise ValueError("no user's turn that could hold the context")
        messages[asked]["content"] = IN_PROMPT.format(prompt=messages[asked]["content"], context=context)
    return messages, [context] if context and route == "encoder" else []


@one_job
def prepare_preferences(config: PreferenceConfig) -> None:
    """A dataset of pairs at `config.out`, as the chat template beside the tokenizer writes them."""
    tokenizer = Tokenizer(config.tokenizer)
    build(config, tokenizer, PREFERENCES, SPLITS, features_of, PreferenceUnit, Template(tokenizer))


def features_of(tokenizer: Tokenizer) -> dict:
    """Return the features: both texts from the first message on, and 1 in `*_targets` for tokens of the answer."""
    dtype = token_dtype(tokenizer.vocab_size)
    lists = {"documents": dtype, "document_lengths": np.int32}
    for answer in ("chosen", "rejected"):
        lists |= {answer: dtype, f"{answer}_targets": np.uint8}
    return {name: array(kind, None) for name, kind in lists.items()} | {"name": text(), "domain": text()}


@dataclass(frozen=True)
class PreferenceUnit:
    """The work on a unit: its pairs, tokenised, in a shard of each split; both pairs of a row are in one split."""

    config: PreferenceConfig
    num_units: int

    def __call__(self, number: int, unit: list[Extent]) -> Work:
        tokenizer = opened_tokenizer(self.config.out)
        template, features = Template(tokenizer), features_of(tokenizer)
        shards = {
            split: ShardWriter(shard_path(self.config.out, PREFERENCES, split, number, self.num_units), features)
            for split in SPLITS
        }
        counts = no_counts()

        def content(line) -> str:
            return msgspec.json.encode(pairs_in(line, self.config.rpr)).decode()

        for extent in unit:
            for split, name, domain, pairs in documents_of(self.config, [extent], counts, content):
                try:
                    own_pairs = msgspec.json.decode(pairs)
                    records = [encoded(pair, self.config.context, template) for pair in own_pairs]
                except ValueError as fault:
                    count_bad(f"{at(name)}: {fault}", counts, self.config)
                    continue
                for pair, record in zip(own_pairs, records, strict=True):
                    longest = max(len(record["chosen"]), len(record["rejected"]))
                    typed = {key: np.asarray(value, features[key].np_dtype) for key, value in record.items()}
                    own = pair["category"] or domain
                    shards[split].write(typed | {"name": name, "domain": own}, own, longest)
                    yield 0, longest
            yield extent.size, 0
        facts = counts | {"tokenizer": tokenizer.fingerprint()}
        return facts | {"splits": {split: shard.close() for split, shard in shards.items()}}


def encoded(pair: Pair, route: Route, template: Template) -> dict[str, list[int]]:
    """Return the arrays of a pair's record; ValueError if the template refuses one of its texts."""
    messages, documents = texts_of(pair, route)
    record, asks_again = {}, any(message["role"] == "assistant" for message in messages)
    for answer in ("chosen", "rejected"):
        said = [*messages, {"role": "assistant", "content": pair[answer]}]
        ids, targets = template.with_targets(said)
        record[answer], record[f"{answer}_targets"] = ids, last_run(targets) if asks_again else targets
    tokens = [template.tokenizer.encode(document) for document in documents]
    record["documents"] = [token for document in tokens for token in document]
    record["document_lengths"] = [len(document) for document in tokens]
    return record


def last_run(targets: list[bool]) -> list[bool]:
    """Return the targets of the last turn alone: earlier ones are part of the question."""
    last = len(targets) - targets[::-1].index(True)
    first = max((n + 1 for n in range(last) if not targets[n]), default=0)
    return [first <= n < last for n in range(len(targets))]


class Pairs:
    """The pairs of a dataset: a random-access source for Grain. Those with a text that no window holds are left out."""

    def __init__(self, path: Place, recipe: Recipe, split: str = "train"):
        """Raise ValueError if the recipe is for other records, or no pair fits its window."""
        self.path, (self.records, self.joined) = path, open_joined(path, split)
        if not isinstance(recipe, PairsOfAnswers):
            raise ValueError(
                f"{path} holds {PREFERENCES}, which this stage does not read: train stage reward or dpo on it"
            )
        self.size = recipe.size(self.joined)
        tables = [self.records.lengths(shard) for shard in range(len(self.records.facts["shards"]))]
        fit = [rows[lengths <= self.size] for table in tables for rows, lengths in table.values()]
        self.numbers = np.sort(np.concatenate(fit))  # of the pairs, in the order of the examples
        self.digest = self.records.digest + (self.joined.digest if self.joined else "")  # of all that a record holds
        if not len(self.numbers):
            raise ValueError(f"{path}: no pair has texts of {self.size} tokens or fewer: raise examples.window")
        if lost := len(self.records) - len(self.numbers):
            log.info("%s: %d of %d pairs do not fit %d tokens: left out", path, lost, len(self.records), self.size)

    def only(self, numbers: np.ndarray) -> Self:
        """Return these pairs alone, as often as they are named; without those that no window holds."""
        subset = copy.copy(self)
        subset.numbers = numbers[np.isin(numbers, self.numbers)]
        return subset

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Record:
        number = int(self.numbers[int(number)])
        return self.records[number] | (self.joined[number] if self.joined else {})
