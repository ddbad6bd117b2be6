"""Generation, ids in and ids out: the prompt is read once into a cache, then a token at a time.

Programs are compiled for buckets: prompts are padded on the right up to one and the padding is masked, the cache has a
bucket's slots, and what differs between calls is an array. So another prompt, another seed or temperature is no other
program, and no result depends on the padding.
"""

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.checks import check_tokens
from cepe_jax.cost import gib
from cepe_jax.devices import free_bytes
from cepe_jax.inference.caches import FULL, Policy, new_cache
from cepe_jax.model.cache import Cache
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.parsing import shortened

Array = jax.Array
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is drawn. `temperature` 0 takes the most probable one and ignores the rest."""

    temperature: float = 0.0  # divides the logits; 0 takes the most probable token
    top_k: int = 0  # the most probable tokens to draw from; 0 = all
    top_p: float = 1.0  # of those, the fewest whose probabilities reach top_p
    seed: int | None = None  # repeats the same draws; None: a fresh one for each text

    def __post_init__(self):
        kinds = {"temperature": Real, "top_k": Integral, "top_p": Real, "seed": Integral | None}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {shortened(value)}: give a number")
        # Programs compute with numbers of 32 bits.
        if self.temperature != 0 and not 1e-30 <= self.temperature <= 1e30:  # NaN too
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy), or 1e-30 to 1e30")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}: give 0 (all tokens) to {2**31 - 1}")
        if not 1e-30 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a probability of 1e-30 to 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give 0 to {2**32 - 1}, or none")

    def seeded(self) -> "Sampling":
        """Return this sampling with a seed, which is drawn if it has none; greedy ones need none and get 0."""
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(32) if self.temperature > 0 else 0)

    def for_row(self, row: int) -> "Sampling":
        """Return the sampling of this row of a call that has one for all: other rows draw from other seeds.

        The first row has this very seed. The others' are hashes of it and the row's number, so that calls with
        neighbouring seeds share no row.
        """
        if row == 0 or self.seed is None:
            return self
        return replace(self, seed=int(np.random.SeedSequence([self.seed, row]).generate_state(1)[0]))


GREEDY = Sampling()
NO_TOKEN = -1


class Draws(NamedTuple):
    """`Sampling` of each row, as arrays, and how many tokens it has got before this one."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    seed_B: Array
    number_B: Array

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Draws":
        """Return these samplings as arrays, at the first token; a seed is drawn for each that has none."""
        types = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32}
        seeded = [sampling.seeded() for sampling in samplings]
        columns = (np.array([getattr(one, name) for one in seeded], kind) for name, kind in types.items())
        return cls(*columns, number_B=np.zeros(len(seeded), np.int32))

    def at(self, number: int) -> "Draws":
        """Return the draws for token `number` of every row; the first token is number 0."""
        return self._replace(number_B=np.full_like(self.number_B, number))


def power_of_two(count: int) -> int:
    """The least one that is `count` or more."""
    return 1 << max(count - 1, 0).bit_length()


def bucket(count: int) -> int:
    """The least length >= `count` that programs are compiled for: multiples of 128 up to 512, then four per doubling.

    Above 512 at most a fifth of it is padding. Meshes of up to 128 devices divide it.
    """
    step = power_of_two(max(count, 513)) // 8
    return -(-count // step) * step


def sample(logits_BV: Array, draws: Draws) -> Array:
    """The next token of each row, (B,). It depends on the row's logits, its `Sampling` and the token's number alone."""
    greedy_B = logits_BV.argmax(axis=-1)

    def drawn() -> Array:
        V = logits_BV.shape[-1]
        hot_B = jnp.where(draws.temperature_B == 0, 1, draws.temperature_B)
        scaled_BV = logits_BV / hot_B[:, None]
        ranked_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        k_B = jnp.where(draws.top_k_B == 0, V, jnp.minimum(draws.top_k_B, V))
        least_B1 = jnp.take_along_axis(ranked_BV, k_B[:, None] - 1, axis=-1)
        ranked_BV, scaled_BV = (jnp.where(x < least_B1, -jnp.inf, x) for x in (ranked_BV, scaled_BV))
        probabilities = jax.nn.softmax(ranked_BV, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least_B1 = jnp.where(before < draws.top_p_B[:, None], ranked_BV, jnp.inf).min(axis=-1, keepdims=True)
        keys_B = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
            draws.seed_B, draws.number_B
        )
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(scaled_BV < least_B1, -jnp.inf, scaled_BV))
        return jnp.where(draws.temperature_B == 0, greedy_B, tokens_B)

    return jax.lax.cond((draws.temperature_B > 0).any(), drawn, lambda: greedy_B)  # greedy steps do not sort


