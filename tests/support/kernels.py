"""Kernels of accelerators on a CPU: splash attention interpreted, and cuDNN's attention by its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel


def interpret_splash(patch: pytest.MonkeyPatch) -> None:
    """Let splash attention's kernels be interpreted: they compile for TPUs alone."""
    make = partial(splash_attention_kernel.make_splash_mha, interpret=True)
    patch.setattr(splash_attention_kernel, "make_splash_mha", make)


def define_cudnn(patch: pytest.MonkeyPatch) -> None:
    """Define cuDNN's attention by FlashAttention-2: what it refuses, its output, its log-sum-exp, their derivative.

    All are computed in fp32, and the output and gradients have the inputs' dtype.
    """

    def scores_of(q, k, seen):
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        return jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[3] ** -0.5, -1e30)

    @jax.custom_vjp
    def attention(q, k, v, seen):
        return forward(q, k, v, seen)[0]

    def forward(q, k, v, seen):
        dtype, (q, k, v) = q.dtype, (x.astype(jnp.float32) for x in (q, k, v))
        scores = scores_of(q, k, seen)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None])
        out = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)).astype(dtype)
        return out, (q, k, v, seen, lse, out)

    def backward(residuals, d_out):
        q, k, v, seen, lse, out = residuals
        dtype, d_out = out.dtype, d_out.astype(jnp.float32)
        repeats = q.shape[2] // k.shape[2]
        weights = jnp.exp(scores_of(q, k, seen) - lse[..., None])
        d_weights = jnp.einsum("btnh,bsnh->bnts", d_out, jnp.repeat(v, repeats, axis=2))
        d_scores = weights * (d_weights - (d_out * out).sum(-1).swapaxes(1, 2)[..., None]) * q.shape[3] ** -0.5
        dq = jnp.einsum("bnts,bsnh->btnh", d_scores, jnp.repeat(k, repeats, axis=2))
        dk, dv = jnp.einsum("bnts,btnh->bsnh", d_scores, q), jnp.einsum("bnts,btnh->bsnh", weights, d_out)
        dk, dv = (x.reshape(*x.shape[:2], k.shape[2], repeats, -1).sum(3) for x in (dk, dv))
        return *(x.astype(dtype) for x in (dq, dk, dv)), None

    attention.defvjp(forward, backward)

    def dot_product_attention(q, k, v, mask, is_causal, implementation):
        assert implementation == "cudnn"
        (rows, queries, _, _), keys = q.shape, k.shape[1]
        assert queries % 2 == keys % 2 == 0
        seen = jnp.tril(jnp.ones((1, 1, queries, keys), bool)) if is_causal else jnp.ones((1, 1, queries, keys), bool)
        if mask is not None:
            assert mask.shape == (rows, 1, queries, keys)
            seen = seen & mask
        return attention(q, k, v, seen)

    patch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
