"""Rotary positions against formulas written another way, and against transformers where it is installed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import relative_error

from cepe_jax.config import RopeConfig
from cepe_jax.model.rope import inverse_frequencies, rope_table, rotate

HEAD_DIM = 64
CONFIGS = {
    "default": RopeConfig(theta=500_000.0),
    "linear": RopeConfig(theta=10_000.0, scaling="linear", factor=4.0),
    "yarn": RopeConfig(theta=10_000.0, scaling="yarn", factor=16.0, original_length=4096),
    "yarn_set": RopeConfig(
        scaling="yarn", factor=8.0, original_length=2048, beta_fast=20.0, beta_slow=2.0, attention_factor=1.5
    ),
    "llama3": RopeConfig(
        theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "llama3_32": RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_length=4096, high_freq_factor=3.0),
}


def formula(config: RopeConfig, i: int) -> float:
    """Radians per position of pair i, one scalar at a time."""
    plain = 1.0 / config.theta ** (2 * i / HEAD_DIM)
    wavelength = 2 * math.pi / plain
    if config.scaling == "default":
        return plain
    if config.scaling == "linear":
        return plain / config.factor
    if config.scaling == "llama3":  # Llama 3.1: by wavelength, with a ramp between two of them
        if wavelength < config.original_length / config.high_freq_factor:
            return plain
        if wavelength > config.original_length / config.low_freq_factor:
            return plain / config.factor
        keep = (config.original_length / wavelength - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        return (1 - keep) * plain / config.factor + keep * plain

    def pair_turning(times):  # the (real) pair that turns so many times over the original length
        return HEAD_DIM * math.log(config.original_length / (2 * math.pi * times)) / (2 * math.log(config.theta))

    low, high = math.floor(pair_turning(config.beta_fast)), math.ceil(pair_turning(config.beta_slow))
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)  # YaRN's ramp, in pairs
    return plain * (1 - ramp) + plain / config.factor * ramp


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_follow_the_formula(name):
    config = CONFIGS[name]
    ours, factor = inverse_frequencies(config, HEAD_DIM)
    np.testing.assert_allclose(ours, [formula(config, i) for i in range(HEAD_DIM // 2)], rtol=1e-12)
    assert factor == {"yarn": pytest.approx(0.1 * math.log(16) + 1), "yarn_set": 1.5}.get(name, 1.0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_frequencies_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS[name]
    rope = {"rope_type": config.scaling, "rope_theta": config.theta, "factor": config.factor}
    if config.scaling == "yarn":
        rope |= {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow}
        rope |= {"attention_factor": config.attention_factor} if config.attention_factor else {}
    if config.scaling == "llama3":
        rope |= {"low_freq_factor": config.low_freq_factor, "high_freq_factor": config.high_freq_factor}
    if config.original_length:
        rope |= {"original_max_position_embeddings": config.original_length}
    theirs = transformers.LlamaConfig(
        hidden_size=HEAD_DIM * 2,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=int(config.original_length * config.factor) or 4096,
        rope_parameters=rope,
    )
    ours, factor = inverse_frequencies(config, HEAD_DIM)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[config.scaling](theirs, "cpu")
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=2e-6)
    assert factor == pytest.approx(wanted_factor)


def test_tables_of_a_base_for_131072_positions_are_transformers():
    """ChatQA 2's base. Theirs are computed from frequencies in fp64: they take powers in fp32, whose last bits 131,072
    positions turn into angles of 0.01, in pairs whose frequency differs.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, positions, width = 1.5e8, 131_072, 128
    sizes = {"hidden_size": 2 * width, "num_attention_heads": 2, "head_dim": width}
    rope = {"rope_type": "default", "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, max_position_embeddings=positions, rope_parameters=rope))
    ours, factor = inverse_frequencies(RopeConfig(theta=theta), width)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2**-23)
    assert factor == theirs.attention_scaling == 1
    theirs.inv_freq = (theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)).float()
    wanted = theirs(torch.zeros(()), torch.arange(positions)[None])
    table = rope_table(RopeConfig(theta=theta), width, np.arange(positions)[None])
    for one, their_one in zip(table, wanted, strict=True):
        first, second = np.split(their_one[0].numpy(), 2, axis=-1)  # they write the angle of both numbers of a pair
        np.testing.assert_allclose(one[0, :, 0], first, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one[0, :, 0], second, rtol=0, atol=1e-6)


def test_rotation_turns_pairs_half_a_head_apart():
    """As complex numbers: pair (i, i + H/2) times factor * exp(i * position * frequency)."""
    config = CONFIGS["yarn_set"]
    rng = np.random.default_rng(0)
    x_BTNH = rng.standard_normal((2, 5, 3, HEAD_DIM)).astype(np.float32)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 100, 0, 1000, 4096]])
    ours = rotate(x_BTNH, rope_table(config, HEAD_DIM, positions_BT))
    frequencies = np.array([formula(config, i) for i in range(HEAD_DIM // 2)], np.float32).astype(np.float64)
    turn = 1.5 * np.exp(1j * positions_BT[..., None, None] * frequencies)
    wanted = (x_BTNH[..., :32] + 1j * x_BTNH[..., 32:]) * turn
    assert relative_error(ours, np.concatenate([wanted.real, wanted.imag], -1)) < 1e-4  # fp32 angles to 4096
    np.testing.assert_allclose(ours[0, 0], 1.5 * x_BTNH[0, 0], rtol=1e-6)


def test_tables_are_float32_and_activations_keep_their_dtype():
    table = rope_table(RopeConfig(), 8, jnp.arange(300)[None])
    assert {a.dtype for a in table} == {jnp.dtype("float32")}
    x = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    ours = rotate(x, table)
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours[0, :, 0, 0], jnp.cos(jnp.arange(300.0)) - jnp.sin(jnp.arange(300.0))) < 2**-8 + 1e-3
