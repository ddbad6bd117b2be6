"""Open-domain question answering: the axis counts further passages, each a context, or chunks that are retrieved."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.tasks.protocols import BETWEEN, Protocol, Template, join
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.retrieved import Retrieve, with_chunks
from cepe_jax.evaluation.tasks.task import FewShot, Generative, register
from cepe_jax.progress import track


@register
@dataclass(frozen=True, kw_only=True)
class Qa(FewShot, Generative):
    """The decoder reads demonstrations with a passage each, the best passages and the question.

    With `retrieve` a question has the best k chunks of a corpus instead of passages. They are contexts, or stand where
    the passages would.
    """

    family: str = "qa"
    passages: int = 10  # passages that the decoder reads (qa)
    retrieve: Retrieve | None = None  # a corpus that is searched for each question (qa)

    usual = Protocol(
        Template(context="Passage: {context}"),
        ("exact_match", "substring_match", "f1"),
        max_new_tokens=25,
        stop=("\n",),
    )

    def __post_init__(self):
        if self.passages < 0:
            raise ValueError(f"passages is {self.passages}: give 0 or more")
        if self.retrieve is not None:
            if self.axis not in ((), self.retrieve.k):
                raise ValueError(f"axis is {list(self.axis)}, and retrieve.k counts the chunks: leave axis out")
            if self.passages != Qa.passages:
                raise ValueError(f"passages is {self.passages}, and retrieve.k counts the chunks: leave passages out")
            object.__setattr__(self, "axis", self.retrieve.k)
        super().__post_init__()

    @property
    def axis_name(self) -> str:
        return "further passages" if self.retrieve is None else "retrieved chunks"

    def places(self) -> dict[Path, str]:
        if self.retrieve is None:
            return super().places()
        return super().places() | {self.retrieve.corpus: "a dataset of documents, or a folder of texts"}

    def refusal(self, reads: str) -> str:
        return "" if self.retrieve is None else self.retrieve.refusal(reads)

    def identity(self) -> dict:
        settings = super().identity()
        if self.retrieve is not None:
            del settings["retrieve"]["k"]  # it is the axis
        return settings

    def note(self) -> str:
        recall = " Recall: one of the answers stands in a chunk, both normalised." if self.retrieve else ""
        return super().note() + recall

    def questions(self, value: int, tokenizer: Tokenizer) -> list[tuple[int, Question]]:
        questions = super().questions(value, tokenizer)
        if self.retrieve is None:
            return questions
        seeded = track(questions, f"retrieve, {value}")
        return [(seed, with_chunks(question, value, self.retrieve, tokenizer)) for seed, question in seeded]

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        template = self.protocol.template
        passages, contexts, scores = self._divided(value, question)
        shown = [dataclasses.replace(one, contexts=one.contexts[:1]) for one in self.shots(question, 0)]
        parts = [*map(template.answered, shown), *map(template.read, passages), template.asked(question.question)]
        _, ids, after = self.split(join(template.instruction, *parts), question.choices, tokenizer)
        beside = [tokenizer.encode(template.read(context) + BETWEEN) for context in contexts]
        return Prompt(ids, beside, scores, self.chunk_length), after

    def _divided(
        self, value: int, question: Question
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...] | None]:
        """Return the passages of the prompt, the contexts and the contexts' scores.

        The worst further passage is the first context, which a decoder without room drops. Retrieved chunks are in
        their order already.
        """
        if self.retrieve is not None:
            into_prompt = question.contexts, (), None
            return into_prompt if self.retrieve.into == "decoder" else ((), question.contexts, question.scores)
        most = self.passages + value
        if most > len(question.contexts):
            raise ValueError(
                f"record {question.id} has {len(question.contexts)} contexts, and {self.passages} for the decoder and "
                f"{value} for the encoder are asked for: ask for fewer"
            )
        further = slice(self.passages, most)
        scores = None if question.scores is None else question.scores[further][::-1]
        return question.contexts[: self.passages], question.contexts[further][::-1], scores
