"""Speed and memory of a cache policy beside the full and the rolling cache, at growing numbers of cached tokens.

The cached keys and values are random and are written without being computed, so that a cache of 131,072 tokens is there
at once. Two programs are timed on it: one new token, and a piece of a prompt.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.benchmarks.compiled import memory_of
from cepe_jax.config import DecoderConfig, Dtype
from cepe_jax.cost import gib, inference_flops, step_bytes
from cepe_jax.devices import free_bytes
from cepe_jax.inference.caches import FULL, CacheConfig, Policy, Razor, Rolling, new_cache
from cepe_jax.inference.caches.retrieval_heads import retrieval_heads
from cepe_jax.inference.generate import Draws, Sampling, append, next_token
from cepe_jax.model.cache import Cache
from cepe_jax.model.llama import Llama
from cepe_jax.progress import track

Array = jax.Array
PIECE = 512  # tokens of a prompt that are timed
WRITTEN = 256  # tokens that are written to a cache at once, at most
TOKENS, PIECES = 16, 3  # runs of each program, of which the median counts


def stand_in(config: CacheConfig, decoder: DecoderConfig, positions: int) -> Policy:
    """Return the policy for a model that does not exist: the retrieval heads of Razor are drawn."""
    policy = config.policy
    if isinstance(policy, Rolling):
        return policy.of(Path(), decoder, positions)
    if isinstance(policy, Razor):
        scores = np.random.default_rng(0).random((2, decoder.num_layers, decoder.num_kv_heads))
        policy = dataclasses.replace(policy, heads=retrieval_heads(*scores, policy.induction, policy.echo))
    return policy


def measure_caches(decoder: Llama, config: CacheConfig, contexts: Sequence[int]) -> list[dict]:
    """Return a row for each number of cached tokens and policy: seconds, bytes, and FLOPs and bytes by formula.

    The rolling cache keeps as many tokens as the policy costs numbers of its cache.
    """
    sizes, rows = decoder.config, []
    policy = stand_in(config, sizes, max(contexts))
    for length in track(contexts, "benchmark"):
        per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
        rolling = Rolling(max(int(policy.cost(sizes, length).numbers // per_token), Rolling.sinks + 1))
        for name, one in {"full": FULL, "rolling": rolling, config.kind: policy}.items():
            row = {"cache": name, "context": length}
            rows.append(row | (_measured(decoder, one, length) or {"left_out": "the cache does not fit"}))
    return rows


def _measured(decoder: Llama, policy: Policy, length: int) -> dict | None:
    slots, sizes = length + (PIECES + 1) * PIECE, decoder.config
    shapes = jax.eval_shape(lambda: new_cache(decoder, policy, 1, slots))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if held > free_bytes():
        return None
    cache = filled(new_cache(decoder, policy, 1, slots), sizes, decoder.compute.dtype, length)
    token, tokens = (np.zeros((1, count), np.int32) for count in (1, PIECE))
    draws, real = Draws.of([Sampling()]), np.ones(tokens.shape, bool)
    decode = next_token.lower(decoder, token, None, None, cache, draws).compile()
    prefill = append.lower(decoder, tokens, real, None, cache).compile()
    token_seconds, piece_seconds = [], []
    for _ in range(TOKENS):
        begun = time.perf_counter()
        _, cache = jax.block_until_ready(decode(decoder, token, None, None, cache, draws))
        token_seconds.append(time.perf_counter() - begun)
    for _ in range(PIECES):
        begun = time.perf_counter()
        cache = jax.block_until_ready(prefill(decoder, tokens, real, None, cache))
        piece_seconds.append(time.perf_counter() - begun)
    cost, itemsize = policy.cost(sizes, length), jnp.dtype(decoder.compute.dtype).itemsize
    programs = [memory_of(program) for program in (decode, prefill)]
    return {
        "tokens_per_second": 1 / float(np.median(token_seconds)),
        "prompt_tokens_per_second": PIECE / float(np.median(piece_seconds)),
        "cache_bytes": held,
        "memory_bytes": max(m["arguments"] + m["temporaries"] + m["results"] - m["aliases"] for m in programs),
        "token_flops": inference_flops(sizes, 1, 0)["full"] + cost.flops,
        "token_bytes": step_bytes(sizes, 0, 0, itemsize)["full"] + cost.numbers * itemsize,
    }


def filled(cache: Cache, config: DecoderConfig, dtype: Dtype, length: int) -> Cache:
    """Return the cache with `length` tokens, whose keys and values are random."""
    count = cache.piece(1, WRITTEN, "xla")
    shape = 2, config.num_layers, 1, count, config.num_kv_heads, config.head_dim

    @partial(jax.jit, donate_argnums=0)
    def written(cache: Cache, first: Array) -> Cache:
        kept = jax.random.normal(jax.random.fold_in(jax.random.key(0), first), shape, dtype)
        return cache.append(tuple(kept), (first + jnp.arange(count) < length)[None])

    for first in range(0, length, count):
        cache = written(cache, first)
    return cache


def table(rows: list[dict], head: str) -> str:
    """The rows of `measure_caches` in lines for people."""
    lines = [
        head,
        "",
        f"| cached tokens | cache | tokens a second | a prompt's, {PIECE} at once | cache | held with weights | "
        "a token: GFLOP, GB by formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        begin = f"| {row['context']:,} | {row['cache']} "
        if "left_out" in row:
            lines.append(f"{begin}| {row['left_out']} | | | | |")
            continue
        lines.append(
            f"{begin}| {row['tokens_per_second']:.3g} | {row['prompt_tokens_per_second']:.3g} "
            f"| {gib(row['cache_bytes'])} | {gib(row['memory_bytes'])} "
            f"| {row['token_flops'] / 1e9:.3g}, {row['token_bytes'] / 1e9:.3g} |"
        )
    return "\n".join(lines) + "\n"
