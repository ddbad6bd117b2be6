"""Contexts that are retrieved for a question, in the place of those that its record has."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cepe_jax.data.retriever import Retriever, RetrieverConfig
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.tasks.metrics import substring_match
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.inference.answers import Into


@dataclass(frozen=True, kw_only=True)
class Retrieve(RetrieverConfig):
    """The chunks of a corpus that a question gets, and who reads them."""

    corpus: Path  # the documents that are searched: a dataset of them, or a folder of texts
    k: tuple[int, ...] = (5,)  # chunks of a question, with a result for each of these numbers; 0: none
    into: Into | None = None  # whose the chunks are; None: as contexts, as model.reads says

    def __post_init__(self):
        super().__post_init__()
        if not self.k or min(self.k) < 0 or len(set(self.k)) < len(self.k):
            raise ValueError(f"retrieve.k is {list(self.k)}: give different numbers, 0 or more")

    def refusal(self, reads: str) -> str:
        """Return why a model whose contexts are read in this way cannot read the chunks, "" if it can."""
        if self.into == "encoder" and reads != "encoder":
            return f"retrieve.into is encoder, and model.reads {reads}: let a CEPE's encoder read, or leave into out"
        return ""


@lru_cache(maxsize=1)
def opened_retriever(config: Retrieve, tokenizer: Tokenizer) -> Retriever:
    """Return the index of the corpus, made once for all points of an evaluation."""
    return Retriever.open(config.corpus, tokenizer, config)


def with_chunks(question: Question, k: int, config: Retrieve, tokenizer: Tokenizer) -> Question:
    """Return the question with the best k chunks for it, in the order of a prompt, and what they are worth.

    `recall` is 1 if one of the answers stands in a chunk, both normalised as for `substring_match`.
    """
    retriever = opened_retriever(config, tokenizer)
    chunks = retriever.in_order(retriever.search(question.question, k)) if k else []
    contexts = tuple(chunk.text for chunk in chunks)
    return dataclasses.replace(
        question,
        contexts=contexts,
        scores=tuple(chunk.score for chunk in chunks),
        sources=tuple(chunk.source for chunk in chunks),
        recall=max((substring_match(text, question.answers) for text in contexts), default=0.0),
    )
