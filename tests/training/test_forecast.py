"""The arithmetic of a dry run, by numbers that were worked out by hand."""

import contextlib
import dataclasses
import json
from itertools import islice
from pathlib import Path

import jax
import pytest
from support.models import make_cepe

from cepe_jax.cost import CHIPS, gib
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.model.parts import split
from cepe_jax.sharding import abstract_mesh
from cepe_jax.training.forecast import epochs, forecast, held_bytes, price
from cepe_jax.training.run import dry_run
from cepe_jax.training.settings import MeshConfig, TrainConfig, sizes_of, tokens_of_step
from cepe_jax.training.trainer import initial_state

PAPER = TrainConfig(
    "cepe", Path("data"), Path("out"), 20_000, 128, "llama2_7b", "mlm_large", mix={"filtered": 2.0, "packed": 1.0},
    micro_batch=1, dtype="bfloat16",
)  # fmt: skip
STEP = {"steps": 20_000, "batch_size": 128, "tokens": 2**20, "counted": "windows", "flops": 128 * 1.91e14}


def test_price_in_tokens_flops_and_hours():
    assert list(price(**STEP, devices=16, chips={"TPU v5 lite": CHIPS["v5e"]})) == [
        "20,000 steps of 128 sequences, 1,048,576 tokens in windows: 20,971,520,000 tokens",
        "24,448.000 TFLOP a step: 4.890e+20 FLOP",
        "chip hours (hours on 16) at an MFU of 40%: TPU v5 lite 1,724 (108)",
    ]
    *_, hours = price(**STEP | {"steps": 20}, devices=1)
    assert "v5e 1.72, v5p 0.74, v6e 0.37," in hours


def test_epochs_of_each_dataset():
    assert list(epochs(20_000, 128, {"filtered": 1_000_000, "packed": 400_000}, [2.0, 1.0])) == [
        "filtered: 1.71 times each of its 1,000,000 examples",
        "packed: 2.13 times each of its 400,000 examples",
    ]


@pytest.mark.parametrize(("stage", "tokens"), [("lm", 12), ("mlm", 12), ("warmup", 30), ("cepe", 42), ("ceped", 42)])
def test_tokens_are_counted_once(stage, tokens):
    """A warm-up's contexts are its windows once more."""
    examples = ExampleConfig(window=10 if stage == "warmup" else 4, num_chunks=2, chunk_length=5)
    config = dataclasses.replace(PAPER, batch_size=3, micro_batch=0, examples=examples)
    object.__setattr__(config, "stage", stage)
    assert tokens_of_step(config) == tokens


def test_held_bytes_are_those_of_arrays():
    """On one device all of it; of 16, a share, and of what `compile_step.py` counts as a step's arguments the most."""
    cepe = make_cepe()
    config = dataclasses.replace(PAPER, dtype="float32")
    trainable, frozen = split(cepe, config.train)
    state = initial_state(trainable, config.optimizer.build(config.optimizer.schedule(9)))
    sizes = {"frozen weights": frozen, "weights that train": trainable, "optimizer": state.opt_state}
    sizes["gradients"] = trainable
    wanted = {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}
    assert held_bytes(config, cepe.config, abstract_mesh()) == wanted
    held = held_bytes(PAPER, sizes_of(PAPER), abstract_mesh(fsdp=16))
    assert {name: gib(size) for name, size in held.items()} == {
        "frozen weights": "0.78 GiB",
        "weights that train": "0.41 GiB",
        "optimizer": "0.83 GiB",
        "gradients": "0.41 GiB",
    }


@pytest.mark.parametrize(
    ("mesh", "lines", "reason"),
    [
        (MeshConfig(fsdp=16), 6, ""),
        (MeshConfig(fsdp=15), 4, "batch_size 128 .* = 15"),
        (MeshConfig(fsdp=1, tensor=3), 4, "mesh.tensor, which is 3"),
    ],
)
def test_price_comes_before_refusals(mesh, lines, reason):
    """Devices that are elsewhere are no reason to refuse."""
    config = dataclasses.replace(PAPER, mesh=mesh)
    told = forecast(config, sizes_of(config), ())
    assert list(islice(told, 4))[-1].startswith("chip hours")
    with pytest.raises(ValueError, match=reason) if reason else contextlib.nullcontext():
        assert len(list(told)) == lines - 4


def test_readme_shows_what_a_dry_run_tells():
    config = dataclasses.replace(PAPER, mesh=MeshConfig(fsdp=16))
    told = "\n".join(islice(forecast(config, sizes_of(config), ()), 5))
    assert f"```\n{told}\n```" in (Path(__file__).parents[2] / "cepe_jax" / "training" / "README.md").read_text()


def test_dry_run_needs_no_data_and_no_weights(tmp_path):
    """A preset, or a directory of a config.json, is enough: the price comes first, the settings last."""
    decoder = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder |= {"intermediate_size": 32, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    decoder |= {"rms_norm_eps": 1e-5, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(decoder))
    config = dataclasses.replace(PAPER, decoder=str(tmp_path), encoder="tiny", data=tmp_path / "data")
    lines = list(dry_run(config))
    assert lines[0].endswith("vocabulary of 64")
    assert [line.split()[0] for line in (lines[1], lines[3], lines[4])] == ["20,000", "chip", "memory"]
    assert lines[6].startswith(f"{tmp_path}/data/filtered: no dataset, and mix names filtered")
    settings = json.loads("\n".join(lines[7:]))
    assert settings["optimizer"]["learning_rate"] == 3e-4
    assert sizes_of(config).encoder.vocab_size == 65
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
