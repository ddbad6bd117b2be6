"""A SentencePiece model from texts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.directories import staged

MAX_SENTENCE = 1 << 20  # bytes of one text


def training_pieces(text: str) -> Iterator[str]:
    """The text in pieces that SentencePiece takes: it drops what is longer than MAX_SENTENCE. Lines stay whole."""
    most, start = MAX_SENTENCE // 4, 0  # a character has up to four bytes
    while len(text) - start > most:
        end = text.rfind("\n", start, start + most) + 1 or start + most
        yield text[start:end]
        start = end
    yield text[start:]


def train(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """A byte-fallback BPE model at `path` that gives texts back exactly: newlines, tabs and indents are kept.

    One character is not: U+2581, which SentencePiece writes for a space, comes back as one.
    """
    faults = []

    def watched() -> Iterator[str]:
        try:
            yield from texts
        except BaseException as error:  # Ctrl-C too: SentencePiece would make a RuntimeError of its traceback
            faults.append(error)

    with staged(path) as place:
        try:
            with open(place, "wb") as file:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=watched(),
                    model_writer=file,
                    model_type="bpe",
                    vocab_size=vocab_size,
                    byte_fallback=True,
                    normalization_rule_name="identity",
                    remove_extra_whitespaces=False,
                    add_dummy_prefix=False,
                    allow_whitespace_only_pieces=True,
                    user_defined_symbols=["\n"],
                    split_digits=True,
                    max_sentence_length=MAX_SENTENCE,
                    num_threads=2,
                    minloglevel=2,
                )
        except RuntimeError as error:
            refusal = str(error).strip().splitlines()[-1]
            faults.append(ValueError(f"cannot train {vocab_size} pieces on these texts: {refusal}"))
        if faults:
            raise faults[0]
    return Tokenizer(path)
