"""The probabilities of tokens, from logits."""

import jax
import jax.numpy as jnp

Array = jax.Array


def token_nll(logits: Array, labels: Array) -> Array:
    """Return -log p(label) in nats at every position; 0 for a label below 0, which is no target."""
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels < 0, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked)
