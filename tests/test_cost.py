"""Formulas against the figures of the paper's model (Llama-2-7B, 435M encoder), worked out by hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig, CrossLayers
from cepe_jax.cost import (
    cepe_flops,
    decoder_flops,
    encoder_flops,
    inference_flops,
    peak_flops,
    step_bytes,
    teacher_flops,
)
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.inference.caches import Full, Razor, ReAttention, Rolling
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.settings import TrainConfig
from cepe_jax.training.stages import STAGES

CEPE_7B = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"])


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
    some = cepe_flops(dataclasses.replace(CEPE_7B, cross_layers=CrossLayers("last", 8)), 4096, 16, 256)
    plain = 2 * (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096) * 4096 + 2 * 4096**2 * 4096 * 32
    assert some.ahead == pytest.approx(0.75 * plain)
    assert some.train == some.forward + some.frozen + 2 * (some.trained + some.attention)


def test_grouped_heads():
    """Llama-3-8B's keys and values are a quarter as wide: 128K forward is 470 TFLOP."""
    config = CepeConfig(DECODERS["llama3_8b"], ENCODERS["mlm_large"])
    assert cepe_flops(config, 4096, 496, 256).forward / 1e12 == pytest.approx(470, abs=1)


def test_parts_that_do_not_train_cost_less():
    """Only cross-attention: no gradient reaches the encoder. The decoder too: nothing is frozen or ahead."""
    full, shape = cepe_flops(CEPE_7B, 4096, 16, 256), (CEPE_7B, 4096, 16, 256)
    cross = cepe_flops(*shape, train=("cross",))
    encoder = encoder_flops(ENCODERS["mlm_large"], 16, 256)
    assert cross.ahead == encoder.forward
    assert full.train - cross.train == 2 * encoder.forward
    every = cepe_flops(
        dataclasses.replace(CEPE_7B, cross_layers=CrossLayers("last", 8)),
        *shape[1:],
        train=("decoder", "encoder", "cross"),
    )
    assert (every.frozen, every.ahead) == (0, 0)
    assert every.train == 3 * every.forward


def test_a_token_of_each_cache():
    """The full cache is what the formulas of a decoder say. Of others, tokens are counted by hand."""
    tiny = DECODERS["smollm2_135m"]
    queries, keys = 9 * 64 * 30, 3 * 64 * 30
    full = Full().cost(tiny, 1000)
    assert inference_flops(tiny, 1, 1000)["full"] - inference_flops(tiny, 1, 0)["full"] == full.flops
    assert step_bytes(tiny, 1000, 0, 2)["full"] - step_bytes(tiny, 0, 0, 2)["full"] == 2 * full.numbers
    assert Rolling(200).cost(tiny, 1000) == (4 * 200 * queries, 2 * 200 * keys)
    reattention = ReAttention(sinks=4, recent=96, selected=5, span=20, piece=8).cost(tiny, 1000)
    assert reattention == (4 * 200 * queries + 2 * 900 * queries, 2 * 200 * keys + 900 * keys)
    heads = tuple((z, 0) for z in range(9))  # a tenth of all
    razor = Razor(sinks=4, recent=195, compression=10, heads=heads).cost(tiny, 1000)
    assert razor == pytest.approx((4 * 280 * queries, 2 * 280 * keys))
    assert Razor(sinks=4, recent=195, compression=4, heads=heads).cost(tiny, 1000).numbers > razor.numbers
    assert razor.flops > Razor(sinks=4, recent=195, compression=10, heads=heads).cost(tiny, 100).flops


def test_a_plain_decoder():
    """6 N a token to train, and the attention: 126 TFLOP forward on 8,192 tokens."""
    flops = decoder_flops(DECODERS["llama2_7b"], 8192)
    assert flops.forward / 1e12 == pytest.approx(125.8, abs=0.1)
    assert flops.train == 3 * flops.forward
    taught = teacher_flops(DECODERS["llama2_7b"], 4096, 4096)
    assert taught == flops.forward - 2 * 4096 * 32_000 * 4096  # logits of half of them


