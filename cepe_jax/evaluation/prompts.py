"""What of a record the decoder reads and what the encoder, in the words of a template."""

import dataclasses
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
    if not record.choices:
        raise ValueError(f"record {record.id} has no choices: the icl family compares them, give them")
    texts = [template.answered(demonstration) for demonstration in shown]
    text = _joined(template.instruction, *texts[:in_decoder], template.asked(record.question))
    return Parts(text, tuple(context + BETWEEN for context in texts[in_decoder:]))


def document(record: Record, template: Template) -> tuple[str, str]:
    """What is to be read, and what is asked of it, which follows: the instruction and the question."""
    read = map(template.read, record.contexts)
    return _joined(*read) + BETWEEN, _joined(template.instruction, template.asked(record.question))


def _joined(*parts: str) -> str:
    return BETWEEN.join(part for part in parts if part)
