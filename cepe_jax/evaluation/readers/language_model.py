"""The seam between evaluations and models: CEPE and what it is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.detokenize import pieces
from cepe_jax.inference.scoring import Score


@dataclass(frozen=True)
class Prompt:
    """A text to go on with. Whoever asks decides what of it is a context, the same for every model."""

    ids: Sequence[int]  # what the decoder reads, BOS included where there is to be one
    contexts: Sequence[Sequence[int]] = ()  # what stands before, in order, without BOS
    scores: Sequence[float] | None = None  # of retrieved contexts, the higher the better
    chunk_length: int | None = None  # tokens of a context that an encoder reads at once: it cuts longer ones


class LanguageModel(Protocol):
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # a text ends before the first of them

    def stream(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int | None]]:
        """Yield the likeliest tokens after each prompt, step by step: one of each row, None if a row has ended."""

    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Return how probable each continuation is after the prompt, which is read once."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    begun: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return the model's text after each prompt, greedy, at most to the first of `stop`.

    `begun` is called once, when the first token of each row is there or none will come.
    """

    def steps() -> Iterator[list[int | None]]:
        following = model.stream(prompts, max_new_tokens)
        first = next(following, None)
        begun()
        if first is not None:
            yield first
            yield from following

    written = pieces(model.tokenizer, [prompt.ids for prompt in prompts], steps(), stop)
    return ["".join(of_row) for of_row in zip(*written, strict=True)]
