"""Searching passages: BM25 over their words, or dot products of any encoder's vectors."""

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

BATCH = 64  # texts an encoder is given at once, and queries that are searched at once

Encoder = Callable[[list[str], int], np.ndarray]  # texts, and the width of the rows, 0 = any


class Searcher(Protocol):
    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers (Q, k) of the best passages for each query, best first, and their scores (Q, k), float32.

        None is among the query's `excluded`; of equals the lower number comes first. Where fewer than k are left the
        number is -1 and the score -inf.
        """


class BM25:
    """Words in common: Lucene's BM25 with k1 = 1.5, b = 0.75, without the words of bm25s' English stop list.

    Those would only cost time: the commoner a word, the less it weighs, and the more passages it is looked up in.
    """

    def __init__(self, index: Path):
        self._bm25s = import_bm25s()
        self._index = self._bm25s.BM25.load(index, mmap=True, show_progress=False)

    @staticmethod
    def build(index: Path, texts: Iterator[str]) -> None:
        bm25s = import_bm25s()
        words = bm25s.tokenize(texts, show_progress=False)
        if not words.vocab:
            raise ValueError("no passage has a word that BM25 could look for: give other --passages, or an --encoder")
        bm25 = bm25s.BM25()
        bm25.index(words, show_progress=False)
        bm25.save(index, show_progress=False)

    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores = nothing(len(queries), k)
        words = self._bm25s.tokenize(queries, return_ids=False, show_progress=False)
        for row, (of_query, own) in enumerate(zip(words, excluded, strict=True)):
            of_passages = self._index.get_scores_from_ids(self._index.get_tokens_ids(of_query))
            of_passages[own] = -np.inf
            found = best(of_passages, k)
            numbers[row, : len(found)], scores[row, : len(found)] = found, of_passages[found]
        return numbers, scores


def import_bm25s():
    """bm25s, kept from JAX: it would start its back end, and every worker would reach for the accelerator."""
    jax = sys.modules.get("jax")
    sys.modules["jax"] = None  # not to be had
    try:
        import bm25s
    finally:
        del sys.modules["jax"]
        if jax:
            sys.modules["jax"] = jax
    bm25s.logger.setLevel("WARNING")  # it asks for DEBUG, which absl prints
    return bm25s


def nothing(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((num_queries, k), -1), np.full((num_queries, k), -np.inf, np.float32)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The places of the k highest scores above -inf, highest first, of equals the lower place."""
    k = min(k, len(scores))
    least = np.partition(scores, -k)[-k]
    places = np.flatnonzero((scores >= least) & (scores > -np.inf))
    return places[np.argsort(-scores[places], kind="stable")[:k]]


class Dense:
    """The highest dot products of an encoder's vectors, over all passages."""

    def __init__(self, index: Path, encode: Encoder):
        import jax  # BM25 does without

        self._encode = encode
        self._vectors = jax.device_put(np.load(index / "vectors.npy"))
        self._nearest = jax.jit(nearest, static_argnames="k")

    @staticmethod
    def build(index: Path, texts: Iterator[str], encode: Encoder) -> None:
        rows = [encode(list(islice(texts, BATCH)), 0)]
        while batch := list(islice(texts, BATCH)):
            rows.append(encode(batch, rows[0].shape[1]))
        np.save(index / "vectors.npy", np.concatenate(rows))

    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores = nothing(len(queries), k)
        for start in range(0, len(queries), BATCH):
            part = queries[start : start + BATCH]
            queries_QE = np.zeros((BATCH, self._vectors.shape[1]), np.float32)  # one shape, compiled once
            queries_QE[: len(part)] = self._encode(part, self._vectors.shape[1])
            excluded_QN = np.zeros((BATCH, len(self._vectors)), bool)
            for row, own in zip(excluded_QN, excluded[start : start + BATCH], strict=False):
                row[own] = True
            top, places = self._nearest(self._vectors, queries_QE, excluded_QN, k=min(k, len(self._vectors)))
            rows = slice(start, start + len(part)), slice(places.shape[1])
            scores[rows] = top[: len(part)]
            numbers[rows] = np.where(scores[rows] > -np.inf, places[: len(part)], -1)
        return numbers, scores


def nearest(passages_NE, queries_QE, excluded_QN, k: int):
    """The k highest products of each query and their places; of equals the lower place, as `top_k` promises."""
    import jax
    import jax.numpy as jnp

    scores_QN = jnp.einsum("QE,NE->QN", queries_QE, passages_NE, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(excluded_QN, -jnp.inf, scores_QN), k)


def load_encoder(name: str) -> Encoder:
    """The function `module:function`; what it returns is checked, and made float32."""
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"encoder {name}: {error}: install it, or put its directory on PYTHONPATH") from None
    if not hasattr(module, function):
        raise ValueError(f"encoder {name}: {module_name} has no {function}: correct the name")

    def encode(texts: list[str], width: int) -> np.ndarray:
        vectors = np.asarray(getattr(module, function)(texts), np.float32)
        if vectors.ndim != 2 or vectors.shape != (len(texts), width or vectors.shape[1]):
            wanted = f"({len(texts)}, {width or 'width'})"
            raise ValueError(f"encoder {name} returned {vectors.shape} for {len(texts)} texts: return {wanted}")
        if not np.isfinite(vectors).all():
            raise ValueError(f"encoder {name} returned numbers that are not finite: mend it, and use another --out")
        return vectors

    return encode
