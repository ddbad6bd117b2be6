"""Attention over masked keys, in one pass or merged from partial results."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

_NEVER = jnp.finfo(jnp.float32).min


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. `valid_BS`: true for keys that exist. `causal`: query i sees keys up to i."""

    causal: bool = False
    valid_BS: jax.Array | None = None

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Boolean (B or 1, 1, 1, T, S)."""
        seen = jnp.ones((1, 1, 1, num_queries, num_keys), bool)
        if self.causal:
            seen &= jnp.tril(seen)
        if self.valid_BS is not None:
            seen &= self.valid_BS[:, None, None, None, :]
        return seen


def attend_partial(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised attention over some of the keys, to be merged with `merge`.

    Returns, in fp32: values weighted by exp(score - peak) (B, T, K, G, H), the sum of the weights and the peak
    (B, T, K, G, 1 each). Scores are scaled by 1 / sqrt(H); softmax arithmetic is fp32. A query without any valid
    key has sum 0.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    seen = mask.dense(T, S)
    scores = jnp.where(seen, scores, _NEVER)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    values = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    return values, jnp.moveaxis(total, 3, 1), jnp.moveaxis(peak, 3, 1)


def merge(*parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """The attention over the union of the parts' keys, (B, T, N, H) in fp32; zero for a query with no valid key."""
    peak = parts[0][2]
    for _, _, other in parts[1:]:
        peak = jnp.maximum(peak, other)
    values = sum(v * jnp.exp(p - peak) for v, _, p in parts)
    total = sum(t * jnp.exp(p - peak) for _, t, p in parts)
    nothing = total == 0  # not `total > 0`: a NaN must stay one
    out = jnp.where(nothing, 0.0, values / jnp.where(nothing, 1.0, total))
    B, T, K, G, H = out.shape
    return out.reshape(B, T, K * G, H)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys of `mask`, (B, T, N, H) in q's dtype; zero where no key is valid.

    Query heads are grouped over the K key/value heads (GQA): head n reads kv head n // (N / K).
    """
    return merge(attend_partial(q_BTNH, k_BSKH, v_BSKH, mask)).astype(q_BTNH.dtype)
