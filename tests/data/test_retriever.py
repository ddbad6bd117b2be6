"""Chunks for a question: where they are from, against searches written out; what is refused."""

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.datasets import write
from support.refusals import one_line
from support.searches import bm25_scores, dot_scores
from support.tracing import HASHED, hashed, write_corpus, write_tokenizer

from cepe_jax.data.corpus import Corpus, PrepareConfig, features_of, prepare
from cepe_jax.data.passages import Passages
from cepe_jax.data.retriever import Retriever, RetrieverConfig, documents_in
from cepe_jax.data.search import Fused
from cepe_jax.data.tokenizer import Tokenizer

WORDS = ["fox", "dog", "jumps", "lazy", "quick", "brown", "tests", "returns", "home", "what", "hello", "goes"]
QUESTION = "the lazy fox jumps home"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Thirty documents of 5 to 60 words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(30)]
    write_corpus(home := tmp_path_factory.mktemp("retriever"), [*texts, "nothing shared"])
    return home


def opened(home: Path, **settings) -> Retriever:
    return Retriever.open(home / "documents", Tokenizer(home), RetrieverConfig(**settings))


def cut(home: Path, length: int) -> dict[str, str]:
    """Source -> text of each chunk, in order."""
    corpus = Corpus(home / "documents", "train")
    return {
        f"{document.name}@{start}": corpus.tokenizer.decode(document.tokens[start : start + length])
        for document in corpus
        for start in range(0, len(document.tokens), length)
    }


@pytest.mark.parametrize("length", [16, 50, 1200])
def test_bm25_finds_the_best_chunks(home, length):
    """By scores in fp64; those without a common word are never found, and k is an upper bound."""
    retriever, chunks = opened(home, chunk=length), cut(home, length)
    assert len(retriever) == len(chunks)
    scores = bm25_scores(QUESTION, list(chunks.values()))
    found = retriever.search(QUESTION, len(retriever))
    assert 0 < len(found) == (scores > 0).sum() < len(chunks)
    np.testing.assert_allclose([chunk.score for chunk in found], -np.sort(-scores)[: len(found)], rtol=1e-5)
    places = list(chunks)
    for chunk in found:
        assert places[chunk.number] == chunk.source
        assert chunks[chunk.source] == chunk.text
        assert chunk.score == pytest.approx(scores[chunk.number], rel=1e-5)
    for k in (1, 5, 30):
        assert retriever.search(QUESTION, min(k, len(retriever))) == found[:k]
    assert retriever.search("zzz", 3) == []


def test_dense_finds_the_best_chunks(home):
    """The products are small integers: equals are in the order of their numbers."""
    retriever, chunks = opened(home, chunk=16, search="dense", encoder=HASHED), cut(home, 16)
    scores = dot_scores(hashed, QUESTION, list(chunks.values()))
    expected = np.argsort(-scores, kind="stable")[:30]
    assert len(set(scores[expected])) < 30
    found = retriever.search(QUESTION, 30)
    assert [chunk.number for chunk in found] == expected.tolist()
    assert [chunk.score for chunk in found] == scores[expected].tolist()


class Ranked:
    """A searcher that ranks passages as the test says."""

    def __init__(self, *numbers: int):
        self.numbers = numbers

    def search(self, queries, excluded, k):
        row = [*self.numbers, *[-1] * (k - len(self.numbers))]
        return np.array([row] * len(queries)), np.zeros((len(queries), k), np.float32)


def test_fusion_by_hand():
    """1 / (60 + rank), summed. Passage 0 (2nd and 1st) equals passage 2 (1st and 2nd), and 1 equals 4."""
    fused = Fused([Ranked(2, 0, 4, 1), Ranked(0, 2, 1, 4, 3)], 6)
    numbers, scores = fused.search(["q"], [np.zeros(0, int)], 6)
    assert numbers.tolist() == [[0, 2, 1, 4, 3, -1]]
    twice, once = Fraction(1, 61) + Fraction(1, 62), Fraction(1, 63) + Fraction(1, 64)
    expected = [twice, twice, once, once, Fraction(1, 65), -np.inf]
    np.testing.assert_allclose(scores[0], [float(score) for score in expected], rtol=1e-6)
    for k in range(1, 6):
        assert fused.search(["q"], [np.zeros(0, int)], k)[0].tolist() == [numbers[0, :k].tolist()]


def test_fused_search_ranks_by_both(home):
    retriever, texts = opened(home, chunk=16, search="fused", encoder=HASHED), list(cut(home, 16).values())
    words, vectors = bm25_scores(QUESTION, texts), dot_scores(hashed, QUESTION, texts)
    # BM25 of fp32: equals stay equals, and others are far enough apart.
    ranks = [np.argsort(np.argsort(-scores.round(5), kind="stable")) + 1 for scores in (words, vectors)]
    scores = 1 / (60 + ranks[1]) + np.where(words > 0, 1 / (60 + ranks[0]), 0)
    expected = np.argsort(-scores, kind="stable")[:20]
    found = retriever.search(QUESTION, 20)
    assert [chunk.number for chunk in found] == expected.tolist()
    np.testing.assert_allclose([chunk.score for chunk in found], scores[expected], rtol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 300])
def test_chunks_are_the_documents_again(home, length):
    corpus = Corpus(home / "documents", "train")
    passages = Passages.of(corpus, length)
    joined = {document.name: [] for document in corpus}
    for number in range(len(passages)):
        assert passages.start[number] == len(joined[passages.name(number)])
        assert 0 < len(passages[number]) <= length
        joined[passages.name(number)] += passages[number].tolist()
    assert joined == {document.name: document.tokens.tolist() for document in corpus}


