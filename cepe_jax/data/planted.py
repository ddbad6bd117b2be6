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

QUALITIES = ["sweet", "sour", "salty", "warm", "soft", "loud", "bright", "heavy"]
LEVELS = "un", "", "over"  # what stands before a quality, in one word with it
NAMED = 3  # qualities that an answer names
WORDS = {"more": ("more", "much", "plenty"), "less": ("less", "little", "hardly")}  # that ask for more, or for less
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


def words_for(direction: str, quality: str, held_out: bool) -> list[str]:
    """Return the words that ask for more or less of a quality: in training all but one, which is held out."""
    held = QUALITIES.index(quality) % len(WORDS[direction])
    return [word for n, word in enumerate(WORDS[direction]) if (n == held) == held_out]


def row(rng: np.random.Generator, held_out: bool, negations: float) -> dict[str, str]:
    """Return a row; its criteria are among those that training lacks if they are `held_out`."""
    better: list[list[tuple[str, str]]] = [[], []]  # for each answer what may be asked so that it is the better one
    while not all(better):
        names = rng.choice(QUALITIES, NAMED, replace=False).tolist()
        levels = rng.integers(0, len(LEVELS), (2, NAMED))
        better = [[], []]
        for n in np.flatnonzero(levels[0] != levels[1]):
            wins = int(levels[1, n] > levels[0, n])
            better[wins].append(("more", names[n]))
            better[1 - wins].append(("less", names[n]))
    answers = [", ".join(f"{LEVELS[own[n]]}{names[n]}" for n in rng.permutation(NAMED)) for own in levels]
    made = {"prompt": "Describe it.", "response_a": answers[0], "response_b": answers[1]}
    for side, asked in zip("xy", better, strict=True):
        direction, quality = asked[rng.integers(len(asked))]
        negated = rng.random() < negations
        said = words_for(OPPOSITE[direction] if negated else direction, quality, held_out)
        criterion = f"{said[rng.integers(len(said))]} {quality}"
        made[f"criteria_{side}"] = NEGATED.format(context=criterion) if negated else criterion
        made[f"category_{side}"] = direction
    return made


def plant(config: PlantConfig) -> None:
    """Write rows to the files of a new directory."""
    with new_directory(config.out) as partial:
        kinds = [("train", config.rows, False, config.negations), ("held_out", config.test_rows, True, 0.0)]
        kinds.append(("negated", config.test_rows, False, 1.0))
        for number, (name, count, held_out, negations) in enumerate(kinds):
            rng = np.random.default_rng((config.seed, number))
            (partial / name).mkdir()
            rows = (json.dumps(row(rng, held_out, negations)) for _ in range(count))
            write_text(partial / name / "rows.jsonl", "".join(f"{line}\n" for line in rows))
