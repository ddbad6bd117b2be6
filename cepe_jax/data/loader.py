"""Batches for each stage of training: global batch n is a pure function of (seed, n)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from cepe_jax.data.corpus import Corpus
from cepe_jax.data.examples import (
    Example,
    ExampleConfig,
    duplicate,
    mask_chunks,
    masked_lm,
    pack,
    previous_document,
    window_at,
)

if TYPE_CHECKING:
    import grain

Stage = Literal["lm", "mlm", "warmup", "cepe"]


def window_starts(corpus: Corpus, stage: Stage, config: ExampleConfig) -> list[tuple[int, int]]:
    """(document, start) of every window of the stage, half a window apart; a context needs a chunk before it."""
    first = config.chunk_length if stage == "cepe" else 0
    stride = max(config.window // 2, 1)
    starts = [
        (index, start)
        for index, document in enumerate(corpus.documents)
        for start in range(first, len(document.tokens) - config.window, stride)
    ]
    if not starts:
        raise ValueError(
            f"no document is longer than the {first + config.window} tokens of a {stage} example: lower the window"
        )
    return starts


def dataset(corpus: Corpus, stage: Stage, config: ExampleConfig, batch_size: int, seed: int) -> "grain.MapDataset":
    """Batch n at index n, for ever; each window comes once before any comes again, at a random offset."""
    import grain  # takes a second or two: only what loads data pays for it

    tokenizer, documents = corpus.tokenizer, corpus.documents
    special = tokenizer.bos_id, tokenizer.eos_id

    def example(place: tuple[int, int], rng: np.random.Generator) -> Example:
        tokens = documents[place[0]].tokens
        room = len(tokens) - config.window - place[1]
        start = place[1] + int(rng.integers(max(min(config.window // 2, room), 1)))
        match stage:
            case "lm":
                return window_at(tokens, start, config.window)
            case "mlm":
                window = np.asarray(tokens[start : start + config.window])
                return masked_lm(window, special, tokenizer.mask_id, config.mlm_rate, rng)
            case "warmup":
                return duplicate(tokens, start, config)
            case "cepe":
                if rng.random() < config.packed_fraction:
                    others = pack(documents, config.num_chunks * config.chunk_length, rng)
                    tokens = np.concatenate([others, tokens[start : start + config.window + 1]])
                    start = len(others)
                return mask_chunks(previous_document(tokens, start, config), config, rng)

    places = grain.MapDataset.source(window_starts(corpus, stage, config)).seed(seed)
    return places.shuffle().repeat().random_map(example).batch(batch_size)


def batches(data: "grain.MapDataset", first: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches first, first + 1, ... read ahead by threads."""
    import grain

    return iter(data[first:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
