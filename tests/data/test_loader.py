"""Batches: pure in (seed, n), each window once per epoch, and what each stage shows to the model."""

import dataclasses
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from cepe_jax.data.examples import IGNORE, Document, ExampleConfig
from cepe_jax.data.loader import batches, dataset, window_starts

BOS, EOS, MASK = 0, 1, 999_999
FAR = 10_000
LENGTHS = [60, 9, 300, 41, 17, 25, 130]
CONFIG = ExampleConfig(window=12, num_chunks=3, chunk_length=4)
STAGES = ["lm", "mlm", "warmup", "cepe"]


def document(index: int, length: int) -> Document:
    """Its tokens say the document and the place: FAR * (index + 1) + place."""
    tokens = FAR * (index + 1) + np.arange(length, dtype=np.int32)
    tokens[0], tokens[-1] = BOS, EOS
    return Document(str(index), tokens)


CORPUS = SimpleNamespace(
    tokenizer=SimpleNamespace(bos_id=BOS, eos_id=EOS, mask_id=MASK),
    documents=[document(index, length) for index, length in enumerate(LENGTHS)],
)


def take(stage: str, count: int, first: int = 0, seed: int = 0, batch: int = 4, **changes) -> list[dict]:
    data = dataset(CORPUS, stage, dataclasses.replace(CONFIG, **changes), batch, seed)
    return list(islice(batches(data, first), count))


