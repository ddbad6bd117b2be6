"""Attention against fp64 numpy loops, its merge, and rows without any key."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from support.kernels import define_cudnn, interpret_splash
from support.models import relative_error

from cepe_jax.model import kernels
from cepe_jax.model.attention import Mask, attend_partial, merge
from cepe_jax.model.backends import attend
from cepe_jax.model.kernels import CausalMask
from cepe_jax.sharding import balanced

B, T, S, N, K, H = 2, 4, 6, 6, 2, 5


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def valid_BS():
    valid = np.ones((B, S), bool)
    valid[0, [0, 3]] = False
    valid[1, :5] = False
    return valid


@partial(jax.jit, static_argnames="causal")
def run(q, k, v, valid_BS=None, causal=False):
    return attend(q, k, v, Mask(causal, valid_BS))


def oracle(q, k, v, seen_BTS):
    """Head n reads kv head n // (N / K), stated with loops."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = seen_BTS[b, t].nonzero()[0]
        if len(keys):
            head = n // (q.shape[2] // k.shape[2])
            scores = k[b, keys, head].astype(np.float64) @ q[b, t, n].astype(np.float64) / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, keys, head].astype(np.float64)
    return out


def test_attend_masks_holes_and_groups_heads(qkv, valid_BS):
    seen = np.broadcast_to(valid_BS[:, None], (B, T, S))
    assert relative_error(run(*qkv, valid_BS), oracle(*qkv, seen)) < 1e-6
    assert relative_error(run(*qkv), oracle(*qkv, np.ones((B, T, S), bool))) < 1e-6


def test_attend_causal_and_valid_together(qkv, valid_BS):
    q, k, v = qkv[0], qkv[1][:, :T], qkv[2][:, :T]
    seen = np.tril(np.ones((T, T), bool)) & valid_BS[:, None, :T]
    ours = run(q, k, v, valid_BS[:, :T], causal=True)
    assert relative_error(ours, oracle(q, k, v, seen)) < 1e-6
    assert not ours[0, 0].any()  # its only key is masked


def test_texts_of_a_row_see_themselves_alone(qkv):
    q, k, v = qkv[0], qkv[1][:, :T], qkv[2][:, :T]
    segments = np.array([[5, 5, 2, 2], [1, 3, 3, 3]])
    seen = np.tril(segments[:, :, None] == segments[:, None])
    ours = jax.jit(lambda *qkv: attend(*qkv, Mask(True, segments_BT=segments)))(q, k, v)
    assert relative_error(ours, oracle(q, k, v, seen)) < 1e-6


def test_scores_far_apart_stay_finite(qkv):
    q, k, v = qkv
    ours = run(q * 1e3, k * 1e3, v)
    assert relative_error(ours, oracle(q * 1e3, k * 1e3, v, np.ones((B, T, S), bool))) < 1e-6


def test_a_row_without_keys_is_zero_with_zero_gradients(qkv):
    valid = np.ones((B, S), bool)
    valid[0] = False

    def loss(q, k, v):
        out = run(q, k, v, valid)
        return (out**2).sum() + out.sum(), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
    assert not out[0].any()
    assert out[1].any()
    for grad in grads:
        assert not grad[0].any()
        assert np.isfinite(grad).all()
        assert grad[1].any()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_softmax(qkv, valid_BS, causal):
    """The detached peak must not change them: central differences of the fp64 oracle."""
    keys = T if causal else S
    q, k, v = qkv[0], qkv[1][:, :keys], qkv[2][:, :keys]
    valid_BS = valid_BS[:, :keys]
    seen = np.broadcast_to(valid_BS[:, None], (B, T, keys))
    seen = np.tril(seen) if causal else seen
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((B, T, N, H))
    grads = jax.grad(lambda *x: (run(*x, valid_BS, causal=causal) * weight).sum(), argnums=(0, 1, 2))(q, k, v)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(wide[i].shape)
        up, down = (wide[:i] + [wide[i] + sign * 1e-5 * direction] + wide[i + 1 :] for sign in (1, -1))
        slope = ((oracle(*up, seen) - oracle(*down, seen)) * weight).sum() / 2e-5
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_nothing_of_the_scores_size_is_kept_for_the_derivative(qkv, valid_BS):
    q, k, v = (np.tile(x, (1, 20, 1, 1)) for x in qkv)
    _, pullback = jax.vjp(lambda *x: attend(*x, Mask(valid_BS=np.tile(valid_BS, (1, 20)))), q, k, v)
    assert max(x.size for x in jax.tree.leaves(pullback)) < B * N * 20 * T * 20 * S / 10


