"""What the compiled step of decoding holds: the program that `stream` and `chat` run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from support.models import DECODER, ENCODER

from cepe_jax.benchmarks.hlo import arrays, instructions
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.inference.generate import Draws, Sampling, next_token
from cepe_jax.model.cross import Memory

ROWS, KV = 2, DECODER.num_kv_heads * DECODER.head_dim


def program(cepe, tokens: int, slots: int, memory: int) -> str:
    """Of `tokens` tokens of each row after others in a cache of `slots`."""
    cache = jax.eval_shape(lambda: FullCache.create(DECODER, "float32", ROWS, slots))
    states = jax.ShapeDtypeStruct((ROWS, memory, ENCODER.width), jnp.float32)
    held = Memory(states, jax.ShapeDtypeStruct((ROWS, memory), bool))
    mask = None if tokens == 1 else jax.ShapeDtypeStruct((ROWS, tokens), bool)
    given = jax.ShapeDtypeStruct((ROWS, tokens), jnp.int32), mask, held, dataclasses.replace(cache, empty=False)
    return next_token.lower(cepe, *given, Draws.of([Sampling()] * ROWS)).compile().as_text()


@pytest.mark.parametrize(("tokens", "exists"), [(1, False), (64, True)])
def test_keys_and_values_of_the_memory(cepe, tokens, exists):
    """E = 16 is less than K x H = 20. In decoding no array is as large, whatever its axes; in prefill they are made."""
    largest = max(math.prod(shape) for _, shape in arrays(program(cepe, tokens, 128, 4096)))
    assert (largest >= ROWS * 4096 * KV) == exists


def test_a_step_turns_nothing_around(cepe):
    """Keys and values in the cache are read, and one slot of them is written: no copy of another order is made."""
    size, moved = ROWS * 1024 * KV, []
    for text in instructions(program(cepe, 1, 1024, 128)):
        result = text.split("(")[0]
        if result.endswith((" copy", " transpose")) and any(math.prod(shape) >= size for _, shape in arrays(result)):
            moved.append(text[:100])
    assert moved == []
