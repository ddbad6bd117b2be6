"""Task-gram tables (arXiv 2407.14985, definitions 1 and 2): pairs of n-grams, of a prompt and of its answer.

C(s_x, s_y) is the number of documents that hold both, wherever they stand; C(s_x) is the number of occurrences.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from cepe_jax.data.records import Count, Size
from cepe_jax.data.search import BATCH, Encoder, load_encoder
from cepe_jax.directories import new_directory, write_json
from cepe_jax.identity import as_json
from cepe_jax.parsing import parse_json, read_json
from cepe_jax.progress import track
from cepe_jax.tracing.index import Index, Ngram
from cepe_jax.tracing.words import ngrams, placed_words, words_of

FACTS, PAIRS, EXAMPLES = "table.json", "pairs.jsonl", "examples.jsonl"


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    examples: Path  # a .jsonl file of a task: an object with `prompt` and `answer` in each line
    index: Path  # the index of the corpus
    out: Path  # gets the table
    encoder: str  # module:function: (m, width) for a list of m texts; pairs are kept by the cosine of their vectors
    gamma: float  # cosine above which a pair is kept
    n: int = 3  # words of an n-gram
    whole_answer: bool = False  # the whole answer, however long, is the n-gram of the answer

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n is {self.n}: give a number of words above 0")
        if not -1 <= self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}: give a cosine of -1 to below 1")
        if not all(self.encoder.partition(":")):
            raise ValueError(f"encoder is {self.encoder}: give module:function")


class Example(TypedDict):
    """A line of a task."""

    prompt: str
    answer: str


class Pair(TypedDict):
    """A pair of a table."""

    x: str  # words of the prompt, a space between them
    y: str  # words of the answer
    cosine: float
    documents: Count  # that hold both
    count: Count  # occurrences of x


class Facts(TypedDict):
    """The facts of a table."""

    n: Size
    whole_answer: bool
    gamma: float
    encoder: str
    index: str  # its digest
    examples: Count
    pairs: Count


@dataclass(frozen=True)
class Target:
    """An n-gram of an answer, where it first occurs, with its pairs in the table."""

    example: int
    y: Ngram
    word: int  # the number of its first word in the answer
    start: int  # its first character in the answer
    end: int  # one past its last
    pairs: list[Pair]


def read_examples(path: Path) -> list[Example]:
    """Return the examples in a file; ValueError names the first bad line."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: give a .jsonl file of prompts and answers")
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    mend = "give each line a prompt and an answer"
    examples = {n: parse_json(line, f"{path}:{n}", Example, mend) for n, line in lines}
    empty = next((n for n, one in examples.items() if not (one["prompt"].strip() and one["answer"].strip())), 0)
    if empty or not examples:
        raise ValueError(f"{path}{f':{empty}' if empty else ''}: is empty: {mend}")
    return list(examples.values())


def answer_words(words: list[str], n: int, whole: bool) -> list[Ngram]:
    """Return the n-grams of an answer: all of n words, or its words as one."""
    return ngrams(words, n) if not whole else [tuple(words)] if words else []


