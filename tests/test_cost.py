"""Formulas against the figures of the paper's model (Llama-2-7B, 435M encoder), worked out by hand."""

import dataclasses

import pytest

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig
from cepe_jax.cost import cepe_flops

CEPE_7B = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"], 32)


@pytest.mark.parametrize(
    ("window", "num_chunks", "teraflops"),
    [(2048, 8, 37.6), (4096, 16, 81.7), (4096, 112, 168.1), (4096, 240, 283.3), (4096, 496, 513.6)],
)
def test_forward(window, num_chunks, teraflops):
    assert cepe_flops(CEPE_7B, window, num_chunks, 256).forward / 1e12 == pytest.approx(teraflops, abs=0.06)


def test_training_with_a_frozen_decoder():
    """81.7 forward; backward 54.1 through frozen weights, 2 x 14.3 of trained ones, 2 x 13.3 of attention."""
    flops = cepe_flops(CEPE_7B, 4096, 16, 256)
    assert flops.train / 1e12 == pytest.approx(191, abs=0.5)
    assert flops.frozen / 1e12 == pytest.approx(54.1, abs=0.1)
    assert flops.trained / 1e12 == pytest.approx(3.3 + 8.8 + 2.2, abs=0.1)
    assert flops.attention / 1e12 == pytest.approx(8.8 + 4.4 + 0.1, abs=0.1)


def test_no_gradient_below_the_first_spliced_layer():
    """With the last 8 of 32 layers spliced, three quarters of the plain layers cost a forward pass alone."""
    some = cepe_flops(dataclasses.replace(CEPE_7B, num_cross_layers=8), 4096, 16, 256)
    plain = 2 * (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096) * 4096 + 2 * 4096**2 * 4096 * 32
    assert some.ahead == pytest.approx(0.75 * plain)
    assert some.train == some.forward + some.frozen + 2 * (some.trained + some.attention)


def test_grouped_heads():
    """Llama-3-8B's keys and values are a quarter as wide: 128K forward is 470 TFLOP."""
    config = CepeConfig(DECODERS["llama3_8b"], ENCODERS["mlm_large"], 32)
    assert cepe_flops(config, 4096, 496, 256).forward / 1e12 == pytest.approx(470, abs=1)
