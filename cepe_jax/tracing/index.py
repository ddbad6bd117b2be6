"""The index of a corpus: a suffix array over its words, which says how often words occur and in which documents.

Documents are separated by a sentinel that no query holds, so that no n-gram crosses a border. All arrays are memory
mapped; counts are exact.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from cepe_jax.data.corpus import Corpus
from cepe_jax.data.records import Count
from cepe_jax.directories import new_directory, write_json
from cepe_jax.parsing import read_json, shortened
from cepe_jax.progress import track
from cepe_jax.tracing.suffixes import suffix_array
from cepe_jax.tracing.words import NORMALIZATION, words_of

SENTINEL = 0  # after each document
UNKNOWN = -1  # a word that the corpus does not have
QUERIES = 1 << 16  # words of queries that are compared at once
FACTS, DOCUMENTS, VOCABULARY = "index.json", "documents.json", "words.txt"

Ngram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    data: Path  # a dataset of documents
    out: Path  # gets the index
    splits: tuple[str, ...] = ("train",)  # splits of the documents that are counted: those that a model was trained on

    def __post_init__(self):
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits is {list(self.splits)}: give the names of splits, each one once")


class Facts(TypedDict):
    """The facts of an index, which say what was counted."""

    normalization: Count  # the number of the rule for words
    tokenizer: str  # fingerprint of the tokenizer whose ids the documents are
    records: dict[str, str]  # digest of the records of each split
    documents: Count
    words: Count  # without sentinels
    vocabulary: Count


def build_index(config: IndexConfig) -> None:
    """Write the index of the documents at `config.data` to `config.out`, whole or not at all."""
    corpora = {split: Corpus(config.data, split) for split in config.splits}
    with new_directory(config.out) as place:
        names, firsts, vocabulary = [], [], {}
        size = 0
        with (place / "words.raw").open("wb") as raw:
            for split, corpus in corpora.items():
                for document in track(corpus, f"read {split}, documents", len(corpus)):
                    words = words_of(corpus.tokenizer.decode(document.tokens))
                    ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words]
                    raw.write(np.array([*ids, SENTINEL], np.int32).tobytes())
                    names.append(document.name)
                    firsts.append(size)
                    size += len(ids) + 1
        if not vocabulary:
            raise ValueError(f"{config.data}: its documents have no words: give others, or other splits")
        words = np.fromfile(place / "words.raw", np.int32)
        (place / "words.raw").unlink()
        np.save(place / "words.npy", words)
        np.save(place / "suffixes.npy", suffix_array(words))
        np.save(place / "documents.npy", np.array(firsts, np.int64))
        (place / VOCABULARY).write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
        write_json(place / DOCUMENTS, names)
        first = next(iter(corpora.values()))
        facts: Facts = {
            "normalization": NORMALIZATION,
            "tokenizer": first.tokenizer.fingerprint(),
            "records": {split: corpus.records.digest for split, corpus in corpora.items()},
            "documents": len(names),
            "words": size - len(names),
            "vocabulary": len(vocabulary),
        }
        write_json(place / FACTS, facts)
    print(f"{config.out}: {facts['words']:,} words, {len(vocabulary):,} different ones, {len(names):,} documents")


class Index:
    """The index at `path`, opened; its vocabulary and the documents' names are in memory."""

    def __init__(self, path: Path):
        if not (path / FACTS).exists():
            raise FileNotFoundError(f"{path}: no index: make it with scripts/tracing.py index")
        mend = "make the index again"
        self.path, self.facts = path, read_json(path / FACTS, Facts, mend)
        if self.facts["normalization"] != NORMALIZATION:
            now = f"{self.facts['normalization']}, and this version counts by rule {NORMALIZATION}"
            raise ValueError(f"{path} has words by rule {now}: {mend}")
        if absent := [name for name in (DOCUMENTS, VOCABULARY) if not (path / name).exists()]:
            raise FileNotFoundError(f"{path} has no {' and no '.join(absent)}: {mend}")
        self.names: list[str] = read_json(path / DOCUMENTS, list[str], mend)
        self._ids = {word: n for n, word in enumerate((path / VOCABULARY).read_text("utf-8").split("\n")[:-1], 1)}
        try:
            self.words, self.suffixes, self.starts = (
                np.load(path / f"{name}.npy", mmap_mode="r") for name in ("words", "suffixes", "documents")
            )
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}): {mend}") from None
        places = self.facts["words"] + self.facts["documents"]
        lengths = [len(self.words), len(self.suffixes), len(self.starts), len(self.names), len(self._ids)]
        if lengths != [places, places, *[self.facts["documents"]] * 2, self.facts["vocabulary"]]:
            raise ValueError(f"{path}: its files do not belong together ({lengths}): {mend}")

    @property
    def digest(self) -> str:
        """Equal for indexes of the same documents, of the same words."""
        facts = [self.facts["normalization"], self.facts["tokenizer"], *sorted(self.facts["records"].values())]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def ranges(self, queries: Sequence[Ngram]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first place in `suffixes` of each query's occurrences, and one past the last, (Q,) each.

        The empty query occurs before every word and at every sentinel.
        """
        first, end = np.zeros((2, len(queries)), np.int64)
        waiting = sorted(range(len(queries)), key=lambda n: -len(queries[n]))  # of about one length together
        while waiting:
            rows = max(QUERIES // max(len(queries[waiting[0]]), 1), 1)
            part, waiting = waiting[:rows], waiting[rows:]
            ids_QN, lengths_Q = self._padded([queries[n] for n in part])
            first[part], end[part] = (self._bisect(ids_QN, lengths_Q, after) for after in (False, True))
        return first, end

    def counts(self, queries: Sequence[Ngram]) -> np.ndarray:
        """Return the number of occurrences of each query (Q,); of the empty one the number of words."""
        first, end = self.ranges(queries)
        counts = end - first
        counts[[n for n, query in enumerate(queries) if not query]] = self.facts["words"]
        return counts

    def documents(self, queries: Sequence[Ngram]) -> list[np.ndarray]:
        """Return the numbers of the documents that hold each query, ascending."""
        return [self._document_of(np.sort(self.suffixes[a:b])) for a, b in zip(*self.ranges(queries), strict=True)]

    def codocuments(self, pairs: Sequence[tuple[Ngram, Ngram]]) -> np.ndarray:
        """Return the number of documents that hold both n-grams of each pair, wherever they stand in it."""
        ngrams = list(dict.fromkeys(ngram for pair in pairs for ngram in pair))
        documents = dict(zip(ngrams, self.documents(ngrams), strict=True))
        return np.array([_common(documents[x], documents[y]) for x, y in pairs], np.int64)

    def check_is_of(self, corpus: Corpus) -> None:
        """Raise ValueError if the index has not counted these documents."""
        if self.facts["records"].get(corpus.records.split) != corpus.records.digest:
            splits = ", ".join(self.facts["records"])
            where = f"{corpus.records.path}, split {corpus.records.split}"
            raise ValueError(f"{self.path} is the index of another corpus ({splits}) than {where}: make its own")

    def check_tokenizer(self, fingerprint: str, whose: Path | str) -> None:
        """Raise ValueError if the documents were prepared with another tokenizer than this one."""
        if self.facts["tokenizer"] != fingerprint:
            raise ValueError(
                f"{self.path} is the index of a corpus with tokenizer {self.facts['tokenizer'][:8]}, and {whose} has "
                f"{fingerprint[:8]}: prepare the corpus with its tokenizer, and index it"
            )

    def check_knows(self, words: Iterator[str]) -> None:
        """Raise ValueError if none of the words occurs in the corpus."""
        seen = set(words)
        if seen.isdisjoint(self._ids):
            example = shortened(min(seen, default=""))
            raise ValueError(f"none of {len(seen)} words, as {example}, occurs in {self.path}: give its corpus' texts")

    def _padded(self, queries: Sequence[Ngram]) -> tuple[np.ndarray, np.ndarray]:
        lengths_Q = np.array([len(query) for query in queries], np.int64)
        ids_QN = np.full((len(queries), max(lengths_Q.max(initial=0), 1)), UNKNOWN, np.int32)
        for row, query in zip(ids_QN, queries, strict=True):
            row[: len(query)] = [self._ids.get(word, UNKNOWN) for word in query]
        return ids_QN, lengths_Q

    def _bisect(self, ids_QN: np.ndarray, lengths_Q: np.ndarray, after: bool) -> np.ndarray:
        """Return how many suffixes stand before each query; with `after`, those too that begin with it."""
        low_Q, high_Q = np.zeros_like(lengths_Q), np.full_like(lengths_Q, len(self.suffixes))
        steps_N = np.arange(ids_QN.shape[1])
        while (low_Q < high_Q).any():
            middle_Q = (low_Q + high_Q) // 2
            places_QN = self.suffixes[np.minimum(middle_Q, len(self.suffixes) - 1)][:, None] + steps_N
            inside_QN = places_QN < len(self.words)
            words_QN = np.where(inside_QN, self.words[np.minimum(places_QN, len(self.words) - 1)], SENTINEL)
            differs_QN = (words_QN != ids_QN) & (steps_N < lengths_Q[:, None])
            at_Q1 = differs_QN.argmax(axis=1)[:, None]
            word_Q, id_Q = (np.take_along_axis(x, at_Q1, axis=1)[:, 0] for x in (words_QN, ids_QN))
            before_Q = np.where(differs_QN.any(axis=1), word_Q < id_Q, after) & (low_Q < high_Q)
            low_Q = np.where(before_Q, middle_Q + 1, low_Q)
            high_Q = np.where(before_Q, high_Q, np.minimum(middle_Q, high_Q))
        return low_Q

    def _document_of(self, places: np.ndarray) -> np.ndarray:
        """Return the different documents of ascending places."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        return numbers[np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)]].astype(np.int32)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many numbers two ascending arrays share, in the time of the shorter one."""
    short, long = sorted((a, b), key=len)
    if not len(short):
        return 0
    at = np.minimum(np.searchsorted(long, short), len(long) - 1)
    return int((long[at] == short).sum())
