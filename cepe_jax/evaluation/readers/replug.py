"""RePlug (Shi et al. 2023): the decoder reads each context by itself, and what it predicts after them is averaged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.checks import check_tokens
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.readers.readers import longest, one_text
from cepe_jax.inference.caches import FULL, new_cache
from cepe_jax.inference.generate import (
    append,
    bucket,
    check_prompts,
    power_of_two,
    right_padded,
    until,
)
from cepe_jax.inference.overflow import room_beside
from cepe_jax.inference.scoring import SCORED_POSITIONS, Score
from cepe_jax.model.cache import Cache
from cepe_jax.model.layers import cut
from cepe_jax.model.llama import Llama

Array = jax.Array
Rows = list[list[int]]  # a context and the prompt, for each context
GROUP = 8  # rows that are read at once


def log_weights(scores: Sequence[float], temperature: float) -> np.ndarray:
    """log softmax(scores / temperature), (C,)."""
    scaled_C = np.asarray(scores, np.float64) / temperature
    return (scaled_C - np.logaddexp.reduce(scaled_C)).astype(np.float32)


def mixture(logits_CTV: Array, log_weights_C: Array) -> Array:
    """Log probabilities (T, V): those after each of C contexts, weighted (equation 2)."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits_CTV) + log_weights_C[:, None, None], axis=0)


_append = jax.jit(Llama.decode, donate_argnames="cache")


@jax.jit
def _hidden(model: Llama, tokens_BT: Array, mask_BT: Array, cache: Cache) -> Array:
    return model.decode(tokens_BT, None, cache, mask_BT)[0]


@jax.jit
def _likeliest(model: Llama, hidden_C1D: Array, log_weights_C: Array) -> Array:
    """(1, 1)."""
    return mixture(model.logits(hidden_C1D), log_weights_C).argmax(axis=-1, keepdims=True)


@jax.jit
def _log_probs(model: Llama, hidden_CTD: Array, labels_T: Array, log_weights_C: Array) -> tuple[Array, Array]:
    """log p of each label, and whether it is the most probable token, (T,) each."""
    logits_of = model.unembedding()

    def look_up(hidden_and_labels):
        log_probs_TV = mixture(logits_of(hidden_and_labels[0]), log_weights_C)
        labels_T = hidden_and_labels[1][0]
        return jnp.take_along_axis(log_probs_TV, labels_T[:, None], axis=1)[:, 0], log_probs_TV.argmax(-1) == labels_T

    chunks = cut(hidden_CTD, SCORED_POSITIONS), cut(labels_T[None], SCORED_POSITIONS)
    return tuple(x.reshape(-1)[: len(labels_T)] for x in jax.lax.map(look_up, chunks))


@dataclass(frozen=True, eq=False)
class RePlug:
    """Behind the seam. A prompt without contexts is the plain decoder's; one with contexts needs their scores."""

    model: Llama = field(repr=False)
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    window: int | None  # tokens of a context and the prompt, and what follows; None: no bound is known
    temperature: float

    def stream(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int | None]]:
        rows = [self._rows(prompt, max_new_tokens) for prompt in prompts]
        written = [until(self.stop_ids, self._drawn(*row, max_new_tokens)) for row in rows]
        return ([step[0] for step in steps] for steps in zip_longest(*written, fillvalue=[None]))

    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[Score]:
        new = longest(continuations)
        rows, weights_C = self._rows(prompt, new)
        for number, ids in enumerate(continuations):
            check_tokens(f"continuation {number}", np.asarray(ids), 1, self.model.config.vocab_size)
        hidden: list[list[Array]] = [[] for _ in continuations]
        for group in _groups(rows):
            cache = self._read(group, max(map(len, rows)) + bucket(new))
            for parts, continuation in zip(hidden, continuations, strict=True):
                parts.append(self._after(group, continuation, cache))
        scores = []
        for parts, continuation in zip(hidden, continuations, strict=True):
            hidden_CTD = jnp.concatenate(parts)
            (labels_T,), _ = right_padded([continuation], hidden_CTD.shape[1])
            values = _log_probs(self.model, hidden_CTD, labels_T, weights_C)
            log_probs_T, greedy_T = (np.asarray(x)[: len(continuation)] for x in values)
            scores.append(Score(log_probs_T, bool(greedy_T.all())))
        return scores

    def _rows(self, prompt: Prompt, new: int) -> tuple[Rows, np.ndarray]:
        """Return the rows that are read by themselves, and their log weights.

        ValueError if one does not fit, or if nothing weights it.
        """
        scores = prompt.scores if prompt.contexts else (0.0,)
        if scores is None or len(scores) != len(prompt.contexts or (0,)):
            raise ValueError(
                f"RePlug weights contexts by their scores, and {0 if scores is None else len(scores)} came with "
                f"{len(prompt.contexts)} contexts: give one for each"
            )
        alone = [Prompt(prompt.ids, [context]) for context in prompt.contexts] or [prompt]
        rows = [one_text(row, self.tokenizer.begin)[0] for row in alone]
        if new < 1:
            raise ValueError(f"{new} tokens after the prompt: ask for 1 or more")
        room, most = room_beside(new, self.window), max(map(len, rows))
        if room is not None and most > room:
            raise ValueError(
                f"a context and the prompt have {most} tokens, and {new} after them exceed the window of "
                f"{self.window}: shorten one of them"
            )
        check_prompts(self.model, rows, None)
        return rows, log_weights(scores, self.temperature)

    def _read(self, group: Rows, slots: int) -> Cache:
        """The group's rows, but the last token of each."""
        cache = new_cache(self.model, FULL, len(group), bucket(slots))
        rows = [row[:-1] for row in group]
        return append(self.model, *right_padded(rows, bucket(max(map(len, rows)))), None, cache)

    def _drawn(self, rows: Rows, weights_C: np.ndarray, new: int) -> Iterator[Array]:
        """The likeliest token, (1, 1), and the one after it: read by all rows."""
        caches = [self._read(group, max(map(len, rows)) + new) for group in _groups(rows)]
        tokens_C1: Array | np.ndarray = np.array([row[-1:] for row in rows], np.int32)
        for _ in range(new):
            hidden = []
            for number, first in enumerate(range(0, len(rows), GROUP)):
                tokens_BT = tokens_C1[first : first + GROUP]
                hidden_BTD, caches[number] = _append(self.model, tokens_BT, None, caches[number])
                hidden.append(hidden_BTD)
            token_11 = _likeliest(self.model, jnp.concatenate(hidden), weights_C)
            yield token_11
            tokens_C1 = jnp.repeat(token_11, len(rows), axis=0)

    def _after(self, group: Rows, continuation: Sequence[int], cache: Cache) -> Array:
        """Hidden states that predict the continuation, filled up to a bucket, after each of the group's rows."""
        length = min(power_of_two(len(continuation)), bucket(len(continuation)))
        tokens_BT, mask_BT = right_padded([[row[-1], *continuation[:-1]] for row in group], length)
        return _hidden(self.model, tokens_BT, mask_BT, cache)


def _groups(rows: Rows) -> list[Rows]:
    return [rows[first : first + GROUP] for first in range(0, len(rows), GROUP)]
