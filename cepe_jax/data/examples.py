"""Examples from sequences of tokens: pure functions of a record and a random generator.

No function reads past the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

IGNORE = -100  # a label that is no target
PAD = 0  # fills what the masks leave out
RETRIEVED, TEACHER = "retrieved", "teacher"  # the names of datasets of passages, and of a teacher's probabilities
REFERENCE = "reference"  # the name of a dataset of a reference's log-probabilities


class Context(TypedDict):
    """The chunks that the encoder reads. In a batch all arrays have an axis of rows before those given here."""

    context: np.ndarray  # (C, L)
    context_mask: np.ndarray  # (C, L), true for real tokens


class Taught(TypedDict):
    """A teacher's expectations for the window's last n positions."""

    teacher_index: np.ndarray  # (n, K): its likeliest next tokens
    teacher_prob: np.ndarray  # (n, K + 1): their probabilities, and the rest's mass


class Example(TypedDict):
    """A window, and what else the stage reads. A stage of one's own may have further arrays."""

    tokens: np.ndarray  # (T)
    labels: np.ndarray  # (T): labels[t] is what follows tokens[t], or IGNORE
    token_mask: NotRequired[np.ndarray]  # (T), true for real tokens
    segments: NotRequired[np.ndarray]  # (T): the number of each token's text in the window, from 1; 0 = no text
    context: NotRequired[np.ndarray]
    context_mask: NotRequired[np.ndarray]
    teacher_index: NotRequired[np.ndarray]
    teacher_prob: NotRequired[np.ndarray]
    reference: NotRequired[np.ndarray]  # (2): the reference's log-probabilities of a pair's answers


@dataclass(frozen=True)
class Document:
    name: str
    tokens: np.ndarray  # integers, BOS first and EOS last
    domain: str = ""


