"""Placement: the table's rules, the golden placement of the 7B model, and one answer on every mesh of fake devices.

Run as a script with a back end of attention and a list of meshes (xla '[{"fsdp": 8}]') it compares each with no mesh on
the devices there are; with --write-specs it writes the golden file anew.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding, PartitionSpec
from support.models import CROSS_LAYERS, DECODER, ENCODER, computed, make_cepe, make_encoder, relative_error

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig
from cepe_jax.data.examples import IGNORE
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.sharding import MESH_AXES, abstract_mesh, constrain, make_mesh, partition_spec, place_batch, shardings_of
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.optimizer import Kind, OptimizerConfig
from cepe_jax.training.stages import born_sharded
from cepe_jax.training.trainer import init_state, make_train_step
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.checkpoint import Checkpoints
from cepe_jax.weights.source import load, save

TRAIN = "encoder", "cross"
SPECS = Path(__file__).parent / "model" / "llama2_7b_specs.json"


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        (("layer", "embed", "mlp"), PartitionSpec(None, ("context", "fsdp"), "tensor")),
        (("layer", "heads", "head_dim", "embed"), PartitionSpec(None, "tensor", None, ("context", "fsdp"))),
        (("vocab", "embed"), PartitionSpec("tensor", ("context", "fsdp"))),
        (("layer", "embed", "kv_heads", "head_dim"), PartitionSpec(None, ("context", "fsdp"), "tensor", None)),
        (("batch", "window", None), PartitionSpec(("data", "fsdp"), "context", None)),
        (("batch", None, "embed"), PartitionSpec(("data", "fsdp"), None, "context")),  # batch took fsdp
        (("batch", "memory", None), PartitionSpec(("data", "fsdp"), "memory", None)),
        ((), PartitionSpec()),
    ],
)
def test_rules(axes, wanted):
    assert partition_spec(axes) == wanted


def test_rules_over_some_axes():
    """As inside a shard_map, where the others are manual."""
    assert partition_spec(("batch", "length", "mlp"), ("fsdp",)) == PartitionSpec("fsdp", None, None)
    assert partition_spec(("batch", "embed"), ("data", "tensor")) == PartitionSpec("data", None)


def test_an_unknown_logical_axis_is_an_error():
    with pytest.raises(KeyError, match="hidden"):
        partition_spec(("batch", "hidden"))


def test_a_mesh_must_use_all_devices():
    devices = jax.device_count()
    with pytest.raises(ValueError, match=rf"data=2, fsdp={devices}.*wants {2 * devices} devices.*{devices}: "):
        make_mesh(data=2, fsdp=devices)
    mesh = make_mesh(fsdp=devices)
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "context", "memory", "tensor")
    assert mesh.shape["fsdp"] == devices
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_constrain_without_a_mesh_is_nothing():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "embed") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", "embed"))(x))


def specs_of_7b() -> dict:
    """Parameter -> shape, logical axes, PartitionSpec, of the CEPE of the 7B model, by shapes alone."""
    config = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"])
    key = jax.random.key(0)

    def make():
        decoder = Llama(config.decoder, key=key)
        cross = cross_from_self_attention(decoder, config.encoder, config.cross_layers, "copy", key=key)
        return Cepe(decoder, Encoder(config.encoder, key=key), cross)

    def row(leaf):
        axes = leaf.get_metadata()["axes"]
        assert len(axes) == len(leaf.shape)
        return {"shape": list(leaf.shape), "axes": list(axes), "spec": list(partition_spec(axes))}

    flat = nnx.to_flat_state(nnx.state(jax.eval_shape(make)))
    return {".".join(path): row(leaf) for path, leaf in flat}


def written(specs: dict) -> str:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(specs.items()))
    return f"{{\n{rows}\n}}\n"


def test_placement_of_the_7b_model_is_the_golden_one():
    assert written(specs_of_7b()) == SPECS.read_text()


def test_the_7b_model_divides():
    """Over 8-way fsdp and 8-way tensor parallelism: a dimension that does not divide cannot be placed."""
    for name, row in specs_of_7b().items():
        for size, mesh_axis in zip(row["shape"], row["spec"], strict=True):
            assert mesh_axis is None or size % 8 == 0, f"{name} {row}"


def test_shardings_of_follows_the_metadata(cepe):
    """Also for trees that hold other things than Variables, which are replicated."""
    mesh = make_mesh()
    tree = {"model": cepe.cross, "step": np.zeros(())}
    placed = shardings_of(tree, mesh)
    assert placed["step"] == NamedSharding(mesh, PartitionSpec())
    assert placed["model"].k == NamedSharding(mesh, PartitionSpec(None, ("context", "fsdp"), "tensor", None))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 4}, "cross.k: .* 2 .*kv_heads .*mesh.tensor, .* 4: "),
        ({"fsdp": 16}, "cross.norm.scale: .* 24 .*embed .*mesh.fsdp, .* 16: "),
    ],
)
def test_a_model_that_a_mesh_does_not_divide(sizes, message):
    """Said before anything is read or made; tied to no device."""
    mesh = abstract_mesh(**sizes)
    with pytest.raises(ValueError, match=f"^{message}"):
        shardings_of(abstract_parts(CepeConfig(DECODER, ENCODER, CROSS_LAYERS)), mesh)


ROWS = 16  # of a batch; two micro-batches of a row for each of 8 devices
SLOW = (
    {},  # one device, under a mesh
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "memory": 2, "tensor": 2},
)


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Every other row, and so one micro-batch of two, keeps few labels; one row has no context, others have holes."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, DECODER.vocab_size, (ROWS, 10))
    labels[::2] = np.where(rng.random((ROWS // 2, 10)) < 0.8, IGNORE, labels[::2])
    context_mask = rng.random((ROWS, 2, 6)) < 0.8
    context_mask[3] = False
    return {
        "tokens": rng.integers(0, DECODER.vocab_size, (ROWS, 10)),
        "labels": labels,
        "context": rng.integers(0, ENCODER.vocab_size, (ROWS, 2, 6)),
        "context_mask": context_mask,
    }


def model_of(**run_time) -> Cepe:
    cepe = make_cepe(**PROPERTIES)
    encoder = computed(make_encoder(dataclasses.replace(ENCODER, mlm_head=False)), **run_time)
    return Cepe(computed(cepe.decoder, **run_time), encoder, cepe.cross)


def two_plain_steps(optimizer) -> list:
    """(loss, weights, optimiser's state) after each step: no mesh, no chunk, nothing recomputed, the batch at once."""

    def loss(trainable, frozen, batch):
        logits = Cepe.from_parts(trainable | frozen)(batch["tokens"], batch["context"], batch["context_mask"])
        kept = batch["labels"] != IGNORE
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, batch["labels"], 0))
        return jnp.where(kept, nll, 0).sum() / kept.sum()

    @jax.jit
    def step(trainable, opt_state, frozen, batch):
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return value, optax.apply_updates(trainable, updates), opt_state

    trainable, frozen = split(model_of(), TRAIN)
    results = [(None, trainable, optimizer.init(trainable))]
    for number in range(2):
        results.append(step(*results[-1][1:], frozen, batch_of(number)))
    return jax.device_get(results[1:])


