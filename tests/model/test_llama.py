"""The decoder: causality by gradient, padding, rows, dtypes, recomputation, tied head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, computed, make_decoder, relative_error, with_leaf

DISTINCT = np.arange(7)[None]


def reach(decoder, mask_BT=None):
    """(T, T): the largest gradient of logits[t] on the embedding of token s."""

    def totals(table):
        return with_leaf(decoder, "embed", table)(DISTINCT, mask_BT)[0].sum(-1)

    return np.abs(jax.jit(jax.jacrev(totals))(decoder.embed[...])[:, :7]).max(-1)


def test_causal_by_gradient(decoder):
    reach_TT = reach(decoder)
    assert not np.triu(reach_TT, 1).any()
    assert (reach_TT[np.tril_indices(7)] > 1e-2).all()


def test_padding_has_no_gradient(decoder):
    """Left padding and a hole: real tokens do not see them, and they see no one before them either way."""
    real = np.array([[False, False, True, True, False, True, True]])
    seen = np.tril(np.outer(real[0], real[0]))
    reach_TT = reach(decoder, real)
    assert not reach_TT[real[0]][:, ~real[0]].any()
    assert (reach_TT[seen] > 1e-2).all()
    assert np.isfinite(reach_TT).all()


def test_left_padding_changes_nothing(decoder, plain, tokens_BT, token_mask_BT):
    """Positions count from the first real token; what stands in the padding does not matter, to the bit."""
    padded = np.asarray(plain(decoder, tokens_BT, token_mask_BT))
    alone = np.asarray(plain(decoder, tokens_BT[1:, 3:]))
    assert relative_error(padded[1:, 3:], alone) < 1e-5
    other = np.where(token_mask_BT, tokens_BT, (tokens_BT + 11) % DECODER.vocab_size)
    np.testing.assert_array_equal(
        np.asarray(plain(decoder, other, token_mask_BT))[token_mask_BT], padded[token_mask_BT]
    )


def test_a_hole_takes_no_position(decoder, plain, tokens_BT):
    holes = np.ones_like(tokens_BT, bool)
    holes[:, 2:4] = False
    with_holes = np.asarray(plain(decoder, tokens_BT, holes))
    assert relative_error(with_holes[:, [0, 1, 4, 5, 6]], plain(decoder, tokens_BT[:, [0, 1, 4, 5, 6]])) < 1e-5


def test_an_all_true_mask_is_no_mask(decoder, plain, tokens_BT):
    ours = plain(decoder, tokens_BT, np.ones_like(tokens_BT, bool))
    assert relative_error(ours, plain(decoder, tokens_BT)) < 1e-6


def test_texts_that_share_a_row_are_read_as_if_alone(decoder, plain, cepe, context_BCL):
    """Logits, with positions from 0 in each; by a CEPE with the row's memory; and no gradient from one to another."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, decoder.config.vocab_size, (1, length)) for length in (5, 1, 4)]
    row = np.concatenate([*texts, np.zeros((1, 2), int)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [5, 1, 4, 2])[None]

    @jax.jit
    def packed(model, tokens, segments, memory=None):
        return model.decoder.logits(model.decode(tokens, memory, segments_BT=segments)[0])

    memory = cepe.encode(context_BCL[:1])
    for ours, wanted in (
        (packed(decoder, row, segments), [plain(decoder, text) for text in texts]),
        (packed(cepe, row, segments, memory), [cepe.decoder.logits(cepe.decode(text, memory)[0]) for text in texts]),
    ):
        np.testing.assert_allclose(ours[:, :10], np.concatenate(wanted, axis=1), atol=2e-5)

    def of_second(embed):
        model = jax.tree.map(lambda x: x, decoder)
        model.embed = model.embed.replace(embed)
        return packed(model, row, segments)[0, 5].sum()

    model = jax.tree.map(lambda x: x, decoder)
    moved = np.flatnonzero(np.abs(jax.grad(of_second)(model.embed[...])).sum(axis=1))
    assert moved.tolist() == [row[0, 5]]


def test_segments_are_checked(decoder, tokens_BT):
    segments = np.ones(tokens_BT.shape, int)
    with pytest.raises(ValueError, match=r"segments_BT is int.*\[.*give integers of shape"):
        decoder.decode(tokens_BT, segments_BT=segments[:, :2])
    with pytest.raises(ValueError, match="segments_BT came with a cache or a mask"):
        decoder.decode(tokens_BT, token_mask_BT=segments > 0, segments_BT=segments)


def test_rows_are_independent(decoder, plain, tokens_BT):
    changed = tokens_BT.copy()
    changed[0] = (changed[0] + 5) % DECODER.vocab_size
    before, after = np.asarray(plain(decoder, tokens_BT)), np.asarray(plain(decoder, changed))
    np.testing.assert_array_equal(after[1], before[1])
    assert relative_error(after[0], before[0]) > 0.1


def test_tied_head_is_the_embedding(decoder, plain, tokens_BT):
    untied = with_leaf(decoder, "head", decoder.embed[...])
    tied = make_decoder(dataclasses.replace(DECODER, tied_head=True))
    assert not hasattr(tied, "head")
    hidden = jax.jit(lambda model, tokens: model.decode(tokens)[0])(tied, tokens_BT)
    wanted = np.asarray(hidden, np.float64) @ np.asarray(tied.embed[...], np.float64).T
    assert relative_error(plain(tied, tokens_BT), wanted) < 1e-6
    assert relative_error(plain(untied, tokens_BT), plain(decoder, tokens_BT)) > 0.1


def test_bfloat16_activations_float32_logits(decoder, plain, tokens_BT):
    narrow = computed(decoder, dtype="bfloat16")
    hidden, cache = jax.eval_shape(lambda model, tokens: model.decode(tokens), narrow, tokens_BT)
    assert hidden.dtype == jnp.bfloat16
    assert cache is None
    ours = plain(narrow, tokens_BT)
    assert ours.dtype == jnp.float32
    # accumulated and returned in fp32: logits rounded to bf16 would equal their own rounding
    assert (np.asarray(ours) != np.asarray(ours.astype(jnp.bfloat16), np.float32)).mean() > 0.9
    assert 1e-4 < relative_error(ours, plain(decoder, tokens_BT)) < 0.05


def test_remat_changes_no_gradient(decoder, tokens_BT):
    def loss(model):
        return (model(tokens_BT) ** 2).mean()

    grads, programs = {}, {}
    for mode in ("none", "dots", "full", "offload"):
        model = computed(decoder, remat=mode)
        programs[mode] = str(jax.make_jaxpr(jax.grad(loss))(model))
        if mode != "dots":
            grads[mode] = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    for mode in ("full", "offload"):
        for ours, wanted in zip(grads[mode], grads["none"], strict=True):
            assert relative_error(ours, wanted) < 1e-5
    B, T = tokens_BT.shape
    assert f"f32<host>[{B},{T},{DECODER.width}]" in programs["offload"]
    recomputed = {mode: program.count("dot_general") for mode, program in programs.items()}
    assert recomputed["none"] < recomputed["dots"] < recomputed["full"]


def test_remat_with_a_typo_is_refused(decoder):
    with pytest.raises(ValueError, match="remat 'fulll'.*none.*dots.*full"):
        computed(decoder, remat="fulll")
