"""Words, the suffix array and counts, against brute force."""

import json
from collections import Counter

import numpy as np
import pytest
from support.refusals import one_line
from support.tracing import write_corpus, write_index

from cepe_jax.data.corpus import Corpus
from cepe_jax.tracing.index import Index, IndexConfig, build_index
from cepe_jax.tracing.suffixes import suffix_array
from cepe_jax.tracing.words import ngrams, placed_words, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's  _hat_, No. 7!", ["the", "cat", "s", "hat", "no", "7"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("cafe\u0301 CAF\u00c9", ["caf\u00e9", "caf\u00e9"]),  # e with an accent, in two characters and in one
        ("हिन्दी और ﬁne", ["हिन्दी", "और", "fine"]),  # vowel signs are marks; a ligature
        ("\u2764\ufe0f 1\u00bd \ufdfa", ["112", "صلىاللهعليهوسلم"]),  # signs that NFKC makes of two kinds fall out
        ("  -- ", []),
    ],
)
def test_words_are_casefolded_runs_of_letters_digits_marks(text, words):
    assert words_of(text) == words
    placed = placed_words(text)
    assert [word.word for word in placed] == words
    assert all(words_of(text[word.start : word.end]) == [word.word] for word in placed)


def test_ngrams_overlap_and_may_be_none():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == []


def test_suffix_array_is_the_sorted_suffixes():
    """Small alphabets, copies, runs, and slices so small that groups cross them."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, rng.integers(1, 6), rng.integers(0, 40))
        values = np.concatenate([values, values[: len(values) // 2], values])
        wanted = sorted(range(len(values)), key=lambda start: values[start:].tolist())
        assert suffix_array(values, size=int(rng.integers(1, 9))).tolist() == wanted
    values = rng.integers(0, 1 << 30, 50)  # too wide to pack two into a number
    assert suffix_array(np.tile(values, 3)).tolist() == sorted(
        range(150), key=lambda n: np.tile(values, 3)[n:].tolist()
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """60 documents of a small vocabulary with a copied passage in many; one is empty, one a single word."""
    rng = np.random.default_rng(1)
    words = np.array(["The", "cat", "sat", "on", "a", "mat", "and", "slept"])
    passage = "In the beginning, there was a rather long passage. " * 3
    drawn = [" ".join(rng.choice(words, rng.integers(2, 40))) + " " + passage * (n % 3 == 0) for n in range(58)]
    return [*drawn, "", "cat"]


@pytest.fixture(scope="module")
def index(tmp_path_factory, texts) -> Index:
    return write_index(tmp_path_factory.mktemp("index"), texts)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_counts_are_those_of_brute_force(index, texts, n):
    wanted = Counter(ngram for text in texts for ngram in ngrams(words_of(text), n))
    queries = list(wanted)[:400]
    queries += [("on",) * n, ("zebra",) * n, (*queries[0][:-1], "zebra")]
    assert index.counts(queries).tolist() == [wanted[query] for query in queries]


def test_no_ngram_crosses_documents(index, texts):
    last, first = words_of(texts[2])[-1], words_of(texts[4])[0]  # neighbours: shards hold every second document
    assert index.counts([(last, first)])[0] == sum(ngrams(words_of(t), 2).count((last, first)) for t in texts)
    assert index.facts["words"] == sum(len(words_of(text)) for text in texts) == index.counts([()])[0]


def test_codocuments_count_each_document_once(index, texts):
    documents = [[set(ngrams(words_of(text), n)) for n in range(4)] for text in texts]
    rng = np.random.default_rng(2)
    every = [sorted(set().union(*(sets[n] for sets in documents))) for n in (1, 2, 3)]
    pairs = [tuple(of[rng.integers(len(of))] for of in (every[a], every[b])) for a in range(3) for b in range(3)] * 20
    pairs += [(("zebra",), ("cat",)), (("cat",), ("cat",))]
    wanted = [sum(x in sets[len(x)] and y in sets[len(y)] for sets in documents) for x, y in pairs]
    assert index.codocuments(pairs).tolist() == wanted
    assert max(wanted) > 20 > min(wanted)
    names = [index.names[n] for n in index.documents([("cat",)])[0]]
    assert sorted(names) == sorted(f"doc {n}" for n, sets in enumerate(documents) if ("cat",) in sets[1])


def test_an_index_of_another_corpus_is_refused(index, tmp_path):
    other = Corpus(write_corpus(tmp_path, ["another corpus", "of two"]), "train")
    with pytest.raises(ValueError, match=r"index.*documents, split train") as error:
        index.check_is_of(other)
    one_line(error)
    index.check_is_of(Corpus(index.path.parent / "documents", "train"))
    with pytest.raises(ValueError, match=f"{index.facts['tokenizer'][:8]}.*somewhere has abc") as error:
        index.check_tokenizer("abc", "somewhere")
    one_line(error)
    with pytest.raises(ValueError, match="none of 2 words, as 'emu'.*index") as error:
        index.check_knows(iter(["zebra", "emu"]))
    one_line(error)
    index.check_knows(iter(["zebra", "cat"]))


def test_damaged_and_absent_indexes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no index"):
        Index(tmp_path / "nothing")
    data = write_corpus(tmp_path, ["a few words", "and more"])
    build_index(IndexConfig(data=data, out=tmp_path / "index"))
    with pytest.raises(ValueError, match="index exists"):
        build_index(IndexConfig(data=data, out=tmp_path / "index"))
    words = (tmp_path / "index/words.npy").read_bytes()
    (tmp_path / "index/words.npy").write_bytes(words[:-4])
    with pytest.raises(ValueError, match="index: damaged") as error:
        Index(tmp_path / "index")
    one_line(error)
    np.save(tmp_path / "index/words.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"\[3, 7"):
        Index(tmp_path / "index")
    (tmp_path / "index/words.txt").rename(tmp_path / "words.txt")
    with pytest.raises(FileNotFoundError, match=r"words\.txt.*again"):
        Index(tmp_path / "index")
    (tmp_path / "words.txt").rename(tmp_path / "index/words.txt")
    facts = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(facts | {"normalization": 9}))
    with pytest.raises(ValueError, match="rule 9"):
        Index(tmp_path / "index")


def test_documents_without_words_leave_nothing(tmp_path):
    data = write_corpus(tmp_path, ["...", "--"])
    with pytest.raises(ValueError, match="documents: its documents have no words"):
        build_index(IndexConfig(data=data, out=tmp_path / "index"))
    assert not (tmp_path / "index").exists()
    with pytest.raises(ValueError, match=r"splits is \['train', 'train'\]"):
        IndexConfig(data=data, out=tmp_path / "index", splits=("train", "train"))
