"""Every step, lowered for GPUs and TPUs that are not at hand: what their back ends refuse, they refuse while tracing.

A lowering of a tiny preset takes about a second. XLA's own compilers come after it and are not asked.
"""

import dataclasses
import re
from collections import Counter

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention

from cepe_jax.benchmarks.compiled import CompileConfig, train_step
from cepe_jax.benchmarks.steps import STEPS
from cepe_jax.config import DECODERS, ENCODERS, LoraConfig
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.model import kernels
from cepe_jax.sharding import make_mesh, of_two_rows
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.settings import compute_of, sizes_of

EVEN = ExampleConfig(window=256, num_chunks=2, chunk_length=128)
ODD = ExampleConfig(window=111, num_chunks=3, chunk_length=37)
TRAIN = "lm", "mlm", "warmup", "cepe", "ceped", "sft", "reward", "dpo"


@pytest.fixture(autouse=True)
def cudnn_is_there(monkeypatch):
    """JAX asks cuDNN for its version while it traces, and traces nothing without one."""
    monkeypatch.setattr(cudnn_attention, "check_cudnn_version", lambda: 92501)


def lower(step: str, platform: str, examples: ExampleConfig = EVEN, kv_heads: int = 6, **settings) -> str:
    """The program of a stage's step, or of a step of inference, in bfloat16."""
    distill = DistillConfig(top_k=8) if step == "ceped" else None
    config = {"stage": step if step in TRAIN else "cepe", "batch_size": 2, "steps": 2, "dtype": "bfloat16"}
    config |= {"step": "train" if step in TRAIN else step}
    config |= {"examples": examples, "distill": distill, "data": "none", "out": "none"} | settings
    starts = {"mlm": ["encoder"]} | dict.fromkeys(("lm", "sft", "reward", "dpo"), ["decoder"])
    starts = starts.get(step, ["decoder", "encoder"])
    if step == "dpo":
        config |= {"train": ("decoder_lora",)}
    with pytest.MonkeyPatch.context() as patch:
        for presets in (DECODERS, ENCODERS):
            patch.setitem(presets, "tiny", dataclasses.replace(presets["tiny"], num_kv_heads=kv_heads))
        # What is compiled for is said by the platform alone.
        config = CompileConfig(**config | dict.fromkeys(starts, "tiny"), topology="")
        kind = {"cuda": "gpu"}.get(platform, platform)
        sizes, compute = sizes_of(config), compute_of(config, kind)
    with jax.set_mesh(make_mesh()):
        made = STEPS.get(step, train_step)(config, sizes, compute)
        return made.function.trace(*made.arguments).lower(lowering_platforms=(platform,)).as_text()


# Calls of a step's program without a mask and with one: forward, backward. A scan's body stands once in a program; a
# backward pass of cuDNN's traces a forward pass beside itself, which the compiler leaves out.
CUDNN = {
    "lm": [2, 1, 0, 0],
    "mlm": [2, 1, 0, 0],
    "warmup": [2, 1, 4, 2],  # the decoder; the encoder and the memory's reader
    "cepe": [2, 1, 4, 2],
    "ceped": [3, 1, 4, 2],  # and the teacher
    "sft": [0, 0, 2, 1],  # the texts of a row
    "reward": [0, 0, 2, 1],
    "dpo": [0, 0, 3, 1],  # and the reference
    "encode": [0, 0, 1, 0],
    "prefill": [0, 0, 2, 0],
    "decode": [0, 0, 0, 0],  # XLA reads the cache, and the memory with absorbed projections
}
SPLASH = {"lm": 3, "mlm": 3, "warmup": 9, "cepe": 9, "ceped": 10, "sft": 3, "reward": 3, "dpo": 4}
SPLASH |= {"encode": 1, "prefill": 2, "decode": 0}


def cudnn_calls(program: str) -> list[int]:
    calls = Counter(re.findall(r"__cudnn\$fmha(\w+)\(", program))
    return [calls[f"{mask}Softmax{way}"] for mask in ("", "ScaleBias") for way in ("", "Backward")]