def make_table(config: TableConfig) -> None:
    """Write the table of a task at `config.out`: the pairs with their counts in the corpus."""
    examples, index, encode = read_examples(config.examples), Index(config.index), load_encoder(config.encoder)
    index.check_knows(word for example in examples for text in example.values() for word in words_of(text))
    both = [
        (
            list(dict.fromkeys(ngrams(words_of(example["prompt"]), config.n))),
            list(dict.fromkeys(answer_words(words_of(example["answer"]), config.n, config.whole_answer))),
        )
        for example in examples
    ]
    texts = list(dict.fromkeys(ngram for sides in both for side in sides for ngram in side))
    if not texts:
        raise ValueError(f"{config.examples}: no prompt or answer has {config.n} words: lower n")
    vectors_NE = embed(encode, [" ".join(ngram) for ngram in texts])
    numbers = {ngram: number for number, ngram in enumerate(texts)}
    cosines: dict[tuple[Ngram, Ngram], float] = {}
    for xs, ys in both:
        cosines_XY = vectors_NE[[numbers[x] for x in xs]] @ vectors_NE[[numbers[y] for y in ys]].T
        for a, b in np.argwhere(cosines_XY > config.gamma):
            if xs[a] != ys[b]:
                cosines[xs[a], ys[b]] = float(cosines_XY[a, b])
    if not cosines:
        raise ValueError(f"no pair of {config.n}-grams has a cosine above gamma {config.gamma}: lower gamma or n")
    pairs = list(cosines)
    counts = index.counts([x for x, _ in pairs])
    documents = index.codocuments(pairs)
    facts: Facts = {
        "n": config.n,
        "whole_answer": config.whole_answer,
        "gamma": config.gamma,
        "encoder": config.encoder,
        "index": index.digest,
        "examples": len(examples),
        "pairs": len(pairs),
    }
    with new_directory(config.out) as place:
        rows = zip(pairs, documents.tolist(), counts.tolist(), strict=True)
        written: list[Pair] = [
            {"x": " ".join(x), "y": " ".join(y), "cosine": cosines[x, y], "documents": both, "count": count}
            for (x, y), both, count in rows
        ]
        write_lines(place / PAIRS, written)
        write_lines(place / EXAMPLES, examples)
        write_json(place / FACTS, facts | {"config": as_json(config)})
    print(
        f"{config.out}: {len(pairs):,} pairs of {len(examples):,} examples; {(documents > 0).sum():,} stand in a "
        f"document together, and the first n-gram of {(counts == 0).sum():,} occurs nowhere"
    )


def embed(encode: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors (N, width) of the texts, of length 1; one of length 0 stays."""
    rows: list[np.ndarray] = []
    for start in track(range(0, len(texts), BATCH), "encode, batches"):
        rows.append(encode(list(texts[start : start + BATCH]), rows[0].shape[1] if rows else 0))
    vectors_NE = np.concatenate(rows).astype(np.float64)
    return vectors_NE / np.maximum(np.linalg.norm(vectors_NE, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def write_lines(path: Path, values: Sequence) -> None:
    """Write each value as a line of JSON."""
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


class Table:
    """The table at `path`."""

    def __init__(self, path: Path):
        if not (path / FACTS).exists():
            raise FileNotFoundError(f"{path}: no table: make it with scripts/tracing.py table")
        mend = "make the table again"
        self.path, self.facts = path, read_json(path / FACTS, Facts, mend)
        self.n = self.facts["n"]
        if absent := [name for name in (EXAMPLES, PAIRS) if not (path / name).exists()]:
            raise FileNotFoundError(f"{path} has no {' and no '.join(absent)}: {mend}")
        self.examples = read_examples(path / EXAMPLES)
        lines = (path / PAIRS).read_bytes().split(b"\n")[:-1]
        self.pairs = [parse_json(line, f"{path / PAIRS}:{n}", Pair, mend) for n, line in enumerate(lines, 1)]
        counts = len(self.examples), len(self.pairs)
        if counts != (self.facts["examples"], self.facts["pairs"]):
            wanted = f"{self.facts['examples']} and {self.facts['pairs']}"
            raise ValueError(f"{path}: {counts[0]} examples and {counts[1]} pairs of a table that has {wanted}: {mend}")

    def check_is_of(self, index: Index) -> None:
        """Raise ValueError if the table has the counts of another index."""
        if self.facts["index"] != index.digest:
            raise ValueError(f"{self.path} has counts of another index than {index.path}: make the table again")

    def targets(self) -> Iterator[Target]:
        """Yield the n-grams of each answer that have a pair with an n-gram of its prompt, each one once."""
        rows = {(pair["x"], pair["y"]): pair for pair in self.pairs}
        for number, example in enumerate(self.examples):
            xs = list(dict.fromkeys(" ".join(x) for x in ngrams(words_of(example["prompt"]), self.n)))
            words = placed_words(example["answer"])
            ys = answer_words([word.word for word in words], self.n, self.facts["whole_answer"])
            firsts: dict[Ngram, int] = {}
            for at, y in enumerate(ys):
                firsts.setdefault(y, at)
            for y, at in firsts.items():
                pairs = [rows[x, " ".join(y)] for x in xs if (x, " ".join(y)) in rows]
                if pairs:
                    yield Target(number, y, at, words[at].start, words[at + len(y) - 1].end, pairs)
