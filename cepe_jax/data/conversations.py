"""Conversations: from lines of JSON to tokens of which the assistant's are targets, and several of them in a window."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, Self, TypedDict

import msgspec
import numpy as np

from cepe_jax.data.builder import ShardWriter, array, text, token_dtype
from cepe_jax.data.corpus import RawConfig, build, count_bad, documents_of, no_counts
from cepe_jax.data.recipes import Recipe, WholeConversations
from cepe_jax.data.records import CONVERSATIONS, Record, Records, shard_path
from cepe_jax.data.sources import Extent
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer, opened_tokenizer
from cepe_jax.data.units import Work, one_job
from cepe_jax.directories import Place
from cepe_jax.parsing import in_words

log = logging.getLogger(__name__)

SPLITS = "train", "test"


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(RawConfig):
    tokenizer: str  # a directory with the model's tokenizer and chat template
    template: str = ""  # a chat template in place of its own: chatqa2, or a file
    context: Literal["encoder", "prompt"] = "encoder"  # where documents go: to the encoder, or into the prompt


class Said(TypedDict):
    role: str
    content: str


class Conversation(TypedDict):
    """A line: the messages, and the texts that the model reads beside them."""

    messages: list[Said]
    documents: NotRequired[list[str]]
    contexts: NotRequired[list[str]]  # another name of documents


def conversation_in(line) -> str:
    """Return a parsed line's conversation as JSON; ValueError says what it lacks."""
    try:
        read = msgspec.convert(line, Conversation)
    except msgspec.ValidationError as error:
        raise ValueError(f"{in_words(str(error))}: give `messages` of role and content, and `documents`") from None
    if "documents" in read and "contexts" in read:
        raise ValueError("documents and contexts: give one of them")
    messages = [{"role": said["role"], "content": said["content"]} for said in read["messages"]]
    documents = read.get("documents", read.get("contexts", []))
    return msgspec.json.encode({"messages": messages, "documents": documents}).decode()


@one_job
def prepare_conversations(config: ConversationConfig) -> None:
    """A dataset of conversations at `config.out`, as the tokenizer's chat template or another one writes them.

    What the template refuses, and conversations without an answer, are left out and counted as bad.
    """
    tokenizer = Tokenizer(config.tokenizer)
    template = Template(tokenizer, config.template)
    build(config, tokenizer, CONVERSATIONS, SPLITS, features_of, ConversationUnit, template)


def features_of(tokenizer: Tokenizer) -> dict:
    """Return the features: `targets` are 1 for tokens that are learnt; documents stand one after another."""
    dtype = token_dtype(tokenizer.vocab_size)
    lists = {"tokens": dtype, "targets": np.uint8, "documents": dtype, "document_lengths": np.int32}
    return {name: array(kind, None) for name, kind in lists.items()} | {"name": text(), "domain": text()}


@dataclass(frozen=True)
class ConversationUnit:
    """The work on a unit: its conversations, tokenised, in a shard of each split."""

    config: ConversationConfig
    num_units: int

    def __call__(self, number: int, unit: list[Extent]) -> Work:
        tokenizer = opened_tokenizer(self.config.out)
        template, features = Template(tokenizer), features_of(tokenizer)
        shards = {
            split: ShardWriter(shard_path(self.config.out, CONVERSATIONS, split, number, self.num_units), features)
            for split in SPLITS
        }
        counts = no_counts()
        for extent in unit:
            for split, name, domain, content in documents_of(self.config, [extent], counts, conversation_in):
                conversation = msgspec.json.decode(content)
                texts = [document for document in conversation["documents"] if document.strip()]
                prompt, read = (texts, []) if self.config.context == "prompt" else ([], texts)
                try:
                    ids, targets = template.with_targets(conversation["messages"], prompt)
                except ValueError as fault:
                    count_bad(f"{at(name)}: {fault}", counts, self.config)
                    continue
                documents = [tokenizer.encode(document) for document in read]
                record = {
                    "tokens": np.asarray(ids, features["tokens"].np_dtype),
                    "targets": np.asarray(targets, np.uint8),
                    "documents": np.concatenate([np.zeros(0), *documents]).astype(features["tokens"].np_dtype),
                    "document_lengths": np.array([len(document) for document in documents], np.int32),
                    "name": name,
                    "domain": domain,
                }
                shards[split].write(record, domain, len(ids))
                yield 0, len(ids)
            yield extent.size, 0
        facts = counts | {"tokenizer": tokenizer.fingerprint()}
        return facts | {"splits": {split: shard.close() for split, shard in shards.items()}}


