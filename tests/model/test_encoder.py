"""The encoder sees both ways, and its MLM head is the released one's."""

import dataclasses

import jax
import numpy as np
import pytest
from support.models import ENCODER, computed, float64, make_encoder, relative_error, with_leaf

from cepe_jax.model.encoder import Encoder

TOKENS = np.array([[3, 1, 64, 7, 2, 9], [5, 64, 3, 0, 4, 1]])
MASK = np.array([[False, True, True, False, True, True], [True, True, True, True, True, False]])


@pytest.fixture(scope="module")
def encode():
    return jax.jit(Encoder.__call__)


def reach(encoder, mask_BL):
    """(L, L): the largest gradient of the hidden state of token l on the embedding of token m."""

    def totals(table):
        hidden = with_leaf(encoder, "embed", table)(TOKENS[:1], mask_BL)[0]
        return (hidden * np.arange(1, ENCODER.width + 1)).sum(-1)

    jacobian = jax.jit(jax.jacrev(totals))(encoder.embed[...])
    return np.abs(jacobian[:, TOKENS[0]]).max(-1)


def test_every_token_sees_every_token(encoder):
    assert (reach(encoder, None) > 1e-3).all()


def test_real_tokens_see_real_tokens_only(encoder):
    real = MASK[0]
    reach_LL = reach(encoder, MASK[:1])
    assert not reach_LL[real][:, ~real].any()
    assert (reach_LL[np.ix_(real, real)] > 1e-3).all()


def test_ids_in_the_padding_and_other_rows_do_not_matter(encoder, encode):
    before = np.asarray(encode(encoder, TOKENS, MASK))
    other = np.where(MASK, TOKENS, 33)
    np.testing.assert_array_equal(np.asarray(encode(encoder, other, MASK))[MASK], before[MASK])
    other[0] = 11
    np.testing.assert_array_equal(np.asarray(encode(encoder, other, MASK))[1, :5], before[1, :5])


def test_right_padding_changes_nothing(encoder, encode):
    alone = encode(encoder, TOKENS[1:, :5])
    assert relative_error(np.asarray(encode(encoder, TOKENS, MASK))[1:, :5], alone) < 1e-5


def test_order_matters(encoder, encode):
    """Without rotary positions a permutation of the tokens would only permute the hidden states."""
    order = np.array([5, 4, 3, 2, 1, 0])
    assert relative_error(np.asarray(encode(encoder, TOKENS[:, order]))[:, order], encode(encoder, TOKENS)) > 0.05


def test_hidden_states_are_bfloat16_when_asked(encoder, encode):
    narrow = encode(computed(encoder, dtype="bfloat16"), TOKENS)
    assert narrow.dtype == "bfloat16"
    assert 1e-4 < relative_error(narrow, encode(encoder, TOKENS)) < 0.05


def test_mlm_head(encoder, encode):
    """dense + bias, SiLU, RMSNorm with the encoder's eps, the embedding transposed, + bias."""
    hidden = encode(encoder, TOKENS)
    weights = float64(encoder)
    head = weights["mlm_head"]
    x = np.asarray(hidden, np.float64) @ head["dense"] + head["dense_bias"]
    x = x / (1 + np.exp(-x))
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + ENCODER.norm_eps) * head["norm"]["scale"]
    ours = jax.jit(Encoder.mlm_logits)(encoder, hidden)
    assert ours.dtype == np.float32
    assert relative_error(ours, x @ weights["embed"].T + head["bias"]) < 1e-5


def test_no_mlm_head_no_mlm_logits():
    headless = make_encoder(dataclasses.replace(ENCODER, mlm_head=False))
    with pytest.raises(ValueError, match="MLM.*mlm_head"):
        headless.mlm_logits(np.zeros((1, 2, ENCODER.width), np.float32))
