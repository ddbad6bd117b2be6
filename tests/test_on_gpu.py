"""What a GPU computes: cuDNN's attention and the steps of training, against XLA's in fp32. Skipped without one.

JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_on_gpu.py
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.recipes import blank
from cepe_jax.model import kernels
from cepe_jax.model.attention import Mask
from cepe_jax.model.backends import attend
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.settings import TrainConfig, compute_of, recipe_of, sizes_of
from cepe_jax.training.stages import STAGES
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.kinds import kind_of

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
BF16 = 2**-7  # what rounding inputs to bfloat16 may cost, as a share of the norm


def distance(ours, wanted) -> float:
    ours, wanted = (np.asarray(x, np.float64) for x in (ours, wanted))
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def by_cudnn_and_xla(mask: Mask, q, k, v, g) -> list[tuple]:
    """Return attention and its gradients by cuDNN, and by XLA in fp32."""

    @partial(jax.jit, static_argnums=0)
    def run(backend, *qkv):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, mask, backend), *qkv)
        return out, *pullback(g.astype(out.dtype))

    return [run("cudnn", q, k, v), run("xla", *(x.astype(jnp.float32) for x in (q, k, v)))]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (111, 111), (1, 384), (64, 333)])
@pytest.mark.parametrize("holes", [False, True])
def test_cudnn_attends_as_xla_in_fp32(width, kv_heads, queries, keys, holes):
    """Outputs and gradients of both, causal where lengths are equal; rows without a key are zero."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((2, t, n, width)), jnp.bfloat16)
        for t, n in ((queries, 8), (keys, kv_heads), (keys, kv_heads), (queries, 8))
    )
    valid = rng.random((2, keys)) < 0.7
    valid[0, : keys // 3], valid[1] = False, False
    mask = Mask(queries == keys, valid if holes else None)
    for ours, theirs in zip(*by_cudnn_and_xla(mask, q, k, v, g), strict=True):
        assert distance(ours, theirs) < BF16
        if holes:
            assert not ours[1].any()


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_window_of_texts_is_read_in_chunks(monkeypatch, kv_heads):
    """Three chunks of up to 128 tokens; texts begin within them."""
    monkeypatch.setattr(kernels, "CHUNK", 128)
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 333, n, 64)), jnp.bfloat16) for n in (8, kv_heads, kv_heads, 8))
    mask = Mask(True, segments_BT=np.sort(rng.integers(1, 6, (2, 333)), axis=1))
    for ours, theirs in zip(*by_cudnn_and_xla(mask, q, k, v, g), strict=True):
        assert distance(ours, theirs) < BF16


def test_mapped_chunks_are_read_as_rows():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 3, 128, 4, 64)), jnp.bfloat16) for _ in range(3))
    valid = rng.random((2, 3, 128)) < 0.7

    def chunk(q, k, v, valid):
        return attend(q, k, v, Mask(valid_BS=valid), "cudnn")

    mapped = jax.jit(jax.vmap(chunk, in_axes=1, out_axes=1))(q, k, v, valid)
    folded = jax.jit(chunk)(*(x.reshape(6, *x.shape[2:]) for x in (q, k, v, valid)))
    np.testing.assert_array_equal(mapped, folded.reshape(mapped.shape))


@pytest.mark.parametrize("stage", ["lm", "mlm", "warmup", "cepe", "ceped", "sft", "reward", "dpo"])
@pytest.mark.parametrize(("num_chunks", "chunk_length"), [(4, 64), (3, 37)])
def test_cudnn_in_bfloat16_errs_no_more_than_xla_in_bfloat16(stage, num_chunks, chunk_length):
    """A stage's loss and the gradient of all that it trains, as distances from those of fp32."""
    starts = {"mlm": ["encoder"]} | dict.fromkeys(("lm", "sft", "reward", "dpo"), ["decoder"])
    starts = starts.get(stage, ["decoder", "encoder"])
    settings = {"stage": stage, "batch_size": 2, "steps": 2, "distill": DistillConfig() if stage == "ceped" else None}
    settings |= {"examples": ExampleConfig(num_chunks * chunk_length, num_chunks, chunk_length)}
    settings |= {"train": ("decoder_lora",)} if stage == "dpo" else {}
    config = TrainConfig(data="none", out="none", **settings | dict.fromkeys(starts, "tiny"))
    rng, objective = np.random.default_rng(0), STAGES[config.stage].objective(config)
    batch = {
        name: np.ones((2, *x.shape), bool) if x.dtype == bool else rng.integers(0, 2048, (2, *x.shape), np.int32)
        for name, x in blank(recipe_of(config)).items()
    }
    if "segments" in batch:  # three texts in each row
        batch["segments"] = np.sort(rng.integers(1, 4, batch["segments"].shape), axis=1).astype(np.int32)
    model, abstract = kind_of(sizes_of(config)).model, abstract_parts(sizes_of(config))
    values = jax.tree.map(
        lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), jax.tree.leaves(abstract)
    )

    def loss_and_gradient(dtype: str, backend: str):
        compute = compute_of(dataclasses.replace(config, dtype=dtype, attention=backend), "gpu")
        parts = jax.tree.unflatten(jax.tree.structure(abstract_parts(sizes_of(config), compute)), values)
        trained = {name: parts.pop(name) for name in config.train}
        frozen = jax.tree.map(lambda x: x.astype(dtype), parts)

        @jax.jit
        def run(trained, frozen):
            return jax.value_and_grad(
                lambda trained: objective(model.from_parts(trained | frozen), batch, objective.weights(batch))[0]
            )(trained)

        loss, gradient = run(trained, frozen)
        return float(loss), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])

    loss, gradient = loss_and_gradient("float32", "xla")
    by_xla, by_cudnn = (loss_and_gradient("bfloat16", backend) for backend in ("xla", "cudnn"))
    assert abs(by_cudnn[0] - loss) < 2e-3 * loss
    assert distance(by_cudnn[1], gradient) < 1.2 * distance(by_xla[1], gradient)
