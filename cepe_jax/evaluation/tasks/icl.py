"""In-context learning: the axis counts further demonstrations, each a context for the encoder."""

from collections.abc import Iterator
from dataclasses import dataclass

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import LanguageModel, Prompt
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.protocols import BETWEEN, Protocol, Template, join
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.task import FewShot, register


@register
@dataclass(frozen=True, kw_only=True)
class Icl(FewShot):
    """The decoder reads the first demonstrations and the question, and compares the labels."""

    family: str = "icl"

    usual = Protocol(Template(question="Input: {question}\nLabel:"))
    axis_name = "further demonstrations"

    @property
    def num_shots(self) -> int:
        return self.demonstrations + max(self.axis)

    def identity(self) -> dict:
        """Return the longest value of the axis too: the demonstrations are drawn for it."""
        return super().identity() | {"axis": max(self.axis)}

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        if not question.choices:
            raise ValueError(f"record {question.id} has no choices: the icl family compares them, give them")
        template = self.protocol.template
        texts = list(map(template.answered, self.shots(question, value)))
        text = join(template.instruction, *texts[: self.demonstrations], template.asked(question.question))
        _, ids, after = self.split(text, question.choices, tokenizer)
        contexts = [tokenizer.encode(text + BETWEEN) for text in texts[self.demonstrations :]]
        return Prompt(ids, contexts, None, self.chunk_length), after

    def measure(self, point: Point, model: LanguageModel) -> Iterator[dict]:
        """Yield records with `domain_log_probs`: the labels after the words of a question that is empty."""
        of_labels: dict[tuple[str, ...], list[float]] = {}
        for record in super().measure(point, model):
            labels = record["choices"]
            if labels not in of_labels:
                _, ids, after = self.split(self.protocol.template.asked(""), labels, model.tokenizer)
                of_labels[labels] = [score.total for score in model.score(Prompt(ids), after)]
            yield record | {"domain_log_probs": of_labels[labels]}