def test_the_encoder_and_its_head():
    """302M weights of layers and 33.8M of the head multiply each token; chunks see themselves alone."""
    config = dataclasses.replace(ENCODERS["mlm_large"], mlm_head=True)
    flops = encoder_flops(config, 1, 512)
    assert flops.trained == 2 * 512 * (24 * (4 * 1024**2 + 3 * 1024 * 4096) + 1024**2 + 32_001 * 1024)
    assert flops.attention == 4 * 512 * 512 * 1024 * 24
    assert encoder_flops(config, 4, 128).attention == flops.attention / 4


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v4", 275), ("TPU v6 lite", 918)]
    + [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", None)],
)
def test_peaks_by_what_devices_call_themselves(kind, teraflops):
    device = SimpleNamespace(device_kind=kind)
    assert peak_flops([device, device]) == (teraflops and pytest.approx(2e12 * teraflops, rel=1e-3))


def test_ceped_pays_for_the_teacher_that_runs_in_its_step():
    """The decoder once more over context and window; a prepared teacher costs nothing."""
    examples = ExampleConfig(window=2048, num_chunks=8, chunk_length=256)
    fields = {"decoder": "llama2_7b", "encoder": "mlm_large", "examples": examples, "distill": DistillConfig()}
    config = TrainConfig("ceped", Path("d"), Path("o"), 1, 1, **fields)
    plain = cepe_flops(CEPE_7B, 2048, 8, 256).train
    flops = STAGES["ceped"].flops
    assert flops(config, CEPE_7B, [SimpleNamespace(joined=True)]).train == plain
    assert flops(config, CEPE_7B, ()).train == plain + teacher_flops(DECODERS["llama2_7b"], 2048, 2048)


def test_a_token_at_128k():
    """TFLOP and GB of one token of the 7B model after 4,096 others, and a memory of 126,976 tokens, in bf16.

    Weights 15.9 GB (embeddings are looked up) and 2.15 of the cache; the memory is 0.26 GB, read by 32 layers; keys and
    values of a layer are 2.08 GB.
    """
    flops = inference_flops(CEPE_7B, 1, 4096, 126_976)
    assert flops["materialised"] / 1e12 == pytest.approx(68.2, abs=0.1)
    assert flops["absorbed"] / 1e12 == pytest.approx(0.55, abs=0.01)
    assert flops["stored"] / 1e12 == pytest.approx(0.08, abs=0.01)
    size = {form: number / 1e9 for form, number in step_bytes(CEPE_7B, 4096, 126_976, 2).items()}
    assert size["absorbed"] == pytest.approx(15.9 + 2.15 + 8.32, abs=0.05)
    assert size["materialised"] == pytest.approx(15.9 + 2.15 + 8.32 + 133.1, abs=0.1)
    assert size["stored"] == pytest.approx(15.9 + 2.15 + 66.6, abs=0.1)
    decoder = CEPE_7B.decoder
    assert inference_flops(decoder, 1, 131_072)["full"] / 1e12 == pytest.approx(0.082, abs=0.001)
    assert step_bytes(decoder, 131_072, 0, 2)["full"] / 1e9 == pytest.approx(13.2 + 68.7, abs=0.1)


def test_prefill_is_the_forward_pass_without_all_logits():
    """And in pieces it costs the whole."""
    forward = cepe_flops(CEPE_7B, 4096, 496, 256).forward - encoder_flops(CEPE_7B.encoder, 496, 256).forward
    last = inference_flops(CEPE_7B, 4096, 0, 126_976)["materialised"]
    assert forward - last == pytest.approx(2 * 4095 * 32_000 * 4096, rel=1e-9)
    pieces = [inference_flops(CEPE_7B.decoder, 512, first)["full"] for first in range(0, 4096, 512)]
    head = 2 * 4096 * 32_000
    whole = inference_flops(CEPE_7B.decoder, 4096, 0)["full"]
    assert sum(pieces) - 8 * head == pytest.approx(whole - head, rel=1e-9)
