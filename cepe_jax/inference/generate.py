"""Generation: encode the context once, prefill the prompt, then one token at a time from the cache."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.checks import check_tokens
from cepe_jax.model.cache import KVCache
from cepe_jax.model.cepe import Cepe, flat_mask
from cepe_jax.model.llama import Llama

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the most probable one and ignores the rest."""

    temperature: float = 0.0
    top_k: int = 0  # the k most probable tokens; 0 = all
    top_p: float = 1.0  # of those, the fewest whose probabilities reach top_p
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:  # NaN too
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a probability above 0, at most 1")


def sample(logits_BV: Array, sampling: Sampling, key: Array) -> Array:
    """The next token of each row, (B,)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(axis=-1)
    logits_BV = logits_BV / sampling.temperature
    ranked = jnp.sort(logits_BV, axis=-1, descending=True)
    if sampling.top_k:
        least = ranked[:, min(sampling.top_k, ranked.shape[1]) - 1, None]
        ranked, logits_BV = (jnp.where(x < least, -jnp.inf, x) for x in (ranked, logits_BV))
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits_BV < least, -jnp.inf, logits_BV), axis=-1)


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def next_token(model: Cepe | Llama, tokens_BT, mask_BT, memory, cache: KVCache, sampling: Sampling, key):
    """Reads the tokens into the cache and draws the ones that follow."""
    if isinstance(model, Llama):
        decoder, (hidden_BTD, cache) = model, model.decode(tokens_BT, mask_BT, cache)
    else:
        decoder, (hidden_BTD, cache) = model.decoder, model.decode(tokens_BT, *memory, cache, mask_BT)
    return sample(decoder.logits(hidden_BTD[:, -1:])[:, 0], sampling, key), cache


encode = jax.jit(Cepe.encode)


def generate(
    model: Cepe | Llama,
    prompts: Sequence[Sequence[int]],
    context_BCL: np.ndarray | None = None,
    context_mask_BCL: np.ndarray | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
    cache_slots: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, at most `max_new_tokens`, ending before the first of `stop_ids`.

    Prompts of different lengths are padded on the left and the padding masked: the result is the one each prompt
    has alone. `cache_slots` (prompt + new tokens when not given) is the length of the key/value cache.
    """
    decoder = model if isinstance(model, Llama) else model.decoder
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt: start it with the begin-of-sequence token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    longest = max(len(prompt) for prompt in prompts)
    cache_slots = longest + max_new_tokens if cache_slots is None else cache_slots
    if longest + max_new_tokens > cache_slots:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the cache of {cache_slots} slots: "
            f"shorten the prompt or move its beginning into the context"
        )
    tokens_BT = np.zeros((len(prompts), longest), np.int32)
    mask_BT = np.zeros(tokens_BT.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = prompt
        mask_BT[row, longest - len(prompt) :] = True
    check_tokens("prompts", tokens_BT, 2, decoder.config.vocab_size)
    memory = None, None
    if context_BCL is None and context_mask_BCL is not None:
        raise ValueError("context_mask_BCL came without its context_BCL: give both")
    if context_BCL is not None and context_BCL.size:
        if isinstance(model, Llama):
            raise ValueError("a context needs a CEPE model: this one is a plain decoder")
        check_tokens("context_BCL", context_BCL, 3, model.encoder.config.vocab_size)
        memory = encode(model, context_BCL, context_mask_BCL), flat_mask(context_mask_BCL)
    cache = KVCache.create(decoder.config, len(prompts), cache_slots)
    keys = jax.random.split(jax.random.key(sampling.seed), max_new_tokens)
    sampling = dataclasses.replace(sampling, seed=0)  # another seed is the same program
    running = np.ones(len(prompts), bool)
    generated: list[list[int]] = [[] for _ in prompts]
    for key in keys:
        next_B, cache = next_token(model, tokens_BT, mask_BT, memory, cache, sampling, key)
        tokens_BT, mask_BT = np.asarray(next_B)[:, None], np.ones((len(prompts), 1), bool)
        running &= ~np.isin(tokens_BT[:, 0], list(stop_ids))
        for row in np.flatnonzero(running):
            generated[row].append(int(tokens_BT[row, 0]))
        if not running.any():
            break
    return generated
