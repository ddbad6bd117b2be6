"""The protocol of a task: the words around a question, how much is generated, and by which metrics it counts."""

import dataclasses
import string
from dataclasses import dataclass

from cepe_jax.evaluation.tasks.questions import Demonstration

BETWEEN = "\n\n"  # what stands between the parts of a prompt


@dataclass(frozen=True)
class Template:
    """The words of a prompt; {context}, {question} and {answer} are replaced by a record's."""

    instruction: str = ""  # before what the decoder reads; of a document, after it
    context: str = "{context}"
    question: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"  # after the question

    def __post_init__(self):
        for name in ("context", "question", "answer"):
            text = getattr(self, name)
            try:
                fields = [field for _, *field in string.Formatter().parse(text) if field[0] is not None]
            except ValueError as error:
                raise ValueError(f"template.{name} is {text!r} ({error}): write a brace of the text twice") from None
            if fields != [[name, "", None]]:  # a width of a billion fills memory
                raise ValueError(f"template.{name} is {text!r}: give a text with {{{name}}} in it, once")

    def read(self, context: str) -> str:
        return self.context.format(context=context)

    def asked(self, question: str) -> str:
        return self.question.format(question=question)

    def answered(self, demonstration: Demonstration) -> str:
        """The demonstration with its contexts."""
        asked = self.asked(demonstration.question) + self.answer.format(answer=demonstration.answer)
        return BETWEEN.join([*map(self.read, demonstration.contexts), asked])


@dataclass(frozen=True)
class Words:
    """Parts of a template; the others stay as they are."""

    instruction: str | None = None  # text before all else; None: as the task has it
    context: str | None = None  # text around a context, at {context}; None: as the task has it
    question: str | None = None  # text around a question, at {question}; None: as the task has it
    answer: str | None = None  # text around an answer, at {answer}; None: as the task has it

    def put_into(self, template: Template) -> Template:
        return dataclasses.replace(template, **{name: text for name, text in vars(self).items() if text is not None})


@dataclass(frozen=True)
class Protocol:
    """The words, limits and metrics of a task. Choices count by accuracy, whatever the metrics."""

    template: Template
    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()


def join(*parts: str) -> str:
    """Return the parts that are not empty, one after another."""
    return BETWEEN.join(part for part in parts if part)
