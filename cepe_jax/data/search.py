"""Searching passages: BM25 over their words, dot products of any encoder's vectors, or both."""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

BATCH = 64  # texts an encoder is given at once, and queries that are searched at once
RRF = 60  # is added to ranks before their reciprocals are summed (Cormack, Clarke and Buettcher 2009)
VECTORS = "vectors.npy"

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

    def __init__(self, index, only_matches: bool = False):
        """`index` is one of bm25s. With `only_matches` a passage without a word of the query is not found."""
        self._bm25s, self._index, self._only_matches = import_bm25s(), index, only_matches

    @classmethod
    def of(cls, texts: Iterable[str], only_matches: bool = False) -> "BM25":
        """Return the index of these passages, in memory."""
        bm25s = import_bm25s()
        words = bm25s.tokenize(iter(texts), show_progress=False)
        if not words.vocab:
            raise ValueError("no passage has a word that BM25 could look for: search other texts, or by an encoder")
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return cls(index, only_matches)

    def save(self, index: Path) -> None:
        self._index.save(index, show_progress=False)

    @classmethod
    def load(cls, index: Path) -> "BM25":
        """Return what `save` wrote; processes share it."""
        return cls(import_bm25s().BM25.load(index, mmap=True, show_progress=False))

    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores = nothing(len(queries), k)
        words = self._bm25s.tokenize(queries, return_ids=False, show_progress=False)
        for row, (of_query, own) in enumerate(zip(words, excluded, strict=True)):
            of_passages = self._index.get_scores_from_ids(self._index.get_tokens_ids(of_query))
            if self._only_matches:
                of_passages[of_passages == 0] = -np.inf
            of_passages[own] = -np.inf
            places = best(of_passages, k)
            numbers[row, : len(places)], scores[row, : len(places)] = places, of_passages[places]
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

    def __init__(self, vectors_NE: np.ndarray, encode: Encoder):
        self._vectors_NE, self._encode = vectors_NE, encode

    @classmethod
    def of(cls, texts: Iterable[str], encode: Encoder) -> "Dense":
        """Return the vectors of these passages, in memory."""
        texts = iter(texts)
        rows = [encode(list(islice(texts, BATCH)), 0)]
        while batch := list(islice(texts, BATCH)):
            rows.append(encode(batch, rows[0].shape[1]))
        return cls(np.concatenate(rows), encode)

    def save(self, index: Path) -> None:
        np.save(index / VECTORS, self._vectors_NE)

    @classmethod
    def load(cls, index: Path, encode: Encoder) -> "Dense":
        return cls(np.load(index / VECTORS), encode)

    @cached_property
    def _on_device(self):
        """The vectors, and the compiled search; what is built to be saved needs no device, nor does BM25."""
        import jax

        return jax.device_put(self._vectors_NE), jax.jit(nearest, static_argnames="k")

    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores = nothing(len(queries), k)
        vectors_NE, search = self._on_device
        count, width = vectors_NE.shape
        for start in range(0, len(queries), BATCH):
            part = queries[start : start + BATCH]
            queries_QE = np.zeros((BATCH, width), np.float32)  # one shape, compiled once
            queries_QE[: len(part)] = self._encode(part, width)
            excluded_QN = np.zeros((BATCH, count), bool)
            for row, own in zip(excluded_QN, excluded[start : start + BATCH], strict=False):
                row[own] = True
            top, places = search(vectors_NE, queries_QE, excluded_QN, k=min(k, count))
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


class Fused:
    """Rankings by several searchers in one: a passage's score is the sum of 1 / (RRF + rank) over those that find it.

    Ranks count from 1, and each searcher ranks all of `count` passages: so the best k are the first of the best k + 1.
    """

    def __init__(self, searchers: Sequence[Searcher], count: int):
        self._searchers, self._count = searchers, count

    def search(self, queries: list[str], excluded: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores = nothing(len(queries), k)
        fused_QN = np.zeros((len(queries), self._count))
        for searcher in self._searchers:
            ranked_QN, _ = searcher.search(queries, excluded, self._count)
            for fused_N, ranked_N in zip(fused_QN, ranked_QN, strict=True):
                ranked = ranked_N[ranked_N >= 0]
                fused_N[ranked] += 1 / (RRF + 1 + np.arange(len(ranked)))
        for row, fused_N in enumerate(fused_QN):
            places = best(np.where(fused_N > 0, fused_N, -np.inf), k)
            numbers[row, : len(places)], scores[row, : len(places)] = places, fused_N[places]
        return numbers, scores


def check_encoder_name(name: str) -> None:
    """Raise ValueError unless it is empty or of the form that `load_encoder` takes."""
    module, colon, function = name.partition(":")
    if name and not (module and colon and function):
        raise ValueError(f"encoder is {name}: give module:function, or leave it out for BM25")


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
