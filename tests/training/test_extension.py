"""A decoder that gets another RoPE base: what it computes, what its directory says, and where it is refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from support.datasets import make_data
from support.models import SIZES, bits, forget
from support.refusals import one_line

from cepe_jax.config import DECODERS, ENCODERS, CrossLayers, RewardConfig, RopeConfig
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import make_mesh
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig, run_identity, sizes_of
from cepe_jax.training.stages import STAGES
from cepe_jax.weights.hf_config import window_of
from cepe_jax.weights.source import load, open_model, save

THETA, WINDOW, SHORT = 1.5e8, 32, 16
SCALED = RopeConfig(theta=100.0, scaling="linear", factor=2.0)
STILL = OptimizerConfig(learning_rate=1e-30)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Sequences of 32 tokens, a decoder of 16 positions whose RoPE is scaled, one of a Mistral's, and an encoder."""
    home = make_data(tmp_path_factory.mktemp("data"), 400)
    sizes = {"vocab_size": 400, "num_layers": 2} | SIZES
    decoder = dataclasses.replace(DECODERS["tiny"], **sizes, rope=SCALED)
    save(Encoder(dataclasses.replace(ENCODERS["tiny"], **sizes), key=jax.random.key(2)), home / "encoder")
    facts = {"max_position_embeddings": SHORT, "eos_token_id": 2}
    for name, more in ("decoder", {}), ("mistral", {"model_type": "mistral", "sliding_window": SHORT}):
        save(Llama(decoder, key=jax.random.key(1)), home / name, home / "docs")
        forget(home / name)
        config = json.loads((home / name / "config.json").read_text())
        (home / name / "config.json").write_text(json.dumps(config | {"huggingface": facts | more}))
    return home


def config_of(home, out, stage: str = "lm", **settings) -> TrainConfig:
    settings = {"decoder": str(home / "decoder"), "examples": ExampleConfig(window=WINDOW)} | settings
    return TrainConfig(stage, home / "filtered", out, 1, 4, rope_theta=THETA, optimizer=STILL, **settings)


@pytest.mark.parametrize("name", ["decoder", "mistral"])
def test_the_written_decoder_has_base_and_length(home, tmp_path, name):
    """The weights are the same, at positions of the new base: what is computed differs, as its definition says."""
    model = run_stage(config_of(home, tmp_path / "out", decoder=str(home / name)))
    trained, start = load(model), load(home / name)
    assert trained.config.rope == RopeConfig(theta=THETA)
    assert (window_of(open_model(home / name).facts), window_of(open_model(model).facts)) == (SHORT, WINDOW)
    assert open_model(model).facts["eos_token_id"] == 2
    assert bits(trained) == bits(start)
    tokens = np.arange(WINDOW)[None]
    rebased = load(home / name, config=dataclasses.replace(start.config, rope=RopeConfig(theta=THETA)))
    assert np.array_equal(trained(tokens), rebased(tokens))
    assert np.abs(trained(tokens) - start(tokens)).max() > 1e-3


def test_a_shorter_window_leaves_the_length(home, tmp_path):
    model = run_stage(config_of(home, tmp_path / "out", examples=ExampleConfig(window=SHORT // 2)))
    assert window_of(open_model(model).facts) == SHORT


def test_a_cepe_is_built_on_the_base(home, tmp_path):
    examples = ExampleConfig(window=24, num_chunks=1, chunk_length=8)
    start = {"encoder": str(home / "encoder"), "cross_layers": CrossLayers("last", 1), "examples": examples}
    model = run_stage(config_of(home, tmp_path / "out", "cepe", **start))
    sizes = open_model(model).config
    assert (sizes.decoder.rope, sizes.encoder.rope) == (RopeConfig(theta=THETA), ENCODERS["tiny"].rope)
    assert window_of(open_model(model).facts) == 24


def test_a_teacher_reads_as_far_as_the_base(home, tmp_path):
    """Of 16 positions it would be refused: it reads 32."""
    examples = ExampleConfig(window=24, num_chunks=1, chunk_length=8)
    start = {"encoder": str(home / "encoder"), "distill": DistillConfig(top_k=4), "examples": examples}
    config = config_of(home, tmp_path / "out", "ceped", **start)
    with pytest.raises(ValueError, match=f"(?=.*{SHORT})(?=.*{WINDOW})") as error:
        run_stage(dataclasses.replace(config, rope_theta=0.0))
    one_line(error)
    run_stage(config)


def test_a_reward_model_may_have_another_base(home, tmp_path):
    """From a decoder and from a reward model's directory."""
    config = config_of(home, tmp_path / "out", "reward")
    sizes = sizes_of(config)
    assert sizes == RewardConfig(dataclasses.replace(open_model(home / "decoder").config, rope=RopeConfig(theta=THETA)))
    (start,) = (start for start in STAGES["reward"].starts if start.models == ("decoder",))
    plain, compute = dataclasses.replace(config, rope_theta=0.0), load(home / "decoder").compute
    with jax.set_mesh(make_mesh()):
        save(start.model(plain, sizes_of(plain), compute, ()), tmp_path / "reward", home / "docs")
        again = dataclasses.replace(config, decoder=str(tmp_path / "reward"))
        assert sizes_of(again) == sizes
        model = start.model(again, sizes, compute, ())
    assert bits(model.parts["head"]) == bits(load(tmp_path / "reward").parts["head"])
    assert model.config.decoder.rope == RopeConfig(theta=THETA)


def test_the_base_is_part_of_the_run(home, tmp_path):
    config = config_of(home, tmp_path / "out")
    assert run_identity(vars(config))["rope_theta"] == THETA
    run_stage(config)
    with pytest.raises(ValueError, match=re.escape("rope_theta is 150000000.0 there and 500000.0 here")) as error:
        run_stage(dataclasses.replace(config, rope_theta=5e5))
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"stage": "cepe", "decoder": "", "cepe": "c"}, "(?=.*rope_theta)(?=.*cepe)"),
        ({"stage": "mlm", "decoder": "", "encoder": "e"}, "(?=.*rope_theta)(?=.*mlm)(?=.*encoder)"),
        ({"stage": "mlm", "encoder": "tiny"}, "(?=.*rope_theta)(?=.*mlm)(?=.*decoder and encoder)"),
        ({"rope_theta": 1.0}, "(?=.*rope_theta)(?=.*1.0)"),
        ({"rope_theta": -5.0}, "(?=.*rope_theta)(?=.*-5.0)"),
        ({"rope_theta": float("inf")}, "(?=.*rope_theta)(?=.*inf)"),
    ],
)
def test_wrong_bases_are_refused(home, tmp_path, changes, values):
    with pytest.raises(ValueError, match=values) as error:
        dataclasses.replace(config_of(home, tmp_path / "out"), train=(), **changes)
    one_line(error)