def named(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def cuts(tree) -> list[int]:
    """Into how many parts the stacks' matrices are cut: sizes of arrays over sizes of what one device has of them."""
    stacks = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 2]
    matrices = [leaf for leaf in stacks if leaf.ndim > 3 or leaf.shape[-1] != DECODER.head_dim]  # no biases of heads
    return sorted({leaf.size // leaf.addressable_shards[0].data.size for leaf in matrices})


PROPERTIES: dict[str, bool] = {}  # of the decoder: weights that not every family has
COMPILED: list[str] = []  # gets an entry for every program


def compare(sizes: dict[str, int], attention: str, optimizer, wanted: list, saved: Path) -> dict:
    """Two steps on a mesh against `wanted`: the largest error, what moved, what compiled, how arrays are cut."""
    mesh = make_mesh(**sizes, devices=None if sizes else jax.devices()[:1])
    errors = {}
    with jax.set_mesh(mesh):
        model = model_of(attention=attention, remat="full", mlp_chunk=4)
        loaded = load(saved)
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True))
        born = born_sharded(lambda key: Llama(DECODER, key=key), jax.random.key(3))
        assert relative_error(born.layers.mlp.up, Llama(DECODER, key=jax.random.key(3)).layers.mlp.up) < 1e-6
        held = [cuts(born), cuts(loaded)]
        # The weights are the loaded ones, and how to compute is the model's.
        loaded = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(loaded))
        trainable, frozen = split(loaded, TRAIN)
        state = init_state(trainable, optimizer)
        before = [leaf.sharding for leaf in jax.tree.leaves(state)]
        step = make_train_step(NextToken(loss_chunk=4), optimizer, Cepe, accumulate=2)
        for number, (loss, *then) in enumerate(wanted):
            batch, already = place_batch(batch_of(number), mesh, ROWS), len(COMPILED)
            state, metrics = step(state, frozen, batch)
            again = len(COMPILED) - already
            errors[f"loss {number}"] = relative_error(metrics["loss"], loss)
            ours, theirs = named((state.trainable, state.opt_state)), named(tuple(then))
            assert ours.keys() == theirs.keys()
            errors |= {f"{name} {number}": relative_error(ours[name], theirs[name]) for name in theirs}
        with contextlib.closing(Checkpoints(saved.parent / str(sizes), {})) as checkpoints:
            checkpoints.save(2, state)
            checkpoints.wait()
            _, restored = checkpoints.restore(state)
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True))
    worst = max(errors, key=errors.get)
    placed = zip(before, jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
    return {
        "worst": worst,
        "error": errors[worst],
        "compiled in the second step": again,
        "moved": sum(not then.is_equivalent_to(x.sharding, x.ndim) for then, *now in placed for x in now),
        "cuts": [*held, cuts(state), cuts(restored)],
    }


def check_meshes(attention: str, *meshes: dict[str, int], optimizer: Kind = "adamw", **properties: bool) -> None:
    """In a process of 8 devices: every mesh has the answer of none, and the compiler no complaint."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
        "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings are written
    }
    command = [sys.executable, __file__, attention, optimizer, json.dumps(meshes), json.dumps(properties)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for mesh, result in zip(meshes, results, strict=True):
        assert result["error"] < 1e-5, f"{mesh} {result}"
        assert result["moved"] == result["compiled in the second step"] == 0, f"{mesh} {result}"
        assert result["cuts"] == [[mesh.get("fsdp", 1) * mesh.get("tensor", 1)]] * 4, f"{mesh} {result}"
    assert "Involuntary full rematerialization" not in done.stderr


def test_one_answer_on_a_mesh():
    """Two steps in fp32: losses, weights, moments (the first step's are the gradients); placed as before.

    15 CPU-seconds in a process of 8 devices: the one comparison of training on a mesh with one device.
    """
    check_meshes("xla", {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.slow
def test_one_answer_on_every_mesh():
    check_meshes("xla", *SLOW)


@pytest.mark.slow
def test_one_answer_on_a_mesh_of_splash_attention():
    """Its kernels, interpreted: of each device's rows and heads, under vmap, scan and remat."""
    check_meshes("splash", {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.slow
def test_one_answer_on_a_mesh_by_muon():
    """Whose matrices, and what AdamW keeps beside them, are cut like the weights."""
    check_meshes("xla", {"data": 2, "fsdp": 2, "tensor": 2}, optimizer="muon")


@pytest.mark.slow
def test_one_answer_on_a_mesh_of_biases_and_norms_of_heads():
    check_meshes("xla", {"data": 2, "fsdp": 2, "tensor": 2}, qkv_bias=True, qk_norm=True)


def main(attention: str, kind: Kind, meshes: str, properties: str) -> None:
    PROPERTIES.update(json.loads(properties))
    kernels = splash_attention_kernel
    kernels.make_splash_mha = partial(kernels.make_splash_mha, interpret=True)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
    )
    setting = OptimizerConfig(kind, 1e-2, warmup_fraction=0, weight_decay=0.1, clip_norm=0.5, eps=1e-3)
    optimizer = setting.build(setting.schedule(10))
    wanted = two_plain_steps(optimizer)
    with tempfile.TemporaryDirectory() as home:
        save(model_of(), Path(home) / "model")
        for sizes in json.loads(meshes):
            print(json.dumps(compare(sizes, attention, optimizer, wanted, Path(home) / "model")))


if __name__ == "__main__":
    if "--write-specs" in sys.argv:
        SPECS.write_text(written(specs_of_7b()))
    else:
        main(*sys.argv[1:])
