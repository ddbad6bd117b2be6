"""RePlug against the reference's numbers."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import relative_error

from cepe_jax.evaluation.replug import replug
from cepe_jax.weights.huggingface import load

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_replug(name):
    """Right padding stands between chunk and input: it is not seen, and it is counted."""
    if list((GOLDEN / name).glob("*.bin")):
        pytest.importorskip("torch")
    decoder, golden = load(GOLDEN / name).decoder, np.load(GOLDEN / name / "expected.npz")
    tokens, mask = golden["input_ids"], golden["encoder_attention_mask"].astype(bool)
    inputs = decoder, tokens, golden["encoder_input_ids"], golden["replug_scores"], golden["replug_temperature"]
    assert not mask.all()
    log_probs = np.asarray(jax.jit(replug)(*inputs, mask))
    assert relative_error(log_probs, golden["replug_log_probs"][:, -tokens.shape[1] :]) <= 1e-4
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)


def test_replug_of_one_chunk_is_the_decoder(decoder, plain, tokens_BT):
    """And equal scores are a plain mean of probabilities."""
    context_BCL = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (2, 3, 4))
    read = np.concatenate([context_BCL, np.repeat(tokens_BT[:, None], 3, axis=1)], axis=2)
    logits = np.asarray(plain(decoder, read.reshape(6, -1)))[:, 4:].reshape(2, 3, *tokens_BT.shape[1:], -1)
    probabilities = np.asarray(jax.nn.softmax(logits))
    both = jax.jit(replug)(decoder, tokens_BT, context_BCL, np.ones((2, 3), np.float32))
    np.testing.assert_allclose(np.exp(both), probabilities.mean(1), rtol=1e-4)
    sure = np.array([[0, 90, 0], [0, 0, 90]], np.float32)
    chosen = jax.jit(replug)(decoder, tokens_BT, context_BCL, sure)
    np.testing.assert_allclose(np.exp(chosen), probabilities[[0, 1], [1, 2]], rtol=1e-4)
