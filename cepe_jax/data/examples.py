"""Examples from documents: pure functions of documents and a random generator.

An example is a dict of arrays: `tokens` (T) and `labels` (T), where labels[t] is what follows tokens[t] or IGNORE;
and for CEPE `context` (C, L) with `context_mask` (C, L), true for real tokens. No function reads past the window.
"""

from dataclasses import dataclass

import numpy as np

IGNORE = -100  # a label that is no target
PAD = 0  # fills what the masks leave out

Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class Document:
    name: str
    tokens: np.ndarray  # integers, BOS first and EOS last
    domain: str = ""


@dataclass(frozen=True)
class ExampleConfig:
    """Sizes in tokens, and the rates of the paper's recipe."""

    window: int = 4096  # T, what the decoder reads
    num_chunks: int = 16  # C
    chunk_length: int = 256  # L
    packed_fraction: float = 1 / 3  # of the main stage's windows follow stretches of other documents
    chunk_mask_rate: float = 0.3  # of chunks are masked in part or whole
    whole_chunk_rate: float = 0.1  # of those are masked whole, of the others a random suffix
    mlm_rate: float = 0.3  # of tokens are masked in MLM

    def __post_init__(self):
        for name in ("window", "num_chunks", "chunk_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("packed_fraction", "chunk_mask_rate", "whole_chunk_rate", "mlm_rate"):
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


def pack(documents: list[Document], length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` tokens: stretches of random documents one after another, each of a quarter of `length` to all of it."""
    pieces, have = [], 0
    while have < length:
        tokens = documents[rng.integers(len(documents))].tokens
        take = min(int(rng.integers(length // 4, length)) + 1, len(tokens), length - have)
        start = rng.integers(len(tokens) - take + 1)
        pieces.append(tokens[start : start + take])
        have += take
    return np.concatenate(pieces)


def mask_chunks(example: Example, config: ExampleConfig, rng: np.random.Generator) -> Example:
    """The example with part of its context masked: a share of the chunks lose a random suffix or everything."""
    num_chunks, length = example["context_mask"].shape
    keep = np.where(rng.random(num_chunks) < config.whole_chunk_rate, 0, rng.integers(1, max(length, 2), num_chunks))
    keep = np.where(rng.random(num_chunks) < config.chunk_mask_rate, keep, length)
    return example | {"context_mask": example["context_mask"] & (np.arange(length) < keep[:, None])}


def masked_lm(tokens: np.ndarray, special: tuple[int, ...], mask_id: int, rate: float, rng) -> Example:
    """`tokens` with a share replaced by the mask id, always by it, and these as labels; special tokens stay."""
    chosen = (rng.random(len(tokens)) < rate) & ~np.isin(tokens, special)
    return {
        "tokens": np.where(chosen, mask_id, tokens).astype(np.int32),
        "labels": np.where(chosen, tokens, IGNORE).astype(np.int32),
    }
