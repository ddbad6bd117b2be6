"""Which records and documents are asked and which demonstrations are shown: functions of a seed and of their names."""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cepe_jax.evaluation.records import Demonstration, Record

Item = TypeVar("Item")
Key = TypeVar("Key")
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


def drawn(
    candidates: Iterable[tuple[str, float, Key]], most: int, read: Callable[[Key], tuple[Item, int]]
) -> list[Item]:
    """Of each domain the items with the lowest draws, until they have `most` windows; all in the order of the draws.

    A candidate is a domain, a draw, and a key whose item and number of windows `read` gives. It is asked of those
    alone that may be among the lowest so far, and no others are held.
    """
    heaps: dict[str, list[tuple[float, int, int, Item]]] = {}  # the highest draw first
    totals: Counter[str] = Counter()
    for number, (domain, draw, key) in enumerate(candidates):
        heap = heaps.setdefault(domain, [])
        if totals[domain] >= most and draw > -heap[0][0]:
            continue
        item, count = read(key)
        if not count:
            continue
        heapq.heappush(heap, (-draw, number, count, item))
        totals[domain] += count
        while totals[domain] - heap[0][2] >= most:
            totals[domain] -= heapq.heappop(heap)[2]
    entries = sorted((entry for heap in heaps.values() for entry in heap), reverse=True)
    return [item for *_, item in entries]
