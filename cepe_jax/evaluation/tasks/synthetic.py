"""Texts of any length with something to be found in them, made on the spot: needles, and tasks after RULER (2024).

As in RULER: one needle, several keys, values or questions; a chain of assignments; the words of a list that come most
often; the words of a text that come most often. Unlike RULER's, prompts have no worked example before the question.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cepe_jax.data.sources import decoded
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.tasks.metrics import SENTENCE_ENDS
from cepe_jax.evaluation.tasks.protocols import Protocol, Template
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.selection import generator
from cepe_jax.evaluation.tasks.task import LongText, register
from cepe_jax.inference.overflow import begun
from cepe_jax.progress import track

Kind = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"
]
# Keys that the text has, values of each key, keys that are asked for.
NEEDLES = {"single": (1, 1, 1), "multi_key": (4, 1, 1), "multi_value": (1, 4, 1), "multi_query": (4, 1, 4)}
HOPS = 4  # assignments of variable_tracking after the first
COMMON = 10  # words of common_words that are asked for
REPEATS, SHORT_REPEATS, SHORT = (30, 3), (6, 1), 4096  # how often these and others come; in texts below so many tokens
FREQUENT = 3  # words of frequent_words that are asked for: of the ranks 2 to 4, behind the word DOTS
DOTS = "...."
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly, however many there are
NAMES = (
    "amber,azure,black,bronze,brown,copper,coral,crimson,golden,green,grey,ivory,jade,olive,purple,red",
    "anchor,basket,bridge,candle,castle,feather,garden,hammer,ladder,lantern,mirror,orchard,pillow,river",
)
NOISE = (
    "The baker,The captain,A child,The doctor,The farmer,A friend,The gardener,The miller,A sailor,The teacher",
    "counts,cleans,draws,finds,keeps,mends,moves,paints,sells,washes",
    "boats,books,clocks,coats,doors,jars,maps,plates,shoes,tables",
    "in spring,at noon,in the evening,every Monday,after the rain,before lunch,on market days,all year",
)


@register
@dataclass(frozen=True, kw_only=True)
class Synthetic(LongText):
    """The decoder reads the end of the text and the question. The axis counts the tokens of all that is read."""

    family: str = "synthetic"
    kind: Kind = "single"  # what is hidden in the text, to be found (synthetic)
    haystack: Path | None = None  # a text file to hide it in; None: sentences made up (synthetic)

    usual = Protocol(Template(question="Question: {question}"), ("match_all", "match_part"), max_new_tokens=128)
    axis_name = "tokens of the whole text, with what is generated"

    def __post_init__(self):
        if self.samples is None:
            raise ValueError("samples is missing: say how many synthetic texts there are to be for each seed")
        super().__post_init__()

    def places(self) -> dict[Path, str]:
        return {} if self.haystack is None else {self.haystack: ""}

    def questions(self, value: int, tokenizer: Tokenizer) -> list[tuple[int, Question]]:
        sentences = sentences_of(self.haystack) if self.haystack else []

        def tokens_of(question: Question) -> int:
            return len(begun("".join(self.document(question)), tokenizer)) + self.protocol.max_new_tokens

        def texts_of(seed: int) -> Iterator[Question]:
            questions = texts(self.kind, value, self.samples, seed, sentences, tokens_of)
            return track(questions, f"make {self.kind}, {value}", self.samples)

        return [(seed, question) for seed in self.seeds for question in texts_of(seed)]


@dataclass(frozen=True)
class Text:
    """A text that can grow: `parts(n)` are what it consists of at size n, more of them for a larger n."""

    parts: Callable[[int], list[str]]
    question: str
    answers: tuple[str, ...]
    depths: tuple[float, ...] = ()  # of what is to be found: 0 the beginning of the text, 1 its end


def sentences_of(path: Path) -> list[str]:
    """The sentences of a text file."""
    text, fault = decoded(path.read_bytes(), path)
    if fault:
        raise ValueError(f"{fault}: give a haystack of text")
    return SENTENCE_ENDS.split(" ".join(text.split()))


def texts(
    kind: Kind, length: int, samples: int, seed: int, haystack: Sequence[str], tokens_of: Callable[[Question], int]
) -> Iterator[Question]:
    """`samples` records, the text of each as long as it can be while `tokens_of` the record is at most `length`.

    Needles are hidden among the sentences of `haystack`, without any among sentences that say nothing. What is asked
    is a function of the seed and the record's number, whatever the length; where the first needle stands moves through
    the text from record to record.
    """
    for number in range(samples):
        rng = generator(seed, kind, number)
        text = _text(kind, rng, number * GOLDEN % 1, haystack, REPEATS if length >= SHORT else SHORT_REPEATS)

        def question(size: int, text=text, name=f"{kind}-{number}") -> Question:
            context = " ".join(text.parts(size))
            return Question(name, text.question, text.answers, contexts=(context,), depths=text.depths)

        yield question(_largest(lambda size, question=question: tokens_of(question(size)), length, f"{kind}-{number}"))


def _largest(tokens_of: Callable[[int], int], most: int, name: str) -> int:
    """The largest size that has at most so many tokens: found by doubling, then by interpolation."""
    low, high = 0, 16
    at_low, at_high = tokens_of(low), tokens_of(high)
    if at_low > most:
        raise ValueError(f"record {name} has {at_low} tokens without any haystack, and the length is {most}: give more")
    while at_high <= most:
        low, at_low, high = high, at_high, 2 * high
        at_high = tokens_of(high)
    while high - low > 1:
        share = (most - at_low) / (at_high - at_low)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tokens = tokens_of(middle)
        if tokens <= most:
            low, at_low = middle, tokens
        else:
            high, at_high = middle, tokens
    return low


def _text(kind: Kind, rng: random.Random, depth: float, haystack: Sequence[str], repeats: tuple[int, int]) -> Text:
    if kind == "common_words":
        return _common_words(rng, *repeats)
    if kind == "frequent_words":
        return _frequent_words(rng)
    hay = _sentences(haystack, rng) if haystack else _noise(rng)
    return _variables(rng, hay) if kind == "variable_tracking" else _needles(rng, depth, hay, *NEEDLES[kind])


def _needles(rng: random.Random, depth: float, hay: Iterator[str], keys: int, each: int, asked: int) -> Text:
    pairs = itertools.product(*(words.split(",") for words in NAMES))
    names = [" ".join(pair) for pair in rng.sample(list(pairs), keys)]
    numbers = iter(rng.sample(range(10**6, 10**7), keys * each))
    facts = [(name, str(next(numbers))) for name in names for _ in range(each)]
    places = [depth, *(rng.random() for _ in facts[1:])]
    of_asked = [i for i, (name, _) in enumerate(facts) if name in names[:asked]]
    whose = " and ".join(f"the {name}" for name in names[:asked])
    verb, number = ("are", "numbers") if asked * each > 1 else ("is", "number")
    question = f"What {verb} the secret {number} of {whose}?\nAnswer: The secret {number} of {whose} {verb}"
    needles = [f"A secret number of the {name} is {value}." for name, value in facts]
    return Text(
        _hidden(needles, places, hay),
        question,
        tuple(facts[i][1] for i in of_asked),
        tuple(places[i] for i in of_asked),
    )


def _variables(rng: random.Random, hay: Iterator[str]) -> Text:
    names = _distinct(lambda: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))
    chain = tuple(itertools.islice(names, HOPS + 1))
    value = rng.randrange(10**4, 10**5)
    assignments = [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain))]
    places = sorted(rng.random() for _ in assignments)
    question = (
        f"Which {len(chain)} variables have the value {value}, set directly or through other variables?\n"
        f"Answer: The variables with the value {value} are"
    )
    return Text(_hidden(assignments, places, hay), question, chain, tuple(places))


def _common_words(rng: random.Random, common_repeats: int, other_repeats: int) -> Text:
    words, order = _words(rng), rng.random()
    common, others = tuple(itertools.islice(words, COMMON)), []

    def parts(size: int) -> list[str]:
        others.extend(itertools.islice(words, max(0, size - len(others))))
        listed = [*common * common_repeats, *others[:size] * other_repeats]
        random.Random(order).shuffle(listed)
        return [f"{number}. {word}" for number, word in enumerate(listed, start=1)]

    question = (
        f"Which {COMMON} words come most often in the numbered list?\n"
        f"Answer: The {COMMON} words that come most often in the list are:"
    )
    return Text(parts, question, common)


def _frequent_words(rng: random.Random) -> Text:
    """The word of rank r comes as often as 1 / r^2, and those that are asked for once more."""
    words, order = _words(rng), rng.random()
    ranked = [DOTS, *itertools.islice(words, FREQUENT)]

    def parts(size: int) -> list[str]:
        counts = [size // rank**2 for rank in itertools.takewhile(lambda rank: rank**2 <= size, itertools.count(1))]
        ranked.extend(itertools.islice(words, max(0, len(counts) - len(ranked))))
        listed = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
        listed += ranked[1 : 1 + FREQUENT]
        random.Random(order).shuffle(listed)
        return listed

    question = (
        f"Apart from {DOTS}, which {FREQUENT} coded words come most often in the text?\n"
        f"Answer: The {FREQUENT} words that come most often are:"
    )
    return Text(parts, question, tuple(ranked[1 : 1 + FREQUENT]))


def _hidden(needles: Sequence[str], depths: Sequence[float], hay: Iterator[str]) -> Callable[[int], list[str]]:
    """`parts` of n sentences of hay, each needle where its depth says; those at one place stay in order."""
    kept: list[str] = []
    by_depth = sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0])

    def parts(size: int) -> list[str]:
        kept.extend(itertools.islice(hay, max(0, size - len(kept))))
        sentences = kept[:size]
        for before, (depth, needle) in enumerate(by_depth):
            sentences.insert(round(depth * size) + before, needle)
        return sentences

    return parts


def _noise(rng: random.Random) -> Iterator[str]:
    choices = [words.split(",") for words in NOISE]
    while True:
        yield " ".join(map(rng.choice, choices)) + "."


def _sentences(haystack: Sequence[str], rng: random.Random) -> Iterator[str]:
    """From anywhere in it to its end, and around again."""
    first = rng.randrange(len(haystack))
    return itertools.islice(itertools.cycle(haystack), first, None)


def _words(rng: random.Random) -> Iterator[str]:
    """Words that no language has, all different."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return _distinct(lambda: "".join(rng.choices(syllables, k=3)))


def _distinct(make: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        if (made := make()) not in seen:
            seen.add(made)
            yield made
