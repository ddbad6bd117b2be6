"""The choice of questions, documents and demonstrations, as a function of a seed and of their names."""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cepe_jax.evaluation.tasks.questions import Demonstration, Question

Item = TypeVar("Item")
Key = TypeVar("Key")
Groups = list[list[Demonstration]]  # those with one answer together


def generator(*names) -> random.Random:
    """Return random numbers that are a function of these names: a seed, and the id of a question."""
    return random.Random("\n".join(map(repr, names)))


def sample_questions(questions: Sequence[Question], samples: int | None, seed: int) -> list[Question]:
    """Return a sample of the questions (None: all). It depends on the seed and not on their order."""
    if samples is not None and samples > len(questions):
        raise ValueError(f"samples is {samples} and there are {len(questions)} records: ask for fewer, or leave it out")
    return sorted(questions, key=lambda question: (generator(seed, question.id).random(), question.id))[:samples]


def as_demonstration(question: Question) -> Demonstration:
    """Return the question with the first of its answers and the best of its contexts."""
    return Demonstration(question.question, question.answers[0], question.contexts[:1])


def groups_of(demonstrations: Sequence[Demonstration]) -> Groups:
    """Return those with one answer together; of those with one question the first."""
    groups = defaultdict(list)
    for demonstration in {d.question: d for d in reversed(demonstrations)}.values():
        groups[demonstration.answer].append(demonstration)
    return list(groups.values())


def sample_demonstrations(groups: Groups, count: int, question: Question, seed: int) -> list[Demonstration]:
    """Return `count` different demonstrations, a function of the seed and the question's id; none asks the question.

    No answer comes oftener than another by more than one while there are demonstrations with the other.
    """
    rng, used = generator(seed, question.id, "demonstrations"), {question.question}
    sample: list[Demonstration] = []
    remaining = dict(enumerate(groups))
    while len(sample) < count:
        if not remaining:
            raise ValueError(
                f"record {question.id}: {count} demonstrations are asked for and {len(sample)} can be drawn: give "
                f"more, or ask for fewer"
            )
        for number in rng.sample(list(remaining), min(len(remaining), count - len(sample))):
            group = remaining[number]
            candidates = rng.sample(group, min(len(group), len(used) + 1))  # one of them is not used yet
            unused = next((one for one in candidates if one.question not in used), None)
            if unused is None:
                del remaining[number]
                continue
            used.add(unused.question)
            sample.append(unused)
    return sample


def reservoir_by_domain(
    candidates: Iterable[tuple[str, float, Key]], most: int, read: Callable[[Key], tuple[Item, int]]
) -> list[Item]:
    """Return the items of each domain with the lowest draws, until they have `most` windows, in the order of the draws.

    A candidate is a domain, a draw, and a key. `read` returns a key's item and its number of windows. It is called for
    those alone that may be among the lowest so far, and no others are held.
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