@pytest.mark.parametrize("step", CUDNN)
def test_steps_lower_for_gpus(step):
    assert cudnn_calls(lower(step, "cuda")) == CUDNN[step]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_factors_lower_and_have_the_only_gradients(platform):
    """A decoder's step with factors has a gradient of no other weight: no product with its shape is in the program."""
    factors = {"train": ("decoder_lora",), "lora": LoraConfig(8)}
    whole, program = (re.findall(r"dot_general .* -> tensor<(192x512|512x192)xbf16>", lower("lm", platform, ODD, **how))
                      for how in ({}, factors))  # fmt: skip
    assert len(whole) >= 3  # of gate, up and down
    assert not program


@pytest.mark.parametrize("step", CUDNN)
def test_odd_lengths_lower_for_gpus(step):
    """Grouped heads too. An odd chunk without a mask gets one: its filled key is masked."""
    wanted = [0, 0, 2, 1] if step == "mlm" else CUDNN[step]
    assert cudnn_calls(lower(step, "cuda", ODD, kv_heads=2)) == wanted


@pytest.mark.parametrize(("step", "examples", "kv_heads"), [*((step, EVEN, 6) for step in SPLASH), ("cepe", ODD, 2)])
def test_steps_lower_for_tpus(step, examples, kv_heads):
    assert lower(step, "tpu", examples, kv_heads).count("tpu_custom_call") == SPLASH[step]


def test_a_window_of_texts_has_no_mask_of_its_square_on_gpus(monkeypatch):
    """300 tokens, in three chunks."""
    square, examples = re.compile(r"tensor<[\dx]*300x300x"), ExampleConfig(window=300)
    assert square.search(lower("sft", "cuda", examples))
    monkeypatch.setattr(kernels, "CHUNK", 128)
    program = lower("sft", "cuda", examples)
    assert not square.search(program)
    assert cudnn_calls(program)[:2] == [0, 0]
    assert min(cudnn_calls(program)[2:]) >= 2  # a chunk on the diagonal, and an earlier one


CACHES = {  # and whether a kernel reads a prompt of 192 tokens, all of which every query sees
    "reattention, short": (CacheConfig("reattention", recent=160, selected=1, piece=64), True),
    "reattention, long": (CacheConfig("reattention", recent=64, selected=1, piece=64), False),
    "razor, short": (CacheConfig("razor", recent=188), True),
    "razor, long": (CacheConfig("razor", recent=128), False),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_lower_for_gpus_and_tpus(name):
    """A prompt and a token. A kernel reads the memory in each piece of the prompt too."""
    (cache, by_kernel), examples = CACHES[name], ExampleConfig(window=192, num_chunks=2, chunk_length=128)
    assert cudnn_calls(lower("prefill", "cuda", examples, cache=cache)) == [0, 0, 1 + by_kernel, 0]
    assert lower("prefill", "tpu", examples, cache=cache).count("tpu_custom_call") == 1 + by_kernel
    assert cudnn_calls(lower("decode", "cuda", examples, cache=cache)) == [0, 0, 0, 0]
    assert "tpu_custom_call" not in lower("decode", "tpu", examples, cache=cache)


def test_a_product_of_one_row_is_one_of_two_on_gpus(monkeypatch):
    """Nothing else does more than it has to, and the row is the same."""
    x_1D, weight_DF = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate([(1, 8), (8, 5)]))

    def product(x_1D):
        return of_two_rows(lambda rows: rows @ weight_DF, x_1D, axis=0)

    shapes = {
        platform: "2x8xf32" in jax.jit(product).trace(x_1D).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu", "cpu")
    }
    assert shapes == {"cuda": True, "tpu": False, "cpu": False}
    plain = product(x_1D)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cuda, default: cuda(x))
    assert product(x_1D).shape == plain.shape
    assert abs(product(x_1D) - plain).max() < 1e-6
