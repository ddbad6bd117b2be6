"""The benchmark of a training step on sizes of seconds, and the oracle's step beside it."""

import json
from pathlib import Path

import pytest

from cepe_jax.benchmarks.training import TrainBenchmarkConfig, benchmark_train
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.training.optimizer import OptimizerConfig

SIZES = {"steps": 10, "decoder": "tiny", "encoder": "tiny"}
EXAMPLES = ExampleConfig(window=16, num_chunks=2, chunk_length=8)


def config(stage: str, out: Path, **settings) -> TrainBenchmarkConfig:
    settings = {"batch_size": 2, "examples": EXAMPLES, "timed_steps": 2, "beside": "torch", "out": out} | settings
    return TrainBenchmarkConfig(stage=stage, **SIZES | settings)


def test_both_steps_start_from_one_loss(tmp_path):
    """8 CPU-seconds: that what stands beside ours is the same work, by the loss of the same weights and tokens."""
    pytest.importorskip("torch")
    benchmark_train(config("cepe", tmp_path))
    result = json.loads((tmp_path / "train.json").read_text())
    losses, seconds = result["beside"]["first_losses"], result["beside"]["seconds"]
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["ours"] == pytest.approx(7.6, abs=0.1)  # about log 2,048: the weights are random
    assert result["beside"]["ratio"] == pytest.approx(seconds["ours"] / seconds["torch"])
    assert seconds["ours"] <= result["step_seconds"]


def test_what_has_no_oracle_is_refused(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="stage lm"):
        benchmark_train(config("lm", tmp_path, encoder=""))
    with pytest.raises(ValueError, match="float32"):
        benchmark_train(config("cepe", tmp_path, dtype="bfloat16"))
    with pytest.raises(ValueError, match="AdamW.*muon"):
        benchmark_train(config("cepe", tmp_path, optimizer=OptimizerConfig("muon")))
    assert not list(tmp_path.iterdir())