@dataclass(frozen=True)
class ExampleConfig:
    """Sizes in tokens, and the rates of the paper's recipe."""

    window: int = 4096  # T, tokens that the decoder reads
    num_chunks: int = 16  # C, chunks of context for the encoder
    chunk_length: int = 256  # L, tokens of a chunk
    foreign_rate: float = 0.0  # share of windows with another sequence's context, to learn to ignore it
    chunk_mask_rate: float = 0.3  # share of chunks that are masked in part or whole
    whole_chunk_rate: float = 0.1  # share of these that are masked whole; of the others a random suffix is
    mlm_rate: float = 0.3  # share of tokens that are masked in stage mlm

    @property
    def span(self) -> int:
        """Tokens of a window and the context before it."""
        return self.num_chunks * self.chunk_length + self.window

    def __post_init__(self):
        for name in ("window", "num_chunks", "chunk_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("foreign_rate", "chunk_mask_rate", "whole_chunk_rate", "mlm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")


def window_at(tokens: np.ndarray, start: int, length: int) -> Example:
    """The window tokens[start : start + length] and its labels, the last of which is the token after the window."""
    ahead = np.asarray(tokens[start : start + length + 1], np.int32)
    if len(ahead) < length:
        raise ValueError(f"a window of {length} tokens at {start} does not fit a document of {len(tokens)}")
    labels = np.full(length, IGNORE, np.int32)
    labels[: len(ahead) - 1] = ahead[1:]
    return {"tokens": ahead[:length], "labels": labels}


def chunks_before(tokens: np.ndarray, end: int, num_chunks: int, chunk_length: int) -> Context:
    """The num_chunks * chunk_length tokens that end before `end`; what lies before the document is masked."""
    start = end - num_chunks * chunk_length
    missing = max(-start, 0)
    context = np.full(num_chunks * chunk_length, PAD, np.int32)
    context[missing:] = tokens[max(start, 0) : end]
    real = np.arange(len(context)) >= missing
    shape = num_chunks, chunk_length
    return {"context": context.reshape(shape), "context_mask": real.reshape(shape)}


def previous_document(tokens: np.ndarray, start: int, config: ExampleConfig) -> Example:
    """A window and the context before it (paper, section 3.2: the first m of m + n tokens go to the encoder)."""
    window = window_at(tokens, start, config.window)
    return window | chunks_before(tokens, start, config.num_chunks, config.chunk_length)


def duplicate(tokens: np.ndarray, start: int, config: ExampleConfig) -> Example:
    """A window, and as its context the same tokens: the encoder reads what the decoder reads."""
    window = window_at(tokens, start, config.window)
    return window | chunks_before(tokens, start + config.window, config.num_chunks, config.chunk_length)


def retrieved(record: dict, config: ExampleConfig) -> Example:
    """A window, and as its context the passages that were retrieved for the window's first `query_tokens` tokens.

    The record has `passages` (n, P) and `lengths` (n). A chunk is a passage; a missing one is masked. Labels inside the
    query are ignored: the passages were chosen by these tokens.
    """
    context = np.full((config.num_chunks, config.chunk_length), PAD, np.int32)
    real = np.zeros(context.shape, bool)
    passages = zip(record["passages"][: config.num_chunks], record["lengths"], strict=False)
    for row, (passage, length) in enumerate(passages):
        if length > config.chunk_length:
            raise ValueError(f"a retrieved passage has {length} tokens, chunk_length is {config.chunk_length}")
        context[row, :length] = passage[:length]
        real[row, :length] = True
    window = window_at(record["tokens"], 0, config.window)
    window["labels"][: int(record["query_tokens"]) - 1] = IGNORE  # label t is token t + 1
    return window | {"context": context, "context_mask": real}


def conversations(tokens: np.ndarray, targets: np.ndarray, lengths: Sequence[int], window: int) -> Example:
    """Return a window of texts of these lengths, one after another; labels are the next tokens that are targets.

    A text's last token is followed by nothing, and left out.
    """
    filled = {"tokens": np.full(window, PAD, np.int32), "labels": np.full(window, IGNORE, np.int32)}
    filled["segments"] = np.zeros(window, np.int32)
    start = place = 0
    for number, length in enumerate(lengths, start=1):
        own, learnt = (x[start : start + length].astype(np.int32) for x in (tokens, targets))
        positions = slice(place, place + length - 1)
        filled["tokens"][positions], filled["segments"][positions] = own[:-1], number
        filled["labels"][positions] = np.where(learnt[1:], own[1:], IGNORE)
        start, place = start + length, place + length - 1
    return filled


def pair(texts: Sequence[tuple[np.ndarray, np.ndarray]], window: int) -> Example:
    """Return `tokens`, `labels` and `token_mask` of two texts (2, T); labels are the next tokens that are targets."""
    shape = len(texts), window
    tokens, labels, real = np.full(shape, PAD, np.int32), np.full(shape, IGNORE, np.int32), np.zeros(shape, bool)
    for row, (own, targets) in enumerate(texts):
        tokens[row, : len(own)], real[row, : len(own)] = own, True
        labels[row, : max(len(own) - 1, 0)] = np.where(targets[1:], own[1:].astype(np.int32), IGNORE)
    return {"tokens": tokens, "labels": labels, "token_mask": real}


def chunks_of(tokens: np.ndarray, lengths: Sequence[int], config: ExampleConfig) -> Context:
    """Return the chunks of texts of these lengths, each text from a chunk of its own on; later ones have no room.

    The last chunk stands next to the window: what is left at the front is masked.
    """
    pieces, start = [], 0
    for length in lengths:
        own = tokens[start : start + length]
        pieces += [own[at : at + config.chunk_length] for at in range(0, length, config.chunk_length)]
        start += length
    context = np.full((config.num_chunks, config.chunk_length), PAD, np.int32)
    real = np.zeros(context.shape, bool)
    pieces = pieces[: config.num_chunks]
    for row, piece in enumerate(pieces, start=config.num_chunks - len(pieces)):
        context[row, : len(piece)], real[row, : len(piece)] = piece, True
    return {"context": context, "context_mask": real}


def taught(record: dict, config: ExampleConfig) -> Taught:
    """`teacher_index` (n, K) and `teacher_prob` (n, K + 1), fp16, for the window's last n positions."""
    index, prob = record["teacher_index"], record["teacher_prob"]
    if len(index) != len(prob) or len(index) > config.window or prob.shape[-1] != index.shape[-1] + 1:
        raise ValueError(
            f"teacher_index {list(index.shape)} and teacher_prob {list(prob.shape)} are not (n, K) and (n, K + 1) "
            f"with n at most the window's {config.window}: make the teacher's dataset again"
        )
    return {"teacher_index": np.asarray(index, np.int32), "teacher_prob": prob}


def mask_chunks(example: Example, config: ExampleConfig, rng: np.random.Generator) -> Example:
    """The example with part of its context masked: a share of the chunks lose a random suffix or everything."""
    num_chunks, length = example["context_mask"].shape
    keep = np.where(rng.random(num_chunks) < config.whole_chunk_rate, 0, rng.integers(1, max(length, 2), num_chunks))
    keep = np.where(rng.random(num_chunks) < config.chunk_mask_rate, keep, length)
    return example | {"context_mask": example["context_mask"] & (np.arange(length) < keep[:, None])}


def masked_lm(tokens: np.ndarray, special: tuple[int, ...], mask_id: int, rate: float, rng) -> Example:
    """`tokens` with a share replaced by the mask id, always by it, and these as labels; special tokens stay."""
    tokens = np.asarray(tokens, np.int32)  # stored ones are unsigned, and IGNORE is not
    chosen = (rng.random(len(tokens)) < rate) & ~np.isin(tokens, special)
    return {
        "tokens": np.where(chosen, np.int32(mask_id), tokens),
        "labels": np.where(chosen, tokens, np.int32(IGNORE)),
    }
