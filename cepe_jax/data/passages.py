"""The documents in passages of one length, each with its source: the document, and the passage's first token."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from cepe_jax.data.examples import PAD, Document
from cepe_jax.data.records import Count
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.parsing import read_json


class Documents(TypedDict):
    """The documents of an index, in their order."""

    names: list[str]
    lengths: list[Count]  # tokens


class Passages:
    """Documents in passages of `length` tokens, numbered through. A document's are consecutive; its last is shorter.

    All passages, one after another, are all tokens.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], tokens: np.ndarray, length: int):
        """`lengths` are those of the documents, whose `tokens` are one after another."""
        self.names, self.lengths, self.length, self._tokens = list(names), np.array(lengths, np.int64), length, tokens
        self._documents = {name: number for number, name in enumerate(self.names)}
        counts = -(-self.lengths // length)
        self._firsts = np.concatenate([[0], np.cumsum(counts)])  # of each document, the number of its first passage
        ends = np.cumsum(self.lengths)
        self.document = np.repeat(np.arange(len(self.lengths)), counts)
        self.start = (np.arange(len(self.document)) - self._firsts[self.document]) * length  # in its document
        self._begin = (ends - self.lengths)[self.document] + self.start
        self._end = np.minimum(self._begin + length, ends[self.document])

    @classmethod
    def of(cls, documents: Iterable[Document], length: int) -> "Passages":
        """Return the passages of these documents, in memory."""
        names, parts = [], []
        for document in documents:
            names.append(document.name)
            parts.append(document.tokens)
        return cls(names, [len(part) for part in parts], np.concatenate([np.zeros(0, np.uint16), *parts]), length)

    def save(self, index: Path) -> None:
        np.save(index / "tokens.npy", self._tokens)
        facts = Documents(names=self.names, lengths=self.lengths.tolist())
        (index / "documents.json").write_text(json.dumps(facts))

    @classmethod
    def load(cls, index: Path, length: int) -> "Passages":
        """Return what `save` wrote, in passages of any length; processes share the tokens."""
        facts = read_json(index / "documents.json", Documents, f"remove {index}, and run it again")
        return cls(facts["names"], facts["lengths"], np.load(index / "tokens.npy", mmap_mode="r"), length)

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._tokens[self._begin[number] : self._end[number]]

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        return (tokenizer.decode(self[number].tolist()) for number in range(len(self)))

    def name(self, number: int) -> str:
        """Return the name of the passage's document."""
        return self.names[self.document[number]]

    def source(self, number: int) -> str:
        """Return the document's name and the first token, as `notes.txt@1200`."""
        return f"{self.name(number)}@{self.start[number]}"

    def numbers_of(self, names: Iterable[str]) -> np.ndarray:
        """Return the numbers of all passages of these documents, as far as they are here."""
        numbers = (self._documents[name] for name in names if name in self._documents)
        return np.concatenate([np.zeros(0, int), *(np.arange(*self._firsts[n : n + 2]) for n in numbers)])

    def padded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the passages' tokens (n, length), and how many of these are real (n,)."""
        tokens = np.full((len(numbers), self.length), PAD, self._tokens.dtype)
        lengths = (self._end[numbers] - self._begin[numbers]).astype(np.int32)
        for row, number, length in zip(tokens, numbers, lengths, strict=True):
            row[:length] = self[number]
        return tokens, lengths
