"""Checks of what callers hand in: a wrong shape, dtype or id is one line that names both sides."""

import jax
import jax.numpy as jnp
import numpy as np


def check_tokens(name: str, tokens, num_dims: int, vocab_size: int) -> None:
    """ValueError unless `tokens` is an integer array of `num_dims` axes with ids in [0, vocab_size).

    Ids are looked at where they are known, that is outside of a trace; inside one an id outside gives NaN.
    """
    if tokens.ndim != num_dims or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} is {tokens.dtype}{list(tokens.shape)}: give integers with {num_dims} axes")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        ids = np.asarray(tokens)
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids.max() if ids.max() >= vocab_size else ids.min()
            raise ValueError(f"{name} holds id {bad}, outside the vocabulary of {vocab_size}: use its tokenizer")


def check_mask(name: str, mask, shape: tuple[int, ...]) -> None:
    """ValueError unless `mask` is None or boolean of this shape."""
    if mask is not None and (mask.shape != shape or mask.dtype != bool):
        raise ValueError(f"{name} is {mask.dtype}{list(mask.shape)}: give booleans of shape {list(shape)}")


def check_segments(segments, shape: tuple[int, ...]) -> None:
    """ValueError unless `segments` is an integer array of this shape."""
    if segments.shape != shape or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(f"segments_BT is {segments.dtype}{list(segments.shape)}: give integers of shape {list(shape)}")


def check_chunk_length(chunk_length: int) -> None:
    """ValueError unless a chunk has tokens."""
    if chunk_length < 1:
        raise ValueError(f"chunk_length is {chunk_length}: give a number above 0")
