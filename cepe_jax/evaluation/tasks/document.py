"""Questions on long documents: the axis counts the tokens for the encoder, those before the decoder's window."""

import dataclasses
from dataclasses import dataclass

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.tasks.protocols import Protocol, Template
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.task import FromFiles, LongText, register


@register
@dataclass(frozen=True, kw_only=True)
class Document(FromFiles, LongText):
    """The decoder reads the end of the document and what is asked of it."""

    family: str = "document"

    usual = Protocol(
        Template(instruction="Answer the question from the text above in a few words."),
        ("f1",),
        max_new_tokens=50,
        stop=("\n",),
    )
    axis_name = "tokens for the encoder"

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        prompt, after = super().prompt(value, question, tokenizer)
        return dataclasses.replace(prompt, contexts=_last(prompt.contexts, value)), after


def _last(contexts: list[list[int]], most: int) -> list[list[int]]:
    """Return their last `most` tokens."""
    kept: list[list[int]] = []
    for context in reversed(contexts):
        if most > 0:
            kept.insert(0, context[-most:])
        most -= len(context)
    return kept
