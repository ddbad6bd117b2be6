"""RePlug: the decoder reads each context by itself, and what it predicts is averaged."""

import jax
import jax.numpy as jnp

from cepe_jax.model.llama import Llama

Array = jax.Array


def replug(
    model: Llama,
    tokens_BT: Array,
    context_BCL: Array,
    scores_BC: Array,
    temperature: float = 1.0,
    context_mask_BCL: Array | None = None,
) -> Array:
    """Log probabilities (B, T, V) of the next token, averaged over chunks (RePlug, Shi et al. 2023, equation 2).

    The decoder reads each chunk by itself before the tokens; softmax(scores / temperature) weights the resulting
    probabilities. What `context_mask_BCL` leaves out is not seen but takes its positions.
    """
    B, C, L = context_BCL.shape
    T = tokens_BT.shape[1]
    read_NS = jnp.concatenate([context_BCL, jnp.broadcast_to(tokens_BT[:, None], (B, C, T))], axis=2).reshape(B * C, -1)
    real_BCL = jnp.ones(context_BCL.shape, bool) if context_mask_BCL is None else context_mask_BCL
    mask_NS = jnp.pad(real_BCL, ((0, 0), (0, 0), (0, T)), constant_values=True).reshape(B * C, -1)
    positions_NS = jnp.broadcast_to(jnp.arange(L + T), read_NS.shape)
    hidden_NSD, _ = model.decode(read_NS, mask_NS, positions_BT=positions_NS)
    log_probs_BCTV = jax.nn.log_softmax(model.logits(hidden_NSD[:, -T:])).reshape(B, C, T, -1)
    log_weights_BC = jax.nn.log_softmax(scores_BC / temperature, axis=1)
    return jax.nn.logsumexp(log_probs_BCTV + log_weights_BC[:, :, None, None], axis=1)
