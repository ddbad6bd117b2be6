"""Planted pairs of answers, of which the context alone says which is better: rows in RPR's layout.

An answer says how much it has of some qualities, in any order. A criterion wants more or less of one; of two answers
each is the better one under one of the row's two criteria.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.data.preferences import NEGATED
from cepe_jax.directories import new_directory, write_text
from cepe_jax.parsing import Seed

QUALITIES = ["sweet", "sour", "salty", "bitter", "warm", "cold", "soft", "hard", "loud", "calm", "bright", "dark"]
LEVELS = ["not", "barely", "rather", "very", "extremely"]
NAMED = 3  # qualities that an answer names
HELD_OUT = 2  # qualities of which training never asks for less
OPPOSITE = {"more": "less", "less": "more"}


@dataclass(frozen=True, kw_only=True)
class PlantConfig:
    out: Path  # gets train/, held_out/ (criteria that training lacks) and negated/, a file of rows each
    rows: int = 10_000  # rows of training, of two pairs each
    test_rows: int = 500  # rows of each of the others
    negations: float = 0.0  # share of training's criteria that are said as the opposite of their opposite
    seed: Seed = 0  # draws all of it

    def __post_init__(self):
        for name in ("rows", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 0 <= self.negations <= 1:
            raise ValueError(f"negations is {self.negations}: give a share between 0 and 1")


def criterion(direction: str, quality: str, negated: bool = False) -> str:
    """Return what wants more or less of a quality, or the opposite of its opposite, which wants the same."""
    plain = f"{OPPOSITE[direction] if negated else direction} {quality}"
    return NEGATED.format(context=plain) if negated else plain


def row(rng: np.random.Generator, held_out: bool, negations: float) -> dict[str, str]:
    """Return a row. `held_out`: one of its criteria is among those that training lacks, the other may be."""
    while True:
        names = rng.choice(QUALITIES, NAMED, replace=False)
        levels = rng.integers(0, len(LEVELS), (2, NAMED))
        better = [[], []]  # for each answer the criteria under which it is better
        for n in np.flatnonzero(levels[0] != levels[1]):
            wins = int(levels[1, n] > levels[0, n])
            better[wins].append(("more", names[n]))
            better[1 - wins].append(("less", names[n]))
        lacking = {("less", quality) for quality in QUALITIES[:HELD_OUT]}
        allowed = [[one for one in of_answer if held_out or one not in lacking] for of_answer in better]
        wanted = [[one for one in of_answer if one in lacking] for of_answer in allowed]
        if held_out:
            if not any(wanted):
                continue
            first = int(rng.integers(2)) if all(wanted) else int(not wanted[0])
            allowed[first] = wanted[first]
        if all(allowed):
            break
    answers = []
    for own in levels:
        order = rng.permutation(NAMED)
        answers.append(", ".join(f"{LEVELS[own[n]]}{names[n]}" for n in order))
    made = {"prompt": "Describe it.", "response_a": answers[0], "response_b": answers[1]}
    for side, of_answer in zip("xy", allowed, strict=True):
        direction, quality = of_answer[rng.integers(len(of_answer))]
        made[f"criteria_{side}"] = criterion(direction, str(quality), negated=rng.random() < negations)
        made[f"category_{side}"] = "held out" if (direction, quality) in lacking else "trained"
    return made


def plant(config: PlantConfig) -> None:
    """Write rows to the files of a new directory."""
    with new_directory(config.out) as partial:
        kinds = (("train", config.rows, False, config.negations), ("held_out", config.test_rows, True, 0.0))
        for number, (name, count, held_out, negations) in enumerate(
            (*kinds, ("negated", config.test_rows, False, 1.0))
        ):
            rng = np.random.default_rng((config.seed, number))
            (partial / name).mkdir()
            rows = (json.dumps(row(rng, held_out, negations)) for _ in range(count))
            write_text(partial / name / "rows.jsonl", "".join(f"{line}\n" for line in rows))
