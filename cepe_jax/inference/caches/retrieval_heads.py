"""The retrieval heads of a model (RazorAttention, section 3.2), selected by scores that a file beside it holds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.config import DecoderConfig
from cepe_jax.parsing import read_json
from cepe_jax.weights.directory import Directory
from cepe_jax.weights.source import open_model

FILE = "retrieval_heads.json"


@dataclass(frozen=True)
class Scores:
    """The content of the file: the hash of the decoder's weights, what it read, and scores (layers, key heads)."""

    base: str
    block: int
    seed: int
    induction: list[list[float]]
    echo: list[list[float]]


def read_scores(path: Path, decoder: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return induction and echo scores, (layers, key heads), of the model at `path`; ValueError if they are not its."""
    again = f"run scripts/calibrate.py {path}"
    if not isinstance(model := open_model(path), Directory):
        raise ValueError(
            f"{path} is not in our format, which cache.kind razor needs: run scripts/convert.py to-jax on it"
        )
    base = model.base_hash
    if not (file := path / FILE).exists():
        raise ValueError(f"{path} has no {FILE}, which says what heads keep all tokens: {again}")
    scores = read_json(file, Scores, again)
    if scores.base != base:
        raise ValueError(f"{file} belongs to another model: {again}")
    shape = decoder.num_layers, decoder.num_kv_heads
    for name in ("induction", "echo"):
        rows = getattr(scores, name)
        if [len(row) for row in rows] != [shape[1]] * shape[0] or not np.isfinite(rows).all():
            raise ValueError(f"{file}: {name} has no number for each of {shape[0]} x {shape[1]} heads: {again}")
    return np.array(scores.induction), np.array(scores.echo)


def retrieval_heads(
    induction_ZK: np.ndarray, echo_ZK: np.ndarray, induction: float, echo: float
) -> tuple[tuple[int, int], ...]:
    """Return (layer, key head) of the heads with the largest scores: a share of all heads by each of the two scores.

    Of heads with equal scores the first are taken.
    """
    heads: set[int] = set()
    for scores_ZK, share in ((induction_ZK, induction), (echo_ZK, echo)):
        order = np.argsort(-scores_ZK, axis=None, kind="stable")
        heads |= set(order[: round(share * len(order))].tolist())
    return tuple(divmod(head, induction_ZK.shape[1]) for head in sorted(heads))
