"""Which windows are chosen, and their nll against the model called directly and a softmax in numpy."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny import DECODER

from cepe_jax.data.examples import Document
from cepe_jax.evaluation import perplexity
from cepe_jax.evaluation.perplexity import choose_windows, context_nll
from cepe_jax.evaluation.report import EvaluateConfig, _places

WINDOW, SCORED, LENGTH, COUNTS = 8, 5, 3, [1, 4]


def draw_documents(rng, count: int, longest: int) -> list[Document]:
    lengths = rng.integers(1, longest, count)
    return [Document(f"{i}.py", rng.integers(3, DECODER.vocab_size, n).astype(np.int32)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(30))
def test_windows(seed):
    """The property that every number of the report rests on: a context ends where the window starts, or in another
    document, and every span that the report names lies inside its document."""
    rng = np.random.default_rng(seed)
    documents = draw_documents(rng, 40, int(rng.integers(60, 300)))
    length = {document.name: len(document.tokens) for document in documents}
    window, chunk_length, most = (int(n) for n in rng.integers(1, [20, 6, 6]))
    context = most * chunk_length
    sizes = {"window": window, "scored": 1, "chunk_length": chunk_length, "trained_chunks": most}
    config = EvaluateConfig(Path("a"), Path("b"), Path("c"), chunks=tuple(range(1, most + 1)), **sizes)
    windows = choose_windows(documents, window, context)
    assert [w.document.name for w in windows] == [name for name, n in length.items() if n > context + window]
    for chosen in windows:
        places = _places(chosen, config)
        own, other = places["file"], places["other"]["file"]
        assert other != own
        assert places["end"] - places["start"] == window
        assert 0 <= places["start"] < places["end"] < length[own]  # the last label exists
        spans = places["previous"]
        assert spans.keys() == places["other"].keys() - {"file"} == {str(count) for count in config.chunks}
        for count in config.chunks:
            start, end = spans[str(count)]
            assert 0 <= start < end <= places["start"]
            assert end == places["start"]
            assert end - start == count * chunk_length
            start, end = places["other"][str(count)]
            assert 0 <= start < end <= length[other]
            assert end - start == count * chunk_length
    others = [w.other.name for w in windows]
    assert sorted(others) == sorted(w.document.name for w in windows)  # each is another's context once


def test_too_few_documents():
    documents = [Document("a", np.arange(30)), Document("b", np.arange(20)), Document("c", np.arange(21))]
    assert len(choose_windows(documents, 8, 12)) == 2
    with pytest.raises(ValueError, match="1 documents are longer than the 25 tokens asked for: 2 are needed"):
        choose_windows(documents, 13, 12)
    with pytest.raises(ValueError, match="0 documents are longer"):
        choose_windows([], 1, 1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nll_of(logits_BTV, labels_BT) -> np.ndarray:
    log_probs = log_softmax(np.asarray(logits_BTV))
    picked = np.take_along_axis(log_probs, labels_BT[..., None], axis=-1)[..., 0]
    return -picked[:, -SCORED:].mean(1)


@pytest.fixture(scope="module")
def windows():
    return choose_windows(draw_documents(np.random.default_rng(0), 10, 90), WINDOW, max(COUNTS) * LENGTH)


@pytest.fixture(scope="module")
def measured(cepe, windows):
    """In batches of 4, the last of them not full."""
    assert len(windows) > 4
    assert len(windows) % 4
    return context_nll(cepe, windows, WINDOW, SCORED, COUNTS, LENGTH, batch=4)


def test_nll(cepe, plain, forward, windows, measured):
    """Of the last tokens of each window, given the chunks that end at the window or at the other's window."""
    tokens = np.stack([w.document.tokens[w.start : w.start + WINDOW] for w in windows])
    labels = np.stack([w.document.tokens[w.start + 1 : w.start + 1 + WINDOW] for w in windows])
    kinds = {("none", 0), *((kind, count) for kind in ("previous", "other") for count in COUNTS)}
    assert measured.keys() == kinds
    np.testing.assert_allclose(measured["none", 0], nll_of(plain(cepe.decoder, tokens), labels), rtol=1e-5)
    for count in COUNTS:
        for kind in ("previous", "other"):
            ends = [(w.document, w.start) if kind == "previous" else (w.other, w.other_end) for w in windows]
            context = np.stack([document.tokens[end - count * LENGTH : end] for document, end in ends])
            logits = forward(cepe, tokens, context.reshape(len(windows), count, LENGTH))
            np.testing.assert_allclose(measured[kind, count], nll_of(logits, labels), rtol=1e-5)


def test_every_number_is_another(measured):
    """So no two kinds or counts could be mixed up unseen."""
    means = sorted(float(values.mean()) for values in measured.values())
    assert np.diff(means).min() > 1e-4
    assert all(len(values) == len(measured["none", 0]) for values in measured.values())


def test_windows_without_enough_before_them_are_masked(cepe, forward, windows):
    """Missing tokens are absent, not padding that is read."""
    short = [dataclasses.replace(w, start=2, other_end=5) for w in windows[:4]]
    result = context_nll(cepe, short, WINDOW, SCORED, [4], LENGTH, batch=4)["previous", 4]
    tokens = np.stack([w.document.tokens[2 : 2 + WINDOW] for w in short])
    labels = np.stack([w.document.tokens[3 : 3 + WINDOW] for w in short])
    context, mask = np.zeros((4, 4, LENGTH), np.int32), np.zeros((4, 4, LENGTH), bool)
    context[:, -1, -2:], mask[:, -1, -2:] = [w.document.tokens[:2] for w in short], True
    np.testing.assert_allclose(result, nll_of(forward(cepe, tokens, context, mask), labels), rtol=1e-5)


def test_the_decoder_reads_its_window_alone(cepe, windows, monkeypatch):
    """What the model is given to read, position by position: no label of the window is in it."""
    read = []
    monkeypatch.setattr(perplexity, "encode_chunks", lambda model, *context: read.append(context) or context[0])
    monkeypatch.setattr(perplexity, "_nll", lambda model, tokens, labels, *rest: np.zeros(len(tokens)))
    context_nll(cepe, windows, WINDOW, SCORED, COUNTS, LENGTH, batch=len(windows))
    for row, window in enumerate(windows):
        (own, own_mask), (other, other_mask) = [(context[row], mask[row]) for context, mask in read]
        most = max(COUNTS) * LENGTH
        np.testing.assert_array_equal(own[own_mask], window.document.tokens[window.start - most : window.start])
        np.testing.assert_array_equal(
            other[other_mask], window.other.tokens[window.other_end - most : window.other_end]
        )
