"""BM25 and dot products, written out: what searches are compared with."""

import collections
import math
import re
from collections.abc import Callable

import numpy as np

COMMON = ["the", "is", "of"]  # words that BM25 leaves out, of those in tests


def bm25_scores(query: str, texts: list[str]) -> np.ndarray:
    """Robertson's BM25 with Lucene's idf, as in Kamphuis et al. 2020, one sum for each text."""
    k1, b = 1.5, 0.75
    documents = [[w for w in re.findall(r"\w\w+", text.lower()) if w not in COMMON] for text in texts]
    counts = [collections.Counter(document) for document in documents]
    average = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(texts))
    for word in re.findall(r"\w\w+", query.lower()):
        holding = sum(word in count for count in counts)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for number, (document, count) in enumerate(zip(documents, counts, strict=True)):
            share = count[word] / (count[word] + k1 * (1 - b + b * len(document) / average))
            scores[number] += idf * share
    return scores


def dot_scores(encode: Callable[[list[str]], np.ndarray], query: str, texts: list[str]) -> np.ndarray:
    return np.asarray(encode(texts), np.float64) @ np.asarray(encode([query]), np.float64)[0]
