"""Planted corpora with two tasks: facts, which a model can only have from documents, and a rule, which it can learn.

A fact is a subject of two words and its capital, two words too. It stands in as many documents as Zipf's law says by
its rank; in others the subject stands in the same words without its capital, so that all subjects are as frequent.
Capitals also stand in lists of capitals alone. The rule turns two words around. Its questions stand in no document;
their words and answers do, among others in lists, again as many as Zipf's law says.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.directories import new_directory
from cepe_jax.parsing import Seed
from cepe_jax.progress import track

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
FACT, OTHER = "the capital of {} is {}", "the weather of {} is {} {}"
WEATHER = "mild", "cold", "wet", "dry", "grey", "fair"
RULE = "turn {} gives {}"
LISTS = 8  # documents with a capital in a list, without its subject
PER_LIST = 6  # entries of a list
RULE_WORDS, RULE_DOCUMENTS = 40, 6000  # words that the rule is about, and documents that follow it
PASSAGE = 1000  # words of a document of filler
FILLER_WORDS = 200_000  # different words of filler
COPIED = 0.1  # share of filler documents that copy an earlier one


@dataclass(frozen=True, kw_only=True)
class PlantConfig:
    out: Path  # gets documents/, and the tasks facts.jsonl and rule.jsonl
    examples: int = 160  # facts, and questions of the rule
    most: int = 64  # documents with the most frequent fact, and of each subject
    exponent: float = 0.8  # of Zipf's law: the fact of rank r stands in most / r^exponent documents
    filler: int = 0  # words of further documents, drawn by Zipf's law, some of it copied: to try an index at a size
    seed: Seed = 0  # draws all of it

    def __post_init__(self):
        for name in ("examples", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.examples > RULE_WORDS * (RULE_WORDS - 1) // 4:
            raise ValueError(f"examples is {self.examples}: the rule has {RULE_WORDS * (RULE_WORDS - 1) // 4} at most")
        if self.filler < 0 or not self.exponent > 0:
            raise ValueError(f"filler is {self.filler} and exponent {self.exponent}: give 0 or more, and above 0")


def zipf(config: PlantConfig) -> np.ndarray:
    """Return the number of documents of each rank, at least 1."""
    return np.maximum(config.most / np.arange(1, config.examples + 1) ** config.exponent, 1).round().astype(int)


def syllables(number: int, count: int) -> str:
    """Return the made-up word with this number, of `count` syllables."""
    word = ""
    for _ in range(count):
        number, vowel = divmod(number, len(VOWELS))
        number, consonant = divmod(number, len(CONSONANTS))
        word += CONSONANTS[consonant] + VOWELS[vowel]
    return word


def lists(entries: list[str], title: str, rng: np.random.Generator) -> Iterator[str]:
    """Yield lists of the entries in random order."""
    order = [entries[n] for n in rng.permutation(len(entries))]
    for at in range(0, len(order), PER_LIST):
        yield f"{title} {' , '.join(order[at : at + PER_LIST])}"


def facts(words: list[str], config: PlantConfig, rng: np.random.Generator) -> tuple[list[str], list[dict[str, str]]]:
    """Return the documents with facts, those without, and the examples of the task."""
    documents, examples, capitals = [], [], []
    for number, count in enumerate(zipf(config)):
        subject, capital = (" ".join(words[4 * number + at : 4 * number + at + 2]) for at in (0, 2))
        documents += [FACT.format(subject, capital)] * count
        documents += [OTHER.format(subject, *rng.choice(WEATHER, 2)) for _ in range(config.most - count)]
        capitals.append(capital)
        examples.append({"prompt": FACT.format(subject, "").strip(), "answer": capital})
    for _ in range(LISTS):
        documents += lists(capitals, "towns", rng)
    return documents, examples


def rule(words: list[str], config: PlantConfig, rng: np.random.Generator) -> tuple[list[str], list[dict[str, str]]]:
    """Return the documents with the rule, the lists, and the examples of the task."""
    pairs = [(a, b) for n, a in enumerate(words) for b in words[n + 1 :]]
    pairs = [pairs[n][:: rng.choice((-1, 1))] for n in rng.permutation(len(pairs))]
    asked, known = pairs[: config.examples], pairs[config.examples :]
    known += [pair[::-1] for pair in known]
    drawn = [known[n] for n in rng.integers(0, len(known), RULE_DOCUMENTS)]
    documents = [RULE.format(f"{a} {b}", f"{b} {a}") for a, b in drawn]
    for (a, b), count in zip(asked, zipf(config), strict=True):
        for _ in range(count):
            others = [" ".join(known[n]) for n in rng.integers(0, len(known), PER_LIST - 2)]
            documents += lists([*others, f"{a} {b}", f"{b} {a}"], "seen", rng)
    examples = [{"prompt": RULE.format(f"{a} {b}", "").strip(), "answer": f"{b} {a}"} for a, b in asked]
    return documents, examples


def filler(config: PlantConfig, rng: np.random.Generator) -> Iterator[str]:
    """Yield documents of words by Zipf's law with exponent 1; some begin as an earlier one does, in half its words."""
    words = np.array([syllables(number, 4) for number in range(FILLER_WORDS)])
    shares = np.cumsum(1 / np.arange(1, FILLER_WORDS + 1))
    kept: list[np.ndarray] = []
    for _ in range(-(-config.filler // PASSAGE)):
        drawn = np.searchsorted(shares, rng.random(PASSAGE) * shares[-1])
        if kept and rng.random() < COPIED:
            drawn[: PASSAGE // 2] = kept[rng.integers(len(kept))][: PASSAGE // 2]
        elif len(kept) < 1000:
            kept.append(drawn)
        yield " ".join(words[drawn])


def plant(config: PlantConfig) -> None:
    """Write a corpus and its tasks to a new directory."""
    rng = np.random.default_rng(config.seed)
    words = [syllables(number, 2) for number in rng.permutation((len(CONSONANTS) * len(VOWELS)) ** 2)]
    of_facts, of_rule = facts(words[RULE_WORDS:], config, rng), rule(words[:RULE_WORDS], config, rng)
    documents = [*of_facts[0], *of_rule[0]]
    with new_directory(config.out) as place:
        (place / "documents").mkdir()
        with (place / "documents/planted.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": documents[n]}) + "\n" for n in rng.permutation(len(documents)))
        if config.filler:
            with (place / "documents/filler.jsonl").open("w") as file:
                for text in track(filler(config, rng), "write, documents", -(-config.filler // PASSAGE)):
                    file.write(json.dumps({"text": text}) + "\n")
        for name, (_, examples) in (("facts", of_facts), ("rule", of_rule)):
            (place / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
