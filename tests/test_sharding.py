"""Placement: the table's rules, the golden placement of the 7B model, and one answer on every mesh of fake devices.

Run as a script with sizes (fsdp=2 tensor=4) it compares that mesh with no mesh on the devices there are;
with --write-specs it writes the golden file anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import DECODER, ENCODER, make_cepe, relative_error

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig
from cepe_jax.model.cepe import Cepe, assemble, cross_from_self_attention, split
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import MESH_AXES, constrain, make_mesh, partition_spec, shardings_of

SPECS = Path(__file__).parent / "model" / "llama2_7b_specs.json"


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        (("layer", "embed", "mlp"), PartitionSpec(None, "fsdp", "tensor")),
        (("layer", "heads", "head_dim", "embed"), PartitionSpec(None, "tensor", None, "fsdp")),
        (("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        (("layer", "encoder_embed", "kv_heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor", None)),
        (("batch", "length", "embed"), PartitionSpec(("data", "fsdp"), None, None)),  # batch took fsdp
        (("batch", "memory", None), PartitionSpec(("data", "fsdp"), "context", None)),
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
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "context", "tensor")
    assert mesh.shape["fsdp"] == devices
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_constrain_without_a_mesh_is_nothing():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "embed") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", "embed"))(x))


def specs_of_7b() -> dict:
    """Parameter -> shape, logical axes, PartitionSpec, of the CEPE of the 7B model, by shapes alone."""
    config = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"], 32)
    key = jax.random.key(0)

    def make():
        decoder = Llama(config.decoder, key=key)
        cross = cross_from_self_attention(decoder, config.encoder, config.num_cross_layers, "copy", key=key)
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
    assert placed["model"].k == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor", None))


def compare_with_no_mesh(sizes: dict[str, int]) -> dict:
    """The largest error of logits and gradients; gradients that are zero; how many weights were really split."""
    rng = np.random.default_rng(0)
    batch = (
        rng.integers(0, DECODER.vocab_size, (4, 6)),
        rng.integers(0, ENCODER.vocab_size, (4, 2, 4)),
        rng.random((4, 2, 4)) < 0.8,
        np.arange(6) >= np.array([0, 1, 2, 0])[:, None],
    )

    def loss(trainable, frozen, batch):
        logits = assemble(trainable | frozen)(*batch)
        return (logits**2 * batch[3][..., None]).mean(), logits

    step = jax.jit(jax.grad(loss, has_aux=True))
    cepe = make_cepe()
    wanted = step(*split(cepe, ("cross", "encoder")), batch)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(cepe, shardings_of(cepe, mesh))
        rows = jax.device_put(batch, NamedSharding(mesh, partition_spec(("batch",))))
        ours = step(*split(placed, ("cross", "encoder")), rows)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)]
    errors = {
        name: relative_error(leaf, theirs)
        for leaf, (name, theirs) in zip(jax.tree.leaves(ours), named, strict=True)
        if np.asarray(theirs).any()
    }
    return {
        "error": max(errors.values()),
        "zero": [name for name, _ in named if name not in errors],
        "split": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)),
        "batch_spec": ours[1].sharding.spec[0],
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"fsdp": 4, "context": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_answer_on_every_mesh(sizes):
    """fp32, logits and gradients. Every trainable weight has a gradient but the MLM head, which no logit reads."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
    }
    arguments = [f"{name}={size}" for name, size in sizes.items()]
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["error"] < 1e-5
    assert len(result["zero"]) == 4
    assert all(".mlm_head" in name for name in result["zero"])
    assert result["split"] >= 30 - 10 * ("fsdp" not in sizes)
    split_over = [name for name in ("data", "fsdp") if name in sizes]
    assert result["batch_spec"] == (split_over if len(split_over) > 1 else split_over[0])


if __name__ == "__main__":
    if "--write-specs" in sys.argv:
        SPECS.write_text(written(specs_of_7b()))
    else:
        mesh_sizes = dict(argument.split("=") for argument in sys.argv[1:])
        print(json.dumps(compare_with_no_mesh({name: int(size) for name, size in mesh_sizes.items()})))
