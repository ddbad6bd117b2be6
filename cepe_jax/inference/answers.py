"""Answers from documents: the encoder reads the chunks that are retrieved for a prompt, or they stand before it."""

from dataclasses import dataclass
from typing import Literal

from cepe_jax.data.retriever import Chunk, Retriever, RetrieverConfig, check_k
from cepe_jax.inference.text import CHUNK_LENGTH, TextModel

Into = Literal["encoder", "decoder"]
BETWEEN = "\n\n"  # what stands between chunks, and before the prompt


@dataclass(frozen=True, kw_only=True)
class PromptRetrieval(RetrieverConfig):
    """The search for a prompt: the number of its chunks, and their reader."""

    k: int = 5  # chunks for the prompt
    query: str = ""  # text that is searched for; "": the prompt, with all its words
    into: Into | None = None  # who reads them; None: the encoder if there is one

    def __post_init__(self):
        super().__post_init__()
        check_k(self.k)


@dataclass(frozen=True)
class Answer:
    text: str
    chunks: list[Chunk]  # that were read for it, the best first


def reader_of(into: Into | None, has_encoder: bool) -> Into:
    """Return who reads the chunks; ValueError if that is an encoder and there is none."""
    if into == "encoder" and not has_encoder:
        raise ValueError("into is encoder, and the model is a plain decoder: give into decoder, or a CEPE model")
    return into or ("encoder" if has_encoder else "decoder")


def after_chunks(prompt: str, chunks: list[Chunk]) -> str:
    """Return the prompt with the chunks before it, in this order."""
    return BETWEEN.join([*(chunk.text for chunk in chunks), prompt])


def answer(
    model: TextModel,
    prompt: str,
    retriever: Retriever,
    *,
    k: int = PromptRetrieval.k,
    query: str = PromptRetrieval.query,
    into: Into | None = None,
    chunk_length: int = CHUNK_LENGTH,
    **options,
) -> Answer:
    """Return what the model writes after the prompt and the best k chunks for it, in the retriever's order.

    `query` is searched for; if empty, the prompt is.
    The encoder reads a chunk in pieces of `chunk_length` tokens. `options` are those of `TextModel.generate`.
    """
    reader = reader_of(into, model.has_encoder)
    found = retriever.search(query or prompt, k)
    chunks = retriever.in_order(found)
    context = None
    if reader == "encoder" and chunks:
        context = model.encode([chunk.text for chunk in chunks], chunk_length=chunk_length)
    text = after_chunks(prompt, chunks) if reader == "decoder" else prompt
    return Answer(model.generate(text, context, chunk_length=chunk_length, **options), found)
