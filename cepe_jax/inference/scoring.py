"""The probabilities of texts: the prompt is read once into a cache, and each continuation after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cepe_jax.checks import check_tokens
from cepe_jax.inference.caches import FULL, Policy, new_cache
from cepe_jax.inference.caches.full import PIECE_PAIRS
from cepe_jax.inference.generate import append, bucket, check_prompts, power_of_two, right_padded
from cepe_jax.model.cache import Cache
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.layers import cut, joined
from cepe_jax.model.llama import Llama
from cepe_jax.model.logits import token_nll

Array = jax.Array
SCORED_ROWS = 16  # continuations that are read at once
MOST_BY_TOKEN = 256  # tokens of a continuation that are read one at a time
SCORED_POSITIONS = 16  # of each of them, whose logits exist at once


@dataclass(frozen=True)
class Score:
    """The probability of a continuation."""

    log_probs: np.ndarray  # of each token, in nats, given what stands before it
    greedy: bool  # whether each token is the most probable one

    @property
    def total(self) -> float:
        return float(self.log_probs.sum(dtype=np.float64))


def _read_labels(
    model: Cepe | Llama, tokens_BT, labels_BT, mask_BT, memory: Memory | None, cache: Cache
) -> tuple[Array, Array, Cache]:
    """log p of each label in fp32, whether it is the most probable token, (B, T) each, and the cache."""
    hidden_BTD, cache = model.decode(tokens_BT, memory=memory, cache=cache, token_mask_BT=mask_BT)
    logits_of = model.decoder.unembedding()

    def look_up(hidden_and_labels):
        logits_BTV, labels_BT = logits_of(hidden_and_labels[0]), hidden_and_labels[1]
        return -token_nll(logits_BTV, labels_BT), logits_BTV.argmax(axis=-1) == labels_BT

    found = jax.lax.map(look_up, (cut(hidden_BTD, SCORED_POSITIONS), cut(labels_BT, SCORED_POSITIONS)))
    return *(joined(x, tokens_BT.shape[1]) for x in found), cache


log_probs = jax.jit(_read_labels)
log_probs_onwards = jax.jit(_read_labels, donate_argnames="cache")  # the cache given is used up


def score(
    model: Cepe | Llama,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    memory: Memory | None = None,
    policy: Policy = FULL,
) -> list[Score]:
    """Score each continuation after the prompt, which is read once, as the memory (of one row) is.

    `policy` selects what the cache keeps. Continuations are read together, those that are too long for it one by one.
    If tokens that are read together choose together what they read, as in ReAttention, later tokens would choose for
    those before them, and a token's probability would depend on itself. Then the prompt is read in pieces, and the
    continuations are read one by one, a token at a time, and may have at most MOST_BY_TOKEN tokens.
    """
    check_prompts(model, [prompt], memory)
    for number, continuation in enumerate(continuations):
        if len(continuation) == 0:
            raise ValueError(f"continuation {number} is empty: give one token or more")
        check_tokens(f"continuation {number}", np.asarray(continuation), 1, model.decoder.config.vocab_size)
        if policy.pools and len(continuation) > MOST_BY_TOKEN:
            raise ValueError(
                f"continuation {number} has {len(continuation)} tokens, which this cache reads one at a time: score at "
                f"most {MOST_BY_TOKEN} at once"
            )
    slots = bucket(len(prompt))
    before, last = prompt[:-1], prompt[-1]  # the last one is read with each continuation, whose first follows it
    lengths = [_filled(len(continuation)) for continuation in continuations]
    # How many of this length are read at once.
    rows = [1 if policy.pools else PIECE_PAIRS // (length * (slots + length)) for length in lengths]
    together = [number for number, most in enumerate(rows) if most > 1]
    alone = [number for number, most in enumerate(rows) if most <= 1]
    if alone:
        slots = bucket(len(prompt) + max(bucket(len(continuations[number])) for number in alone))
    cache = new_cache(model.decoder, policy, 1, slots)
    if before:
        cache = append(model, *right_padded([before], bucket(len(before))), memory, cache)
    if policy.pools:
        cache = cache.by_token()
    scores: dict[int, Score] = {}
    most = min([SCORED_ROWS, *(rows[number] for number in together)])
    for first in range(0, len(together), most):
        numbers = together[first : first + most]
        group = [continuations[number] for number in numbers]
        # Two rows or more: then the cache is one that all of them read and none writes to.
        filled = group + group[-1:] * (max(2, power_of_two(len(group))) - len(group))
        found = log_probs(model, *_given(last, filled, max(lengths[number] for number in numbers)), memory, cache)[:2]
        for number, *of_row in zip(numbers, *map(np.asarray, found), strict=False):  # what filled the group up is last
            scores[number] = _score(*of_row, len(continuations[number]))
    for number in alone:
        run = log_probs_onwards if number == alone[-1] else log_probs  # till then the prompt's cache is kept
        continuation = continuations[number]
        # Token by token, padding takes as long as what is scored.
        length = lengths[number] if policy.pools else bucket(len(continuation))
        found = run(model, *_given(last, [continuation], length), memory, cache)[:2]
        scores[number] = _score(*(np.asarray(x)[0] for x in found), len(continuation))
    return [scores[number] for number in range(len(continuations))]


def _filled(count: int) -> int:
    """The length that so many tokens are filled up to."""
    return min(power_of_two(count), bucket(count))


def _given(last: int, continuations: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, ...]:
    """Tokens, labels and mask, (B, length), of continuations after `last`."""
    tokens_BT, mask_BT = right_padded([[last, *row[:-1]] for row in continuations], length)
    return tokens_BT, right_padded(continuations, length)[0], mask_BT


def _score(log_probs_T: np.ndarray, greedy_T: np.ndarray, count: int) -> Score:
    return Score(log_probs_T[:count].copy(), bool(greedy_T[:count].all()))
