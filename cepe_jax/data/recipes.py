"""Recipes: the kinds of example that stages make of the records of sequences.

A recipe is called as `recipe(record, rng, mixture)`. It can be sent to other processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cepe_jax.data.examples import (
    REFERENCE,
    RETRIEVED,
    TEACHER,
    Example,
    ExampleConfig,
    chunks_before,
    chunks_of,
    conversations,
    duplicate,
    mask_chunks,
    masked_lm,
    pair,
    previous_document,
    retrieved,
    taught,
    window_at,
)
from cepe_jax.data.records import Record, Records
from cepe_jax.data.sampling import documents_in


class RecordSource(Protocol):
    """Records by number, such as `loader.Sequences`."""

    records: Records
    size: int  # tokens of a record's `tokens`, of which the document may have one more

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record: ...


class Mixture:
    """The sources that a run draws its records from, as far as a recipe may ask for more than its record."""

    def __init__(self, sources: Sequence[RecordSource]):
        tokenizer = sources[0].records.tokenizer
        self.special_ids, self.mask_id = (tokenizer.bos_id, tokenizer.eos_id), tokenizer.mask_id
        self._sources = sources

    def of_other_documents(self, record: Record, size: int, rng: np.random.Generator) -> Record:
        """Return a record of `size` tokens that shares no document with this one: its tokens could hold the window."""
        sources = [source for source in self._sources if source.size == size]
        own = documents_in(record["name"])
        for _ in range(100):
            source = sources[rng.integers(len(sources))]
            other = source[rng.integers(len(source))]
            if not own & documents_in(other["name"]):
                return other
        raise ValueError("foreign_rate needs sequences of several documents: in 100 draws all were of the same")


class Recipe(Protocol):
    """The kind of example of a stage."""

    def size(self, joined: Records | None) -> int:
        """Return how many tokens of a sequence an example takes; ValueError if it cannot use what is joined to it."""
        ...

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example: ...


@dataclass(frozen=True)
class Windows:
    """Windows whose labels are the next tokens."""

    config: ExampleConfig

    def size(self, joined: Records | None) -> int:
        _refuse(joined)
        return self.config.window

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        return window_at(record["tokens"], 0, self.config.window)


@dataclass(frozen=True)
class MaskedWindows(Windows):
    """Windows some of whose tokens are masked, and are the labels."""

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        tokens = record["tokens"][: self.config.window]
        return masked_lm(tokens, mixture.special_ids, mixture.mask_id, self.config.mlm_rate, rng)


@dataclass(frozen=True)
class DuplicatedWindows(Windows):
    """Windows that are their own contexts, as in the paper's warm-up."""

    def __post_init__(self):
        config = self.config
        if config.window != config.num_chunks * config.chunk_length:
            raise ValueError(
                f"the warm-up's window of {config.window} is not its {config.num_chunks} chunks x {config.chunk_length}"
            )

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        return duplicate(record["tokens"], 0, self.config)


@dataclass(frozen=True)
class WindowsInContext:
    """Windows after the tokens before them (paper, section 3.2), or with the passages retrieved for them."""

    config: ExampleConfig

    def size(self, joined: Records | None) -> int:
        if joined is not None and joined.name == RETRIEVED:
            check_passages(joined, self.config)
            return self.config.window
        _refuse(joined)
        return self.config.span

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        config = self.config
        if "passages" in record:
            return mask_chunks(retrieved(record, config), config, rng)
        start = config.span - config.window
        example = previous_document(record["tokens"], start, config)
        if rng.random() < config.foreign_rate:
            other = mixture.of_other_documents(record, config.span, rng)
            example |= chunks_before(other["tokens"], start, config.num_chunks, config.chunk_length)
        return mask_chunks(example, config, rng)


@dataclass(frozen=True)
class TaughtWindows:
    """Windows after the tokens before them, with a teacher's probabilities if the data have any (CEPED)."""

    config: ExampleConfig

    def __post_init__(self):
        if self.config.foreign_rate:
            raise ValueError("foreign_rate is not for stage ceped: its teacher reads what stands before the window")

    def size(self, joined: Records | None) -> int:
        if joined is not None and joined.name == TEACHER:
            check_teacher_read(joined, self.config)
        else:
            _refuse(joined)
        return self.config.span

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        example = WindowsInContext(self.config)(record, rng, mixture)
        return example | taught(record, self.config) if "teacher_prob" in record else example