@pytest.mark.parametrize("cuts", [(0, 2, 6), (0, 1, 2, 5, 6)])
def test_merging_split_keys_equals_one_pass(qkv, valid_BS, cuts):
    """Some parts are wholly masked, and the parts' peaks lie far apart."""
    q, k, v = qkv[0], qkv[1].copy(), qkv[2]
    k[:, 2:] *= 20
    seen = np.broadcast_to(valid_BS[:, None], (B, T, S))
    parts = [
        attend_partial(q, k[:, a:b], v[:, a:b], Mask(valid_BS=valid_BS[:, a:b]))
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    wanted = oracle(q, k, v, seen)
    assert relative_error(merge(*parts), wanted) < 1e-6
    assert relative_error(merge(*parts[::-1]), wanted) < 1e-6


def test_merging_only_masked_parts_is_zero(qkv):
    q, k, v = qkv
    nothing = attend_partial(q, k, v, Mask(valid_BS=np.zeros((B, S), bool)))
    assert not merge(nothing, nothing).any()


def test_bfloat16_in_bfloat16_out_with_float32_sums(qkv):
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    values, total, peak = attend_partial(*narrow, Mask())
    assert {values.dtype, total.dtype, peak.dtype} == {jnp.dtype("float32")}
    ours = run(*narrow)
    assert ours.dtype == jnp.bfloat16
    wanted = oracle(*(np.asarray(x, np.float32) for x in narrow), np.ones((B, T, S), bool))
    assert relative_error(ours, wanted) < 2**-7


@pytest.fixture
def interpreted(monkeypatch):
    interpret_splash(monkeypatch)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_causal_kernel_has_the_blocks_of_the_whole_mask(parts):
    """As made from a mask of which every element is looked at."""
    length, shards = 4096, {"head_shards": 1, "q_seq_shards": parts}
    order = balanced(np.arange(length, dtype=np.int32)[None], parts)[0]
    made = []
    for kind in (CausalMask, splash_attention_mask.CausalMask):
        mask = kind((length, length))
        mask.q_sequence = order
        heads = splash_attention_mask.MultiHeadMask([mask] * 2)
        kernel = splash_attention_kernel.make_splash_mha(heads, **shards)
        made.append(jax.tree.leaves(kernel))
    assert len(made[0]) == len(made[1]) > 0
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "holes", "texts"),
    [
        (130, 130, True, True, 1),
        (5, 300, False, True, 1),
        (128, 200, False, False, 1),
        (5, 900, False, False, 1),
        (130, 130, True, False, 4),
        (140, 140, True, True, 3),
    ],
)
def test_splash_equals_xla(interpreted, monkeypatch, queries, keys, causal, holes, texts):
    """Outputs and gradients; lengths that fill no block, rows without a key, grouped heads, left padding, segments.

    From 640 tokens on blocks are large, and what is filled up to them is not read.
    """
    for name, tokens in {"BLOCK": 256, "LARGE_BLOCK": 512, "LONG": 640}.items():
        monkeypatch.setattr(kernels, name, tokens)
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, t, n, 8)).astype(np.float32) for t, n in ((queries, 4), (keys, 2), (keys, 2)))
    valid = rng.random((2, keys)) < 0.7
    valid[0, : keys // 3], valid[1] = False, False
    segments = None if texts == 1 else np.sort(rng.integers(0, texts, (2, keys)), axis=1)
    mask, weight = Mask(causal, valid if holes else None, segments), rng.standard_normal(q.shape)
    if segments is not None and holes:  # a query whose own text is masked wholly is nobody's
        weight *= (valid[:, None] & np.tril(segments[:, :, None] == segments[:, None])).any(axis=2)[..., None, None]

    @partial(jax.jit, static_argnums=0)
    def run(backend, *qkv):
        def loss(*qkv):
            out = attend(*qkv, mask, backend)
            return (out * weight).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)

    (*grads, out), (*wanted, wanted_out) = (jax.tree.leaves(run(backend, q, k, v)) for backend in ("splash", "xla"))
    assert relative_error(out * (weight != 0), wanted_out * (weight != 0)) < 1e-5
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.fixture
def flash(monkeypatch):
    define_cudnn(monkeypatch)