@partial(jax.jit, donate_argnames="cache")
def next_token(
    model: Cepe | Llama, tokens_BT, mask_BT, memory: Memory | None, cache: Cache, draws: Draws
) -> tuple[Array, Cache]:
    """Reads the tokens into the cache and draws the one that follows each row's last real one, (B, 1).

    Rows are padded on the right; without `mask_BT` they are not. It is NO_TOKEN in rows whose logits are not finite.
    """
    hidden_BTD, cache = model.decode(tokens_BT, memory=memory, cache=cache, token_mask_BT=mask_BT)
    if mask_BT is None:
        last_B1D = hidden_BTD[:, -1:]
    else:
        last_B1D = jnp.take_along_axis(hidden_BTD, mask_BT.sum(axis=1)[:, None, None] - 1, axis=1)
    logits_BV = model.decoder.logits(last_B1D)[:, 0]
    drawn_B = jnp.where(jnp.isfinite(logits_BV).all(axis=-1), sample(logits_BV, draws), NO_TOKEN)
    return drawn_B[:, None], cache


@partial(jax.jit, donate_argnames="cache")
def append(model: Cepe | Llama, tokens_BT, mask_BT, memory: Memory | None, cache: Cache) -> Cache:
    """Return the cache with the tokens, whose rows are padded on the right."""
    return model.decode(tokens_BT, memory=memory, cache=cache, token_mask_BT=mask_BT)[1]


def on_host(drawn_B1: Array) -> np.ndarray:
    """Return the tokens of `next_token`, (B,); ValueError if the logits of a row were not finite."""
    tokens_B = np.asarray(drawn_B1)[:, 0]
    if NO_TOKEN in tokens_B:
        raise ValueError("the model's logits are not finite: its weights may be damaged, compare its hashes (--verify)")
    return tokens_B


def one_ahead(results: Iterable[Item]) -> Iterator[Item]:
    """The results, each once the next one is under way: devices are at work while the host looks at what they gave."""
    waiting: list[Item] = []
    for result in results:
        yield from waiting
        waiting = [result]
    yield from waiting


