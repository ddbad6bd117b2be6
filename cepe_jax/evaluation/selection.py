"""Which records are asked and which demonstrations are shown: functions of a seed and a record's id."""

import random
from collections import defaultdict
from collections.abc import Sequence

from cepe_jax.evaluation.records import Demonstration, Record

Groups = list[list[Demonstration]]  # those with one answer together


def generator(*names) -> random.Random:
    """Random numbers that are a function of these names: a seed, and the id of a record."""
    return random.Random("\n".join(map(repr, names)))


def chosen(records: Sequence[Record], samples: int | None, seed: int) -> list[Record]:
    """So many records (None: all), the same for a seed in whatever order they come."""
    if samples is not None and samples > len(records):
        raise ValueError(f"samples is {samples} and there are {len(records)} records: ask for fewer, or leave it out")
    drawn = sorted(records, key=lambda record: (generator(seed, record.id).random(), record.id))
    return drawn[:samples]


def as_demonstration(record: Record) -> Demonstration:
    """The record with the first of its answers and the best of its contexts."""
    return Demonstration(record.question, record.answers[0], record.contexts[:1])


def groups_of(demonstrations: Sequence[Demonstration]) -> Groups:
    """Those with one answer together; of those with one question the first."""
    groups = defaultdict(list)
    for demonstration in {d.question: d for d in reversed(demonstrations)}.values():
        groups[demonstration.answer].append(demonstration)
    return list(groups.values())


def draw(groups: Groups, count: int, record: Record, seed: int) -> list[Demonstration]:
    """`count` different demonstrations, no answer oftener than another by more than one while there are such.

    None asks what the record asks. They are a function of the seed and the record's id.
    """
    rng, asked = generator(seed, record.id, "demonstrations"), {record.question}
    drawn: list[Demonstration] = []
    left = dict(enumerate(groups))
    while len(drawn) < count:
        if not left:
            raise ValueError(
                f"record {record.id}: {count} demonstrations are asked for and {len(drawn)} can be drawn: give more, "
                f"or ask for fewer"
            )
        for number in rng.sample(list(left), min(len(left), count - len(drawn))):
            some = rng.sample(left[number], min(len(left[number]), len(asked) + 1))  # one of them is not asked yet
            found = next((demonstration for demonstration in some if demonstration.question not in asked), None)
            if found is None:
                del left[number]
                continue
            asked.add(found.question)
            drawn.append(found)
    return drawn
