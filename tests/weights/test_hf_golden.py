"""Weights in the reference's layout give the reference's numbers (see golden/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cepe_jax.config import Compute, EncoderConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.encoder import Encoder
from cepe_jax.weights.source import load

GOLDEN = Path(__file__).parents[1] / "golden"


def read(name: str, dtype: str = "float32"):
    if list((GOLDEN / name).glob("*.bin")):
        pytest.importorskip("torch")
    return load(GOLDEN / name, Compute(dtype)), dict(np.load(GOLDEN / name / "expected.npz"))


@jax.jit
def forward(model, *args):
    return model(*args)


def error(ours, wanted, where=None) -> float:
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    difference = np.abs(ours - wanted)
    scale = np.abs(wanted)
    if where is not None:
        difference, scale = difference[where], scale[where]
    return difference.max() / scale.max()


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_cepe(name):
    model, golden = read(name)
    assert isinstance(model, Cepe)
    tokens, context = golden["input_ids"], golden["encoder_input_ids"]
    mask = golden["encoder_attention_mask"].astype(bool)
    hidden = jax.jit(Cepe.encode)(model, context, mask).states_BME.reshape(golden["encoder_hidden"].shape)
    assert error(hidden, golden["encoder_hidden"], mask) <= 1e-4
    assert error(forward(model, tokens, context, mask), golden["logits"]) <= 1e-4
    assert error(forward(model, tokens, context, np.ones_like(mask)), golden["logits_no_padding"]) <= 1e-4
    assert error(forward(model, tokens), golden["logits_no_context"]) <= 1e-4


def test_left_padded():
    model, _ = read("tiny_mha")
    golden = dict(np.load(GOLDEN / "tiny_mha" / "left_padded.npz"))
    token_mask = golden["attention_mask"].astype(bool)
    mask = golden["encoder_attention_mask"].astype(bool)
    logits = forward(model, golden["input_ids"], golden["encoder_input_ids"], mask, token_mask)
    assert error(logits, golden["logits"], token_mask) <= 1e-4


def test_edge():
    model, golden = read("tiny_edge")
    tokens, context = golden["input_ids"], golden["encoder_input_ids"]
    assert error(forward(model, tokens, context), golden["logits"]) <= 1e-4
    assert error(forward(model, tokens), golden["logits_no_context"]) <= 1e-4
    every_token, every_chunk = np.ones(tokens.shape, bool), np.ones(context.shape, bool)
    for case in ("holes", "absent"):
        mask = golden[f"mask_{case}"].astype(bool)
        assert error(forward(model, tokens, context, mask, every_token), golden[f"logits_{case}"]) <= 1e-4
    token_mask = golden["token_mask"].astype(bool)
    padded = forward(model, tokens, context, every_chunk, token_mask)
    assert error(padded, golden["logits_left_padded"], token_mask) <= 1e-4


def test_edge_in_bfloat16():
    model, golden = read("tiny_edge", "bfloat16")
    assert model.decoder.layers.mlp.gate.dtype == jnp.bfloat16
    assert model.decoder.compute.dtype == model.encoder.compute.dtype == "bfloat16"
    logits = forward(model, golden["input_ids"], golden["encoder_input_ids"])
    assert error(logits, golden["logits"]) <= 1.5 * golden["bf16_error"]


def test_master_weights_stay_in_float32():
    model = load(GOLDEN / "tiny_edge", Compute("bfloat16"), master=("encoder", "cross"))
    assert {leaf.dtype for leaf in jax.tree.leaves((model.encoder, model.cross))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(model.decoder)} == {jnp.dtype("bfloat16")}
    assert model.encoder.compute.dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"\bhead\b.*float32"):
        load(GOLDEN / "tiny_edge", master=("head",))


def test_mlm():
    model, golden = read("tiny_mlm")
    assert isinstance(model, Encoder)
    assert isinstance(model.config, EncoderConfig)
    mask = golden["attention_mask"].astype(bool)
    logits = model.mlm_logits(forward(model, golden["input_ids"], mask))
    assert error(logits, golden["logits"], mask) <= 1e-4
