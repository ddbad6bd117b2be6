"""CEPE and the plain decoder behind the seam."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.inference.caches import FULL, Policy
from cepe_jax.inference.context import encode, stacked
from cepe_jax.inference.generate import power_of_two, stream
from cepe_jax.inference.overflow import room_beside
from cepe_jax.inference.scoring import Score, score
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama


@dataclass(frozen=True, eq=False)
class CepeReader:
    """The encoder reads each context by itself, anew for every call; the decoder reads the ids and the memory."""

    model: Cepe = field(repr=False)
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    window: int | None  # tokens that the decoder reads at most; None: no bound is known
    cache: Policy = FULL

    def stream(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int | None]]:
        rows = [self._ids(prompt, max_new_tokens) for prompt in prompts]
        memory = self._memory(prompts)
        return stream(
            self.model, rows, memory, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids, policy=self.cache
        )

    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[Score]:
        ids = self._ids(prompt, longest(continuations))
        return score(self.model, ids, continuations, self._memory([prompt]), self.cache)

    def _ids(self, prompt: Prompt, new: int) -> Sequence[int]:
        room = room_beside(new, self.window)
        if room is not None and len(prompt.ids) > room:
            raise ValueError(
                f"a prompt of {len(prompt.ids)} tokens and {new} after it exceed the window of {self.window}: make "
                f"some of the prompt a context"
            )
        return prompt.ids

    def _memory(self, prompts: Sequence[Prompt]) -> Memory | None:
        """Return the memory of each prompt's contexts, of one row if all prompts have the same ones."""
        read = [_chunks(prompt) for prompt in prompts]
        if read.count(read[0]) == len(read):
            read = read[:1]
        chunks = [chunk for of_row in read for chunk in of_row]
        if not chunks:
            return None
        known = encode(self.model, chunks, {}, power_of_two(max(map(len, chunks))))
        rows, first = [], 0
        for of_row in read:
            rows.append(known.select(range(first, first + len(of_row))))
            first += len(of_row)
        return stacked(rows)


def _chunks(prompt: Prompt) -> list[tuple[int, ...]]:
    """Return the pieces that the encoder reads at once: a context each, or what it is cut into."""
    chunks = []
    for context in map(tuple, prompt.contexts):
        whole = max(len(context), 1)  # an empty one stays, to be refused
        length = prompt.chunk_length or whole
        chunks += [context[at : at + length] for at in range(0, whole, length)]
    return chunks


@dataclass(frozen=True, eq=False)
class DecoderReader:
    """The decoder reads contexts and ids as one text, the last `window` tokens of it."""

    model: Llama = field(repr=False)
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    window: int | None  # tokens that it reads at most; None: no bound is known
    cache: Policy = FULL

    def stream(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int | None]]:
        rows = [self._ids(prompt, max_new_tokens) for prompt in prompts]
        return stream(self.model, rows, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids, policy=self.cache)

    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[Score]:
        return score(self.model, self._ids(prompt, longest(continuations)), continuations, policy=self.cache)

    def _ids(self, prompt: Prompt, new: int) -> list[int]:
        """Return the ids that it reads of the text: if the text begins as its tokenizer says, so do they."""
        ids, begin = one_text(prompt, self.tokenizer.begin)
        room = room_beside(new, self.window)
        if room is None or len(ids) <= room:
            return ids
        return ids[:begin] + ids[len(ids) - (room - begin) :]


def one_text(prompt: Prompt, begin: list[int]) -> tuple[list[int], int]:
    """The contexts and then the ids, and how many of them are `begin`: it stays first where the ids begin with it."""
    head = len(begin) if list(prompt.ids[: len(begin)]) == begin else 0
    return [*prompt.ids[:head], *(i for context in prompt.contexts for i in context), *prompt.ids[head:]], head


def longest(continuations: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens of the longest one."""
    return max(map(len, continuations), default=1)
