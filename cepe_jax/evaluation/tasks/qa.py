"""Open-domain question answering: the axis counts further passages, each a context for the encoder."""

import dataclasses
from dataclasses import dataclass

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.tasks.protocols import BETWEEN, Protocol, Template, join
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.task import FewShot, Generative, register


@register
@dataclass(frozen=True, kw_only=True)
class Qa(FewShot, Generative):
    """The decoder reads demonstrations with a passage each, the best passages and the question."""

    family: str = "qa"
    passages: int = 10  # passages that the decoder reads (qa)

    usual = Protocol(
        Template(context="Passage: {context}"),
        ("exact_match", "substring_match", "f1"),
        max_new_tokens=25,
        stop=("\n",),
    )
    axis_name = "further passages"

    def __post_init__(self):
        if self.passages < 0:
            raise ValueError(f"passages is {self.passages}: give 0 or more")
        super().__post_init__()

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        """Return the prompt. The worst further passage stands first, where a decoder without room drops it."""
        template, most = self.protocol.template, self.passages + value
        if most > len(question.contexts):
            raise ValueError(
                f"record {question.id} has {len(question.contexts)} contexts, and {self.passages} for the decoder and "
                f"{value} for the encoder are asked for: ask for fewer"
            )
        read = list(map(template.read, question.contexts[:most]))
        shown = [dataclasses.replace(one, contexts=one.contexts[:1]) for one in self.shots(question, 0)]
        parts = [*map(template.answered, shown), *read[: self.passages], template.asked(question.question)]
        _, ids, after = self.split(join(template.instruction, *parts), question.choices, tokenizer)
        contexts = [tokenizer.encode(passage + BETWEEN) for passage in reversed(read[self.passages :])]
        scores = None if question.scores is None else question.scores[self.passages : most][::-1]
        return Prompt(ids, contexts, scores, self.chunk_length), after