def right_padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, (B, length)."""
    tokens_BT = np.zeros((len(rows), length), np.int32)
    mask_BT = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    tokens_BT[mask_BT] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens_BT, mask_BT


def read(
    model: Cepe | Llama,
    prompts: Sequence[Sequence[int]],
    memory: Memory | None,
    cache: Cache,
    draws: Draws,
    policy: Policy,
) -> tuple[Array, Cache]:
    """Draw the token after each prompt, (B, 1), and return the cache, which is of this policy, with the prompts.

    If the tokens of a piece choose together what they read, the last one of each prompt is read by itself.
    """
    if policy.pools:
        before = [row[:-1] for row in prompts]
        if longest := max(map(len, before)):
            cache = append(model, *right_padded(before, bucket(longest)), memory, cache)
        return next_token(model, np.array([row[-1:] for row in prompts], np.int32), None, memory, cache, draws)
    if (longest := max(map(len, prompts))) == 1:
        return next_token(model, np.array(prompts, np.int32), None, memory, cache, draws)
    return next_token(model, *right_padded(prompts, bucket(longest)), memory, cache, draws)


def check_reads_contexts(model: Cepe | Llama) -> None:
    """Raise ValueError for a plain decoder."""
    if isinstance(model, Llama):
        raise ValueError("a context needs a CEPE model: this one is a plain decoder")


def check_new_tokens(count: int) -> None:
    """Raise ValueError unless at least one token is asked for."""
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"max_new_tokens is {shortened(count)}: give 1 or more")


def check_cache_fits(model: Cepe | Llama, policy: Policy, rows: int, slots: int) -> None:
    """Raise ValueError if a new cache exceeds the memory of all devices."""
    cache = jax.eval_shape(lambda: new_cache(model.decoder, policy, rows, slots))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    free = free_bytes() * jax.device_count()
    if needed > free:
        texts = f"{rows} text{'s' * (rows > 1)} of {slots:,} tokens, new ones too,"
        raise ValueError(
            f"{texts} need {gib(needed)} of cache, and {gib(free)} are free: lower max_new_tokens, shorten a prompt or "
            "keep less (cache.kind)"
        )


def check_prompts(model: Cepe | Llama, prompts: Sequence[Sequence[int]], memory: Memory | None) -> None:
    """Raise ValueError for prompts that the model cannot read."""
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt: start it with the begin-of-sequence token")
    if memory is not None:
        check_reads_contexts(model)
    for prompt in prompts:
        check_tokens("a prompt", np.asarray(prompt), 1, model.decoder.config.vocab_size)


def stream(
    model: Cepe | Llama,
    prompts: Sequence[Sequence[int]],
    memory: Memory | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    policy: Policy = FULL,
) -> Iterator[list[int | None]]:
    """The tokens that follow each prompt, step by step: one of each row, None where a row has ended.

    A row ends before the first of `stop_ids`; the steps end with the last row, at the latest after `max_new_tokens`.
    Memory of one row is read by all prompts. Each row is the one its prompt has alone, sampled ones too: the draws
    depend on the row's seed and the number of the token. Of one `sampling` for all prompts each row has its
    `for_row`. `policy` selects what the cache keeps and a query reads.
    """
    check_prompts(model, prompts, memory)
    check_new_tokens(max_new_tokens)
    slots = bucket(max(len(prompt) for prompt in prompts) + max_new_tokens)
    check_cache_fits(model, policy, len(prompts), slots)
    shared = isinstance(sampling, Sampling)
    samplings = [sampling.for_row(row) for row in range(len(prompts))] if shared else sampling
    if len(samplings) != len(prompts):
        raise ValueError(f"{len(samplings)} samplings for {len(prompts)} prompts: give one, or one for each")
    draws = Draws.of(samplings)

    def dispatched() -> Iterator[Array]:
        cache = new_cache(model.decoder, policy, len(prompts), slots)
        tokens_B1, cache = read(model, prompts, memory, cache, draws, policy)
        yield tokens_B1
        for number in range(1, max_new_tokens):
            tokens_B1, cache = next_token(model, tokens_B1, None, memory, cache, draws.at(number))
            yield tokens_B1

    return until(stop_ids, dispatched())


def until(stop_ids: Sequence[int], drawn: Iterable[Array]) -> Iterator[list[int | None]]:
    """The tokens (B, 1) of each step as numbers, None in rows that have drawn one of `stop_ids`, to the last row's end.

    One step more than was asked for is under way.
    """
    running_B: np.ndarray | bool = True
    for tokens_B1 in one_ahead(drawn):
        tokens_B = on_host(tokens_B1)
        running_B = running_B & ~np.isin(tokens_B, list(stop_ids))
        if not running_B.any():
            return
        yield [int(token) if runs else None for token, runs in zip(tokens_B, running_B, strict=True)]


def generate(
    model: Cepe | Llama,
    prompts: Sequence[Sequence[int]],
    memory: Memory | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    policy: Policy = FULL,
) -> list[list[int]]:
    """The tokens that follow each prompt: what `stream` gives, row by row."""
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "policy": policy}
    steps = list(stream(model, prompts, memory, sampling=sampling, **limits))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
