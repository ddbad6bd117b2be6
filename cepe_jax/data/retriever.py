"""Chunks of documents for a question: found by their words, by an encoder's vectors or by both, in memory."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from cepe_jax.data.builder import token_dtype
from cepe_jax.data.corpus import Corpus
from cepe_jax.data.examples import Document
from cepe_jax.data.passages import Passages
from cepe_jax.data.records import is_dataset, read_index
from cepe_jax.data.search import BM25, Dense, Fused, Searcher, check_encoder_name, load_encoder
from cepe_jax.data.sources import plan, read
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.progress import track

log = logging.getLogger(__name__)

Order = Literal["best_last", "best_first", "document"]
PATTERNS = "**/*.txt", "**/*.md", "**/*.rst", "**/*.py"


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """The documents of a corpus, in chunks, and the search in them."""

    chunk: int = 1200  # tokens of a chunk; a document's last one is shorter
    search: Literal["bm25", "dense", "fused"] = "bm25"  # by words, by vectors, by both, fused by reciprocal rank
    encoder: str = ""  # of dense and fused, module:function: (n, width) for n texts, compared by dot product
    # Best last: next to the question, and what overflows a decoder's window is dropped from the other end.
    order: Order = "best_last"  # of the chunks in a prompt; document: as they stand in the corpus
    split: str = ""  # of a dataset of documents; "": all its splits
    patterns: tuple[str, ...] = PATTERNS  # files of a folder of texts; those below a folder .NAME are left out

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}: give a number of tokens above 0")
        check_encoder_name(self.encoder)
        if self.search != "bm25" and not self.encoder:
            raise ValueError(f"search is {self.search}: give an encoder too, module:function")
        if self.search == "bm25" and self.encoder:
            raise ValueError(f"encoder is {self.encoder}, and search bm25 reads none: give search dense or fused")


@dataclass(frozen=True)
class Chunk:
    """A chunk that was found for a question."""

    number: int  # among all chunks, in the order of the documents
    document: str  # its name
    start: int  # its first token in the document
    length: int  # tokens
    score: float
    text: str

    @property
    def source(self) -> str:
        """Return the document and the first token, as `notes.txt@1200`."""
        return f"{self.document}@{self.start}"


class Retriever:
    """The chunks of documents, and a search in them."""

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer, config: RetrieverConfig, name: str):
        """Index the documents, whose tokens are the tokenizer's; errors call them `name`."""
        encode = load_encoder(config.encoder) if config.encoder else None
        self.name, self._order = name, config.order
        self._passages = Passages.of(track(documents, "read, documents"), config.chunk)
        if not len(self):
            raise ValueError(f"{name} has no documents: give a corpus with text")
        self._texts = list(track(self._passages.texts(tokenizer), "read, chunks", len(self)))
        self._blank = np.array([n for n, text in enumerate(self._texts) if not text.strip()], int)  # such as EOS alone
        searchers: list[Searcher] = []
        if config.search != "dense":
            searchers.append(BM25.of(track(self._texts, "index, chunks"), only_matches=True))
        if encode:
            searchers.append(Dense.of(track(self._texts, "encode, chunks"), encode))
        self._searcher = Fused(searchers, len(self)) if config.search == "fused" else searchers[0]

    @classmethod
    def open(cls, corpus: Path, tokenizer: Tokenizer, config: RetrieverConfig) -> "Retriever":
        """Return the retriever of a dataset of documents, or of a folder of texts, which `tokenizer` encodes.

        A dataset's chunks are tokens of its own tokenizer, whichever is given.
        """
        if is_dataset(corpus):
            splits = [Corpus(corpus, split) for split in splits_of(corpus, config.split)]
            return cls(chain.from_iterable(splits), splits[0].tokenizer, config, str(corpus))
        if config.split:
            raise ValueError(f"split is {config.split}, and {corpus} is a folder of texts: leave it out")
        return cls(documents_in(corpus, tokenizer, config.patterns), tokenizer, config, str(corpus))

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._passages)

    def search(self, question: str, k: int) -> list[Chunk]:
        """Return the best k chunks, the best first; fewer if BM25 searches and fewer share a word with the question."""
        check_k(k)
        if k > len(self):
            size = self._passages.length
            raise ValueError(f"k is {k}, and {self.name} has {len(self)} chunks of {size} tokens: ask for fewer")
        numbers_QK, scores_QK = self._searcher.search([question], [self._blank], k)
        pairs = zip(numbers_QK[0].tolist(), scores_QK[0].tolist(), strict=True)
        return [self._chunk(number, score) for number, score in pairs if number >= 0]

    def in_order(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return the chunks, of which the best is first, in the order in which a prompt has them."""
        match self._order:
            case "best_first":
                return list(chunks)
            case "best_last":
                return chunks[::-1]
            case "document":
                return sorted(chunks, key=lambda chunk: chunk.number)

    def _chunk(self, number: int, score: float) -> Chunk:
        place = self._passages.name(number), int(self._passages.start[number]), len(self._passages[number])
        return Chunk(number, *place, score, self._texts[number])


def check_k(k: int) -> None:
    """Raise ValueError unless at least one chunk is asked for."""
    if k < 1:
        raise ValueError(f"k is {k}: give 1 or more")


def splits_of(corpus: Path, split: str) -> list[str]:
    """Return the splits of a dataset that are searched; ValueError if all are empty."""
    if split:
        return [split]
    if splits := [name for name, facts in read_index(corpus)["splits"].items() if facts["records"]]:
        return splits
    raise ValueError(f"{corpus} has no documents: give a corpus with text")


def documents_in(folder: Path, tokenizer: Tokenizer, patterns: tuple[str, ...]) -> Iterator[Document]:
    """Yield the texts in a folder, tokenised, without BOS and EOS.

    Empty ones are left out, and so are those that cannot be read, which are told.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    for extent in chain.from_iterable(plan(folder, patterns, (), 1 << 28)):
        if any(part.startswith(".") for part in PurePath(extent.path).parts[:-1]):
            continue
        for document in read(folder, extent, ""):
            if document.text is None:
                log.warning("left out: %s", document.fault)
            if document.fault:
                continue
            parts = (np.asarray(part, dtype) for part in tokenizer.parts(document.text))
            yield Document(document.name, np.concatenate([*parts]), document.domain)