@dataclass(frozen=True)
class WholeConversations:
    """Conversations of which the assistant's tokens are labels, with their documents as contexts for a CEPE.

    Several conversations of a window are segments of it. Of sequences without targets all tokens are labels, and their
    contexts are masked.
    """

    config: ExampleConfig
    reads_documents: bool

    def size(self, joined: Records | None) -> int:
        _refuse(joined)
        return self.config.window

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        tokens = record["tokens"]
        targets = record.get("targets", np.ones(len(tokens), np.uint8))
        example = conversations(tokens, targets, record.get("lengths", [len(tokens)]), self.config.window)
        if self.reads_documents:
            example |= chunks_of(record.get("documents", tokens[:0]), record.get("document_lengths", []), self.config)
        elif len(record.get("document_lengths", [])):
            raise ValueError(
                f"{record['name'].splitlines()[0]} has documents, which an encoder reads: train a CEPE, or write them "
                f"into the messages"
            )
        return example


@dataclass(frozen=True)
class PairsOfAnswers:
    """Two texts with the same question, the better one first, and their context if a CEPE reads it by its encoder."""

    config: ExampleConfig
    reads_documents: bool

    def size(self, joined: Records | None) -> int:
        if joined is not None and joined.name == REFERENCE:
            check_reference_read(joined, self)
        else:
            _refuse(joined)
        return self.config.window

    def __call__(self, record: Record, rng: np.random.Generator, mixture: Mixture) -> Example:
        nothing = np.zeros(0, np.int32)
        texts = [(record.get(key, nothing), record.get(f"{key}_targets", nothing)) for key in ("chosen", "rejected")]
        example = pair(texts, self.config.window)
        documents, lengths = (record.get(key, nothing) for key in ("documents", "document_lengths"))
        if self.reads_documents:
            example |= chunks_of(documents, lengths, self.config)
        elif len(lengths):
            raise ValueError(f"{record['name']} has a context for an encoder: train a CEPE, or give --context=prompt")
        return example | ({"reference": record["reference"]} if "reference" in record else {})


def _refuse(joined: Records | None) -> None:
    if joined is not None:
        raise ValueError(
            f"{joined.path} holds {joined.name} for the sequences of {joined.path / joined.index['joins']['path']}, "
            f"and this stage reads none: give those sequences"
        )


def check_passages(joined: Records, config: ExampleConfig) -> None:
    """Raise ValueError if a window would have no label, or a chunk no room for a passage."""
    if (query := joined.fact("query_tokens")) > config.window:
        raise ValueError(
            f"{joined.path}: its passages were retrieved for {query} tokens, whose labels are "
            f"ignored, and the window has {config.window}: retrieve with fewer --query_tokens"
        )
    if (length := joined.fact("passage_length")) > config.chunk_length:
        raise ValueError(
            f"{joined.path}: its passages have {length} tokens, chunk_length is {config.chunk_length}: raise it"
        )


def check_reference_read(joined: Records, recipe: PairsOfAnswers) -> None:
    """Raise ValueError if the reference read the contexts in other chunks, or shorter texts alone."""
    chunks = [recipe.config.num_chunks, recipe.config.chunk_length] if recipe.reads_documents else []
    if (read := joined.fact("chunks")) != chunks:
        raise ValueError(f"{joined.path}: its reference read chunks of {read}, here they are {chunks}: change one")
    if (most := joined.fact("window")) < recipe.config.window:
        raise ValueError(
            f"{joined.path}: its reference read texts of {most} tokens at most: lower examples.window to it"
        )


def check_teacher_read(joined: Records, config: ExampleConfig) -> None:
    """Raise ValueError if the teacher read other tokens than an example has, or was asked about others."""
    for name, size in ("window", config.window), ("context", config.span - config.window):
        if (read := joined.fact(name)) != size:
            raise ValueError(f"{joined.path}: its teacher's {name} has {read} tokens, here it has {size}: change one")


class _NoMixture(Mixture):
    def __init__(self):
        self.special_ids, self.mask_id = (), 0


def blank(recipe: Recipe) -> Example:
    """Return an example with nothing in it: the names, shapes and dtypes of its arrays."""
    if recipe.config.foreign_rate:
        recipe = replace(recipe, config=replace(recipe.config, foreign_rate=0.0))
    record = {"name": "", "domain": "", "tokens": np.zeros(recipe.size(None) + 1, np.int32)}
    return recipe(record, np.random.default_rng(0), _NoMixture())