def at(name: str) -> str:
    """Return the place of a line, by the name that `read` gives it, in words."""
    file, _, byte = name.rpartition(":")
    return f"{file}, at byte {byte}"


def packs(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Return windows of conversations by number: the longest first, each where it leaves least room (best fit).

    One of n tokens takes n - 1 positions: nothing follows its last token. Those that no window holds are in none.
    """
    result: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(window + 1)]  # windows by the positions that are left in them
    rooms = 0  # bit r: some window has r positions left
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        need = lengths[number] - 1
        if not 0 < need <= window:
            continue
        if enough := rooms >> need:
            room = need + (enough & -enough).bit_length() - 1
            place = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            result[place].append(number)
        else:
            room, place = window, len(result)
            result.append([number])
        with_room[room - need].append(place)
        rooms |= 1 << room - need
    return result


class Packs:
    """The conversations of a dataset in windows: a random-access source for Grain.

    Several share a decoder's window. For a CEPE each has a window, and a memory, of its own.
    """

    joined = None

    def __init__(self, path: Place, recipe: Recipe, split: str = "train"):
        """Raise ValueError if the recipe is for sequences, or no conversation fits its window."""
        self.path, self.records = path, Records(path, split)
        if not isinstance(recipe, WholeConversations):
            raise ValueError(f"{path} holds conversations, and this stage reads sequences: train stage sft on it")
        self.size = recipe.size(None)
        tables = [self.records.lengths(shard) for shard in range(len(self.records.facts["shards"]))]
        found = [pair for table in tables for pair in table.values()]
        numbers = np.concatenate([rows for rows, _ in found])
        self._lengths = np.concatenate([lengths for _, lengths in found])[np.argsort(numbers)]
        self._alone = recipe.reads_documents
        self.digest = self.records.digest  # of all that a record holds
        self._pack(np.arange(len(self.records)))
        if not self._packs:
            raise ValueError(f"{path}: no conversation has {self.size + 1} tokens or fewer: raise examples.window")
        total = len(self.records)
        if lost := total - len(self.numbers):
            log.info("%s: %d of %d conversations have more than %d tokens: left out", path, lost, total, self.size)

    def _pack(self, numbers: np.ndarray) -> None:
        """Put those of these conversations that fit into windows; `numbers` are theirs then."""
        lengths = self._lengths[numbers]
        fit = (lengths > 1) & (lengths - 1 <= self.size)
        self.numbers = numbers[fit].tolist()
        windows = [[n] for n in range(len(self.numbers))] if self._alone else packs(lengths[fit].tolist(), self.size)
        self._packs = [[self.numbers[place] for place in window] for window in windows]

    def only(self, numbers: np.ndarray) -> Self:
        """Return these conversations alone, as often as they are named; without those that no window holds."""
        subset = copy.copy(self)
        subset._pack(numbers)
        return subset

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, number: int) -> Record:
        """Return a window's conversations one after another; `lengths` are theirs, and `name` has a line for each."""
        records = [self.records[n] for n in self._packs[int(number)]]
        joined = {key: np.concatenate([record[key] for record in records]) for key in ARRAYS}
        joined["lengths"] = np.array([len(record["tokens"]) for record in records])
        return joined | {"name": "\n".join(record["name"] for record in records), "domain": records[0]["domain"]}


ARRAYS = "tokens", "targets", "documents", "document_lengths"
