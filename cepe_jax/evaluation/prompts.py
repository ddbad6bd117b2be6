"""What of a record the decoder reads and what the encoder, in the words of a template."""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cepe_jax.evaluation.protocols import BETWEEN, Template
from cepe_jax.evaluation.records import Demonstration, Record


@dataclass(frozen=True)
class Parts:
    """`text` for the decoder. `contexts`, each for the encoder by itself, stand before it and bring what parts them."""

    text: str
    contexts: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None


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


def groups_of(demonstrations: Sequence[Demonstration]) -> list[list[Demonstration]]:
    """Those with one answer together; of those with one question the first."""
    groups = defaultdict(list)
    for demonstration in {d.question: d for d in reversed(demonstrations)}.values():
        groups[demonstration.answer].append(demonstration)
    return list(groups.values())


def draw(groups: list[list[Demonstration]], count: int, record: Record, seed: int) -> list[Demonstration]:
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


def qa(record: Record, template: Template, shown: Sequence[Demonstration], passages: int, further: int) -> Parts:
    """Demonstrations with a passage each, the best `passages` and the question; `further` ones for the encoder.

    Those stand before with the worst first: a decoder that reads them and has no room leaves that out.
    """
    if passages + further > len(record.contexts):
        raise ValueError(
            f"record {record.id} has {len(record.contexts)} contexts, and {passages} for the decoder and {further} for "
            f"the encoder are asked for: ask for fewer"
        )
    read = [template.read(context) for context in record.contexts[: passages + further]]
    demonstrations = [dataclasses.replace(one, contexts=one.contexts[:1]) for one in shown]
    parts = [*map(template.answered, demonstrations), *read[:passages], template.asked(record.question)]
    contexts = tuple(context + BETWEEN for context in reversed(read[passages:]))
    scores = None if record.scores is None else record.scores[passages : passages + further][::-1]
    return Parts(_joined(template.instruction, *parts), contexts, scores)


def icl(record: Record, template: Template, shown: Sequence[Demonstration], in_decoder: int) -> Parts:
    """The first demonstrations and the question; each further one for the encoder by itself."""
    texts = [template.answered(demonstration) for demonstration in shown]
    text = _joined(template.instruction, *texts[:in_decoder], template.asked(record.question))
    return Parts(text, tuple(context + BETWEEN for context in texts[in_decoder:]))


def document(record: Record, template: Template) -> Parts:
    """The whole: what is to be read, what is to be done with it, and the question, to be cut by the window."""
    read = map(template.read, record.contexts)
    return Parts(_joined(*read, template.instruction, template.asked(record.question)))


def _joined(*parts: str) -> str:
    return BETWEEN.join(part for part in parts if part)
