"""Gradients of single examples against PyTorch's autograd; Adam's quotient and checkpoints' weights by formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from safetensors.numpy import load_file
from support.models import CROSS_LAYERS, DECODER, ENCODER, filled, relative_error

from cepe_jax.config import CepeConfig, LoraConfig, with_lora
from cepe_jax.data.examples import IGNORE, ExampleConfig
from cepe_jax.data.recipes import blank
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.selection.gradients import adam_update, checkpoint_weights, example_gradients, update_function
from cepe_jax.sharding import make_mesh
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.settings import TrainConfig, compute_of, recipe_of, sizes_of
from cepe_jax.training.stages import STAGES
from cepe_jax.weights.build import abstract_parts, tensors_of
from cepe_jax.weights.convert import to_hf
from cepe_jax.weights.factors import to_peft
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.kinds import kind_of
from cepe_jax.weights.source import open_ours, save


def batch_of(rows: int, window: int = 9) -> dict[str, np.ndarray]:
    """Random windows; every row has another number of labels."""
    tokens = np.random.default_rng(0).integers(0, DECODER.vocab_size, (rows, window + 1)).astype(np.int32)
    labels = np.where(np.arange(window) < window - np.arange(rows)[:, None], tokens[:, 1:], IGNORE)
    return {"tokens": tokens[:, :-1], "labels": labels}


def gradients(model, train: tuple[str, ...], batch: dict) -> list[dict]:
    """Return each example's gradient as parts of the model that trains."""
    trainable, frozen = split(model, train)
    run = jax.jit(lambda *given: example_gradients(NextToken(loss_chunk=4), type(model), *given))
    rows_BP = np.asarray(run(trainable, frozen, batch))
    leaves, structure = jax.tree.flatten(trainable)
    ends = np.cumsum([leaf.size for leaf in leaves])
    assert rows_BP.shape == (len(batch["tokens"]), ends[-1])
    pieces = (np.split(row, ends[:-1]) for row in rows_BP)
    return [
        structure.unflatten([jnp.asarray(x.reshape(leaf.shape)) for x, leaf in zip(row, leaves, strict=True)])
        for row in pieces
    ]


def losses_in_torch(model, batch: dict, *extra: str):
    """Yield each example's own loss: the mean over its labels."""
    import torch

    for row in range(len(batch["tokens"])):
        given = [torch.tensor(batch[name][row : row + 1]) for name in ("tokens", *extra)]
        given = [x if x.dtype is torch.bool else x.long() for x in given]
        logits = model(*given)
        logits = getattr(logits, "logits", logits)
        labels = torch.tensor(batch["labels"][row]).long()
        yield torch.nn.functional.cross_entropy(logits[0], labels, ignore_index=IGNORE)


def test_factors_gradients_are_pefts(tmp_path):
    """Example by example, through PEFT on transformers' Llama; the gradients go the way of weights into its layout.

    8 CPU-seconds, most of which import both: PEFT is what the paper's gradients were taken with.
    """
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = with_lora(DECODER, "decoder", LoraConfig(rank=3, alpha=5.0))
    model, batch = filled(lambda: Llama(config, key=jax.random.key(0)), seed=2), batch_of(3)
    save(model, tmp_path / "ours")
    save(model.parts["decoder"], tmp_path / "plain")
    to_hf(tmp_path / "plain", tmp_path / "hf")
    to_peft(open_ours(tmp_path / "ours"), str(tmp_path / "hf"), tmp_path / "factors")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "factors", is_trainable=True)
    for number, (ours, loss) in enumerate(
        zip(gradients(model, ("decoder_lora",), batch), losses_in_torch(theirs, batch), strict=True)
    ):
        theirs.zero_grad()
        loss.backward()
        wanted = {
            name.replace(".default", ""): x.grad.numpy() for name, x in theirs.named_parameters() if x.requires_grad
        }
        save(Llama.from_parts({"decoder": model.parts["decoder"]} | ours), tmp_path / f"gradient{number}")
        place = tmp_path / f"in_peft{number}"
        to_peft(open_ours(tmp_path / f"gradient{number}"), str(tmp_path / "hf"), place)
        ours_in_torch = load_file(place / "adapter_model.safetensors")
        assert set(ours_in_torch) == set(wanted)
        assert max(relative_error(ours_in_torch[key], wanted[key]) for key in wanted) < 1e-4