def examples(stage: str, count: int, **changes) -> list[dict]:
    taken = take(stage, -(-count // 4), **changes)
    rows = [{name: batch[name][row] for name in batch} for batch in taken for row in range(4)]
    return rows[:count]


def place(tokens: np.ndarray) -> tuple[int, int]:
    """(document, start) of a window that is one stretch of a document; the window's second token tells."""
    return int(tokens[1]) // FAR - 1, int(tokens[1]) % FAR - 1


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_is_a_function_of_seed_and_number(stage):
    whole = take(stage, 40)
    assert same(whole, take(stage, 40))
    assert same(whole[23:], take(stage, 17, first=23))
    assert same([whole[31]], [dataset(CORPUS, stage, CONFIG, 4, 0)[31]])
    other = take(stage, 40, seed=1)
    assert not any(same([x], [y]) for x, y in zip(whole, other, strict=True))


def test_shapes_and_dtypes():
    shapes = {"tokens": (4, 12), "labels": (4, 12), "context": (4, 3, 4), "context_mask": (4, 3, 4)}
    for stage in STAGES:
        (batch,) = take(stage, 1)
        assert batch.keys() == (shapes.keys() if stage in ("warmup", "cepe") else {"tokens", "labels"})
        for name, array in batch.items():
            assert array.shape == shapes[name]
            assert array.dtype == (bool if name == "context_mask" else np.int32)


@pytest.mark.parametrize("stage", STAGES)
def test_each_window_comes_once_per_epoch(stage):
    """At another offset each time, in another order, never past the document's end."""
    first, stride = (CONFIG.chunk_length if stage == "cepe" else 0), CONFIG.window // 2
    starts = window_starts(CORPUS, stage, CONFIG)
    expected = [(i, s) for i, n in enumerate(LENGTHS) for s in range(first, n - CONFIG.window, stride)]
    assert starts == expected
    drawn = examples(stage, 3 * len(starts), packed_fraction=0.0, mlm_rate=0.0)
    places = [place(example["tokens"]) for example in drawn]
    epochs = [places[i * len(starts) : (i + 1) * len(starts)] for i in range(3)]
    nearest = [[(i, first + (s - first) // stride * stride) for i, s in epoch] for epoch in epochs]
    for epoch in nearest:
        assert sorted(epoch) == sorted(starts)
    assert nearest[0] != nearest[1] != nearest[2] != starts
    assert sorted(epochs[0]) != sorted(epochs[1]) != sorted(epochs[2])
    for example, (index, start) in zip(drawn, places, strict=True):
        tokens = CORPUS.documents[index].tokens
        np.testing.assert_array_equal(example["tokens"], tokens[start : start + 12])
        if stage != "mlm":
            np.testing.assert_array_equal(example["labels"], tokens[start + 1 : start + 13])


def test_every_token_of_a_long_document_is_read():
    seen = set()
    for example in examples("lm", 60 * len(window_starts(CORPUS, "lm", CONFIG))):
        seen |= set(example["tokens"].tolist()) | set(example["labels"].tolist())
    assert set(CORPUS.documents[2].tokens.tolist()) <= seen


def test_mlm():
    for example in examples("mlm", 100):
        masked = example["tokens"] == MASK
        np.testing.assert_array_equal(masked, example["labels"] != IGNORE)
        assert not {BOS, EOS} & set(example["labels"].tolist())
        assert len(set(np.where(masked, example["labels"], example["tokens"]) - np.arange(12))) <= 3
    everything = examples("mlm", 40, mlm_rate=1.0)
    assert all(set(example["tokens"].tolist()) <= {MASK, BOS, EOS} for example in everything)


@pytest.mark.parametrize("stage", ["lm", "warmup", "cepe"])
def test_the_mask_id_is_never_shown_to_the_decoder_or_in_a_context(stage):
    for batch in take(stage, 50):
        assert not any((batch[name] == MASK).any() for name in batch)


def test_warmup():
    """The encoder reads what the decoder reads, unmasked."""
    for example in examples("warmup", 100):
        np.testing.assert_array_equal(example["context"].ravel(), example["tokens"])
        assert example["context_mask"].all()


def test_cepe_reads_what_stands_before_the_window():
    full = 0
    for example in examples("cepe", 200, packed_fraction=0.0, chunk_mask_rate=0.0):
        index, start = place(example["tokens"])
        context = example["context"][example["context_mask"]]
        before = CORPUS.documents[index].tokens[max(start - 12, 0) : start]
        np.testing.assert_array_equal(context, before)
        assert len(context) >= CONFIG.chunk_length
        full += len(context) == 12
    assert full > 100


def test_cepe_masks_chunks():
    def touched(**changes) -> float:
        rows = examples("cepe", 800, packed_fraction=1.0, **changes)
        return np.mean([~example["context_mask"].all(axis=1) for example in rows])

    assert touched(chunk_mask_rate=0.0) == 0
    assert touched(chunk_mask_rate=1.0) == 1
    assert abs(touched() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 2400)


def is_packed(example: dict) -> bool:
    """Whether context and window are anything but one stretch of a document; BOS and EOS stand at its ends."""
    read = np.concatenate([example["context"][example["context_mask"]], example["tokens"], example["labels"][-1:]])
    inner = read.copy()
    inner[read == BOS] = -1
    inner[read == EOS] = -1
    steps = np.diff(inner)[(inner[1:] >= 0) & (inner[:-1] >= 0)]
    return bool((steps != 1).any() or (read[1:] == BOS).any() or (read[:-1] == EOS).any())


def test_a_third_is_packed():
    def share(count: int, **changes) -> float:
        return np.mean([is_packed(e) for e in examples("cepe", count, chunk_mask_rate=0.0, **changes)])

    assert share(200, packed_fraction=0.0) == 0
    assert share(200, packed_fraction=1.0) > 0.99
    assert abs(share(5000) - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 5000) + 0.005


def test_packed_examples_hold_full_contexts_of_several_documents():
    documents = []
    for example in examples("cepe", 200, packed_fraction=1.0, chunk_mask_rate=0.0):
        assert example["context_mask"].all()
        assert (example["labels"] != IGNORE).all()
        np.testing.assert_array_equal(example["labels"][:-1], example["tokens"][1:])
        read = np.concatenate([example["context"].ravel(), example["tokens"]])
        documents.append(len(set(read[read > EOS] // FAR)))
    assert np.mean(documents) > 2


def test_documents_that_are_too_short():
    with pytest.raises(
        ValueError, match="no document is longer than the 304 tokens of a cepe example: lower the window"
    ):
        dataset(CORPUS, "cepe", dataclasses.replace(CONFIG, window=300), 4, 0)
    assert window_starts(CORPUS, "lm", dataclasses.replace(CONFIG, window=299)) == [(2, 0)]
    with pytest.raises(ValueError, match="no document is longer than the 300 tokens of a lm example"):
        window_starts(CORPUS, "lm", dataclasses.replace(CONFIG, window=300))