@pytest.mark.parametrize(
    ("causal", "queries", "keys", "holes", "texts"),
    [
        (True, 5, 5, False, 1),
        (True, 5, 5, True, 1),
        (True, 5, 5, False, 2),
        (True, 29, 29, True, 1),
        (True, 29, 29, False, 2),
        (True, 29, 29, True, 2),
        (False, 3, 7, False, 1),
        (False, 3, 7, True, 1),
        (False, 4, 6, False, 1),
        (False, 4, 6, True, 1),
    ],
)
def test_cudnn_equals_xla_under_vmap(flash, monkeypatch, causal, queries, keys, holes, texts):
    """Values and gradients: the mapped axis becomes rows, odd lengths are filled, rows without a key are zero.

    A window of 29 tokens is read in four chunks, and texts begin within them.
    """
    monkeypatch.setattr(kernels, "CHUNK", 8)
    rng = np.random.default_rng(0)
    q, k, v, g = (
        rng.standard_normal((3, B, *shape)).astype(np.float32)
        for shape in ((queries, N, H), (keys, K, H), (keys, K, H), (queries, N, H))
    )
    valid = rng.random((3, B, keys)) < 0.6
    valid[0, 0] = False
    segments = None if texts == 1 else np.array([[1, 1, 2, 2, 2], [1, 2, 2, 2, 0]])
    if texts == 2 and queries > 5:
        segments = np.array([[1] * 13 + [2] * 16, [1] * 3 + [2] * 2 + [3] * 17 + [0] * 7])
    promised = np.ones((3, B, queries, 1, 1), bool)
    if texts == 2 and holes:  # nothing is to a query of whose text no key is valid
        promised[..., 0, 0] = (valid[:, :, None] & np.tril(segments[:, :, None] == segments[:, None])).any(axis=3)

    def of(backend):
        def loss(q, k, v, valid):
            mapped = jax.vmap(
                lambda q, k, v, valid: attend(q, k, v, Mask(causal, valid, segments), backend), (1, 1, 1, 1)
            )
            out = mapped(*(x.swapaxes(0, 1) for x in (q, k, v)), valid if valid is None else valid.swapaxes(0, 1))
            return (out * promised * g).sum(), out * promised

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v, valid if holes else None)

    for ours, wanted in zip(jax.tree.leaves(of("cudnn")), jax.tree.leaves(of("xla")), strict=True):
        assert relative_error(ours, wanted) < 1e-5


def test_cudnn_passes_over_chunks_of_other_texts(flash, monkeypatch):
    """In both passes, by the texts of each row: what is not a number in the first text stays there."""
    monkeypatch.setattr(kernels, "CHUNK", 8)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 32, heads, H)).astype(np.float32) for heads in (N, K, K))
    k[:, :16] = np.nan
    segments = np.repeat([[1, 2], [3, 5]], 16, axis=1)

    def second(*qkv):
        out = attend(*qkv, Mask(True, segments_BT=segments), "cudnn")[:, 16:]
        return (out**2).sum(), out

    (dq, *_), out = jax.jit(jax.grad(second, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(out).all()
    assert np.isfinite(dq[:, 16:]).all()