def test_own_parts_gradients_are_torchs():
    """CEPE's encoder and cross-attention, with contexts that have holes."""
    pytest.importorskip("torch")
    from support.torch_cepe import copy_of

    sizes = CepeConfig(DECODER, dataclasses.replace(ENCODER, mlm_head=False), CROSS_LAYERS)
    model = filled(lambda: Cepe.create(sizes, key=jax.random.key(0)), seed=3)
    batch, rng = batch_of(3), np.random.default_rng(1)
    batch["context"] = rng.integers(0, DECODER.vocab_size, (3, 2, 5)).astype(np.int32)
    batch["context_mask"] = rng.random((3, 2, 5)) < 0.8
    theirs, entries = copy_of(model), table(model.config)
    for ours, loss in zip(
        gradients(model, ("encoder", "cross"), batch),
        losses_in_torch(theirs, batch, "context", "context_mask"),
        strict=True,
    ):
        theirs.zero_grad()
        loss.backward()
        whole = Cepe.from_parts(model.parts | ours)
        ours_in_torch = {name: np.asarray(x) for name, x in tensors_of(whole) if name.split(".")[0] in ours}
        ours_in_torch = {entries[name].key: entries[name].to_torch(x) for name, x in ours_in_torch.items()}
        wanted = {key: x.grad for key, x in theirs.named_parameters() if key in ours_in_torch}
        assert set(wanted) == set(ours_in_torch)
        assert max(relative_error(ours_in_torch[key], wanted[key]) for key in wanted) < 1e-4


def test_update_has_epsilon_under_the_root_and_no_correction():
    gradient, mean, square = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 1e-4
    square = square**2
    config = OptimizerConfig(beta1=0.8, beta2=0.99, eps=1e-9)
    wanted = []
    for g, m, v in zip(gradient.tolist(), mean.tolist(), square.tolist(), strict=True):
        wanted.append((0.8 * m + 0.2 * g) / (0.99 * v + 0.01 * g * g + 1e-9) ** 0.5)
    np.testing.assert_allclose(adam_update(gradient, mean, square, config), wanted, rtol=1e-5)
    papers = adam_update(np.float32(2e-4), np.float32(1e-4), np.float32(1e-9), OptimizerConfig())
    assert float(papers) == pytest.approx(1.047, abs=5e-4)


def test_checkpoints_weigh_by_their_mean_learning_rates():
    """51 steps of warm-up, as in the paper, and 30 of 1,700 done: step n has the rate (n - 1) / 51 of the highest."""
    optimizer = OptimizerConfig(learning_rate=2e-5, warmup_fraction=0.03)
    config = TrainConfig(
        "lm", "data", "out", 1700, 4, decoder="tiny", examples=ExampleConfig(window=8), optimizer=optimizer
    )
    np.testing.assert_allclose(checkpoint_weights(config, (10, 20, 30)), np.array([4.5, 14.5, 24.5]) / 43.5, rtol=1e-5)
    np.testing.assert_allclose(checkpoint_weights(config, (10, 30)), np.array([4.5, 19.5]) / 24, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[1\]"):
        checkpoint_weights(config, (1,))


@pytest.mark.parametrize(("platform", "attention"), [("cuda", "cudnn"), ("tpu", "splash")])
@pytest.mark.parametrize("stage", ["sft", "cepe"])
def test_updates_are_lowered_for_accelerators(monkeypatch, platform, attention, stage):
    """Attention's kernels take single examples, side by side, in the part of the mesh that is a device's."""
    monkeypatch.setattr(cudnn_attention, "check_cudnn_version", lambda: 92501)
    starts = {"sft": {"decoder": "tiny", "train": ("decoder_lora",), "lora": LoraConfig()}}
    starts["cepe"] = {"decoder": "tiny", "encoder": "tiny"}
    examples = ExampleConfig(window=256, num_chunks=2, chunk_length=128)
    config = TrainConfig(stage, "data", "out", 2, 2, examples=examples, dtype="bfloat16", **starts[stage])
    sizes, mesh = sizes_of(config), make_mesh()
    parts = abstract_parts(sizes, dataclasses.replace(compute_of(config, "cpu"), attention=attention))
    trainable = {name: part for name, part in parts.items() if name in config.train}
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        {name: part for name, part in parts.items() if name not in config.train},
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    batch = {
        name: jax.ShapeDtypeStruct((2, *x.shape), jax.dtypes.canonicalize_dtype(x.dtype))
        for name, x in blank(recipe_of(config)).items()
    }
    moment = jax.ShapeDtypeStruct((size,), jnp.float32)
    objective, kind = STAGES[stage].objective(config), kind_of(sizes).model
    with jax.set_mesh(mesh):
        updates = update_function(objective, kind, config.optimizer, 64, 0, mesh)
        traced = updates.trace(trainable, moment, moment, frozen, batch)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert {"cuda": "__cudnn$fmha", "tpu": "tpu_custom_call"}[platform] in program
    assert traced.out_info.shape == (2, 64)
