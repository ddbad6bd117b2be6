"""Examples from sequences of tokens: pure functions of a record and a random generator.

An example is a dict of arrays: `tokens` (T) and `labels` (T), where labels[t] is what follows tokens[t] or IGNORE;
and for CEPE `context` (C, L) with `context_mask` (C, L), true for real tokens. No function reads past the window.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

IGNORE = -100  # a label that is no target
PAD = 0  # fills what the masks leave out
TEACHER = "teacher"  # the name of a dataset of a teacher's probabilities

Example = dict[str, np.ndarray]


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
    neighbours: Literal["none", "joint", "separate"] = "none"  # retrieved: the text after a passage, joined or apart

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


def chunks_before(tokens: np.ndarray, end: int, num_chunks: int, chunk_length: int) -> Example:
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
    """The warm-up: the encoder reads what the decoder reads."""
    if config.window != config.num_chunks * config.chunk_length:
        raise ValueError(
            f"the warm-up's window of {config.window} is not its {config.num_chunks} chunks x {config.chunk_length}"
        )
    window = window_at(tokens, start, config.window)
    return window | chunks_before(tokens, start + config.window, config.num_chunks, config.chunk_length)


def decoder_only(tokens: np.ndarray, start: int, config: ExampleConfig) -> Example:
    """What a plain decoder is given for the same window: its context in front of it, the window's labels alone."""
    context = config.num_chunks * config.chunk_length
    example = window_at(tokens, start - context, context + config.window)
    return example | {"labels": np.where(np.arange(context + config.window) < context, IGNORE, example["labels"])}


def retrieved(record: dict[str, np.ndarray], config: ExampleConfig) -> Example:
    """A window, and as its context the passages that were found for the window's first `query_tokens` tokens.

    The record has `passages` and `next` (n, P), `lengths`, `next_lengths`, `scores` (n). A chunk is a passage; with
    neighbours, "joint": a passage and what follows it, "separate": chunks of passages and of what follows them in
    turn. What is missing is masked; `scores` (C) has each chunk's, -inf where there is none. Labels inside the query
    are ignored: the passages were chosen by these tokens.
    """
    passages = _rows(record["passages"], record["lengths"])
    following = _rows(record["next"], record["next_lengths"])
    match config.neighbours:
        case "none":
            chunks, scores = passages, list(record["scores"])
        case "joint":
            chunks = [np.concatenate(pair) for pair in zip(passages, following, strict=True)]
            scores = list(record["scores"])
        case "separate":
            chunks = [chunk for pair in zip(passages, following, strict=True) for chunk in pair]
            scores = [score for score in record["scores"] for _ in range(2)]
    context = np.full((config.num_chunks, config.chunk_length), PAD, np.int32)
    real = np.zeros(context.shape, bool)
    for row, chunk in enumerate(chunks[: config.num_chunks]):
        if len(chunk) > config.chunk_length:
            raise ValueError(f"a retrieved chunk has {len(chunk)} tokens, chunk_length is {config.chunk_length}")
        context[row, : len(chunk)] = chunk
        real[row, : len(chunk)] = True
    all_scores = np.full(config.num_chunks, -np.inf, np.float32)
    all_scores[: len(scores)] = scores[: config.num_chunks]
    all_scores[~real.any(axis=1)] = -np.inf
    window = window_at(record["tokens"], 0, config.window)
    window["labels"][: int(record["query_tokens"]) - 1] = IGNORE  # label t is token t + 1
    return window | {"context": context, "context_mask": real, "scores": all_scores}


def _rows(padded: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]


def taught(record: dict[str, np.ndarray], config: ExampleConfig) -> Example:
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
