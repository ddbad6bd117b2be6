"""Generation as its definition says it: the oracle of everything that generates."""

from collections.abc import Callable

import jax
import numpy as np

from cepe_jax.inference.generate import Draws, Sampling, sample

draw = jax.jit(sample)


def recompute(call: Callable, prompts: list[list[int]], samplings: list[Sampling], steps: int) -> list[list[int]]:
    """The whole model anew for each token: no cache, no masked padding; what stands after a token it cannot see.

    Each row is drawn by itself.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.zeros((len(prompts), lengths.max() + steps), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    for step in range(steps):
        logits_BTV = call(tokens_BT)
        for row, sampling in enumerate(samplings):
            end = lengths[row] + step
            draws = Draws.of([sampling])._replace(number=step)
            tokens_BT[row, end] = draw(logits_BTV[row : row + 1, end - 1], draws)[0]
    return [tokens_BT[row, n : n + steps].tolist() for row, n in enumerate(lengths)]
