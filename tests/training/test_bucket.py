"""Runs in a bucket, which here is in memory. Checkpoints go another way, from TensorStore to the service itself."""

import json
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from support import buckets, models

from cepe_jax import settings
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.directories import new_directory
from cepe_jax.training.logs import Log, StepFacts
from cepe_jax.training.run import launch
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights import checkpoint
from cepe_jax.weights.checkpoint import Checkpoints
from cepe_jax.weights.source import open_ours, save

RUN = epath.Path("gs://bucket/run")


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    closed: ClassVar[list] = []

    def pipe_file(self, path, value, **options):
        self.closed.append(path)
        return super().pipe_file(path, value, **options)

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            self.closed.append(path)
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def bucket():
    buckets.register(Bucket)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.closed.clear()


def test_settings_keep_the_address():
    values = {"stage": "lm", "data": "d", "out": str(RUN), "steps": 3, "batch_size": 4, "decoder": "tiny"}
    assert str(settings.decode(TrainConfig, values).out / "model") == "gs://bucket/run/model"
    assert settings.decode(TrainConfig, values | {"out": "a/b"}).out == Path("a/b")
    assert str(settings.decode(TrainConfig, values | {"data": "gs://b/d"}).data / "packed") == "gs://b/d/packed"
    with pytest.raises(ValueError, match=r"decoder is gs://b/d: .*\(gcsfuse\)"):
        settings.decode(TrainConfig, values | {"decoder": "gs://b/d"})


def test_a_run_in_a_bucket_needs_its_library(monkeypatch):
    def absent(protocol):
        raise ImportError(protocol)

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ValueError, match="gs://bucket/run .*pip install gcsfs"):
        launch(TrainConfig("lm", Path("d"), RUN, 3, 4, decoder="tiny"))
    job = SampleConfig(data=RUN / "documents", out=Path("d"), kind="packed", length=8)
    with pytest.raises(ValueError, match="gs://bucket/run/documents .*pip install gcsfs"):
        sample(job)


def test_a_model_is_there_once_its_config_is(tmp_path):
    save(models.make_decoder(), RUN / "model")
    save(models.make_decoder(), tmp_path / "model")
    assert Bucket.closed[-1].endswith("run/model/config.json")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (RUN / "model").iterdir():
        file.copy(copied / file.name)
    open_ours(copied).verify()
    assert (copied / "hash.json").read_bytes() == (tmp_path / "model/hash.json").read_bytes()
    with pytest.raises(ValueError, match="gs://bucket/run/model exists"):
        save(models.make_decoder(), RUN / "model")


def test_a_model_that_was_cut_off_is_written_anew():
    (RUN / "model").mkdir(parents=True)
    (RUN / "model/a").write_text("half")
    with new_directory(RUN / "model") as partial:
        (partial / "a").write_text("whole")
        (partial / "config.json").write_text("{}")
    assert (RUN / "model/a").read_text() == "whole"


def test_metrics_go_on_in_a_bucket():
    RUN.mkdir(parents=True)
    facts = StepFacts(np.ones(9), 1, 1.0)
    for first, steps in (0, (1, 2, 3)), (2, (3, 4)):
        log = Log(RUN, first, facts)
        for step in steps:
            log.write(step, {"loss": 10.0 * first + step})
        log.close()
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_checkpoints_are_given_the_address(monkeypatch):
    given = []
    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", lambda directory, **_: given.append(str(directory)))
    Checkpoints(RUN / "checkpoints", {})
    assert given == ["gs://bucket/run/checkpoints"]