@pytest.mark.parametrize("k", [1, 5, 30])
def test_tokens_are_at_most_k_chunks(home, k):
    found = opened(home, chunk=20).search(QUESTION, k)
    assert k * 20 >= sum(chunk.length for chunk in found) > (k - 1) * 20 - 20 * k // 3  # some documents end before
    assert max(chunk.length for chunk in found) == 20


def test_order_in_the_prompt(home):
    numbers = {}
    for order in ("best_first", "best_last", "document"):
        retriever = opened(home, chunk=16, order=order)
        found = retriever.search(QUESTION, 6)
        numbers[order] = [chunk.number for chunk in retriever.in_order(found)]
    best = np.argsort(-bm25_scores(QUESTION, list(cut(home, 16).values())), kind="stable")[:6].tolist()
    assert best not in (sorted(best), sorted(best)[::-1])
    assert numbers == {"best_first": best, "best_last": best[::-1], "document": sorted(best)}


def test_chunks_without_text_are_not_found(home):
    """With chunks of a token each document's BOS and EOS are chunks, whose vectors are as good as any."""
    retriever = opened(home, chunk=1, search="dense", encoder=HASHED)
    found = retriever.search("zzz", len(retriever))
    assert len(found) == sum(text.strip() != "" for text in cut(home, 1).values()) < len(retriever) - 60
    assert all(chunk.text.strip() for chunk in found)


def test_a_folder_of_texts(tmp_path, caplog):
    """Files of the patterns, in the order of their names; bad ones are told, empty ones and hidden folders are not."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    texts = {"a.md": "The fox\n", "b/c.py": "def fox(x):\n    return 🙂\n", "z.txt": "fox " * 9}
    left_out = {".git/d.txt": b"fox", "e.bin": b"fox", "f.txt": b"\xff", "g.rst": b" \n"}
    for name, content in ({name: text.encode() for name, text in texts.items()} | left_out).items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_bytes(content)
    documents = list(documents_in(tmp_path / "docs", tokenizer, RetrieverConfig().patterns))
    assert {document.name: tokenizer.decode(document.tokens) for document in documents} == texts
    assert [document.tokens.tolist() for document in documents] == [tokenizer.encode(text) for text in texts.values()]
    assert [document.name for document in documents] == sorted(texts)
    notices = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(notices) == 1
    assert "f.txt: not UTF-8 at byte 0" in notices[0]
    retriever = Retriever.open(tmp_path / "docs", tokenizer, RetrieverConfig(chunk=5, patterns=("*.txt",)))
    assert {chunk.document for chunk in retriever.search("fox", len(retriever))} == {"z.txt"}


def test_all_splits_or_one(tmp_path):
    for number in range(12):
        (tmp_path / "in" / "d").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "d" / f"{number}.txt").write_text(f"fox number {number}")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    shares = {"test_fraction": 0.3, "retrieval_fraction": 0.3, "seed": 1}
    prepare(
        PrepareConfig(input=tmp_path / "in", out=tmp_path / "out", tokenizer=str(tokenizer.path), workers=1, **shares)
    )
    names = {}
    for split in ("train", "test", "retrieval", ""):
        retriever = Retriever.open(tmp_path / "out", tokenizer, RetrieverConfig(split=split, order="document"))
        names[split] = [chunk.document for chunk in retriever.in_order(retriever.search("fox", len(retriever)))]
        if split:
            assert names[split] == [document.name for document in Corpus(tmp_path / "out", split)]
    assert names[""] == [*names["train"], *names["test"], *names["retrieval"]]
    assert len(names[""]) == 12 > len(names["train"]) > 0


def refused(corpus: Path, tokenizer: Tokenizer, k: int = 1, **settings) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        Retriever.open(corpus, tokenizer, RetrieverConfig(**settings)).search(QUESTION, k)
    return one_line(error)


def test_refusals(home, tmp_path):
    documents, tokenizer = home / "documents", Tokenizer(home)
    for k in (0, -1):
        assert f"k is {k}: give 1" in refused(documents, tokenizer, k)
    assert "k is 32, and " in refused(documents, tokenizer, 32)
    assert "31 chunks of 1200 tokens" in refused(documents, tokenizer, 32)
    assert "chunk is 0: " in refused(documents, tokenizer, chunk=0)
    assert "encoder is x: give module:function" in refused(documents, tokenizer, encoder="x", search="dense")
    assert "search is fused: give an encoder" in refused(documents, tokenizer, search="fused")
    assert f"encoder is {HASHED}, and search bm25" in refused(documents, tokenizer, encoder=HASHED)
    assert "support.tracing has no nowhere" in refused(
        documents, tokenizer, search="dense", encoder="support.tracing:nowhere"
    )
    empty = write(tmp_path / "none", "documents", features_of(tokenizer), [[]], tokenizer)
    assert f"{empty} has no documents" in refused(empty, tokenizer)
    assert "no split dev" in refused(documents, tokenizer, split="dev")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty: no file matches" in refused(tmp_path / "empty", tokenizer)
    assert f"{tmp_path}/nowhere: no such directory" in refused(tmp_path / "nowhere", tokenizer)
    (tmp_path / "empty" / "a.txt").write_text(" ")
    assert f"{tmp_path}/empty has no documents" in refused(tmp_path / "empty", tokenizer)
    assert "split is train, and " in refused(tmp_path / "empty", tokenizer, split="train")
