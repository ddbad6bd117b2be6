"""Raw files and datasets in a bucket, which here is a folder behind gs://."""

import dataclasses
import gzip
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from support import buckets, models
from support.tokenizers import byte_level

from cepe_jax.data import corpus
from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import open_mix
from cepe_jax.data.recipes import WindowsInContext
from cepe_jax.data.records import NoDataset, Records, joins, open_joined
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.settings import decode
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import save

HOME = epath.Path("gs://bucket")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of the bucket, which holds raw documents: lines, a divided file of lines, and a packed text."""
    monkeypatch.setenv(buckets.FOLDER, str(tmp_path / "buckets"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    buckets.register()
    rng = np.random.default_rng(0)
    raw = tmp_path / "buckets" / "bucket" / "raw"
    for name, count in ("a/1.jsonl", 60), ("b/2.jsonl", 9), ("4.jsonl", 3):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(rng.choice(["ab", "é", "cde", "\n"], 40)) for _ in range(count)]
        (raw / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with gzip.open(raw / "b" / "3.txt.gz", "wb") as file:
        file.write(b"some more words " * 20)
    byte_level(tmp_path / "tokenizer.json")
    return raw.parent


@pytest.fixture
def config(tmp_path, folder) -> PrepareConfig:
    patterns = "**/*.jsonl", "**/*.txt.gz"
    options = {"test_fraction": 0.2, "unit_bytes": 3000, "workers": 1, "patterns": patterns}
    return PrepareConfig(
        input=HOME / "raw", out=HOME / "documents", tokenizer=str(tmp_path / "tokenizer.json"), **options
    )


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a dataset by name, except the marks of its units."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def local(config, tmp_path, folder) -> PrepareConfig:
    """The same without a bucket."""
    return dataclasses.replace(config, input=folder / "raw", out=tmp_path / "local")


def test_datasets_are_those_of_a_directory(config, local, tmp_path, folder):
    prepare(config)
    prepare(local)
    assert contents(folder / "documents") == contents(local.out)
    assert len(Records(config.out, "train").facts["shards"]) > 4
    options = {"kind": "packed", "length": 32, "workers": 1}
    sample(SampleConfig(data=config.out, out=HOME / "packed", **options))
    sample(SampleConfig(data=local.out, out=tmp_path / "sampled", **options))
    assert contents(folder / "packed") == contents(tmp_path / "sampled")
    recipe = WindowsInContext(ExampleConfig(window=16, num_chunks=2, chunk_length=8))
    (theirs,), (ours,) = (open_mix(place, {"packed": 1}, recipe) for place in (folder, HOME))
    assert [record["tokens"].tolist() for record in theirs] == [record["tokens"].tolist() for record in ours]


def test_shards_are_copied_when_they_are_read(config, tmp_path):
    prepare(config)
    records = Records(config.out, "train")
    shards = records.facts["shards"]
    copies = lambda: sorted(p.name for p in tmp_path.glob("copies/*/*/*") if "array_record" in p.name)  # noqa: E731
    assert copies() == []
    assert records[shards[0]["records"]]["name"] == Corpus(config.out, "train")[shards[0]["records"]].name
    assert copies() == [f"documents-train.array_record-00001-of-{len(shards):05}"]


def test_job_that_was_cut_off_goes_on(config, local, monkeypatch, folder):
    """There is no index, so no dataset, until all shards are there; finished units are not done again."""
    begun = []
    work = corpus.TokeniseUnit.__call__

    def passed(self, number, unit):
        begun.append(number)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return (yield from work(self, number, unit))

    monkeypatch.setattr(corpus.TokeniseUnit, "__call__", passed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    with pytest.raises(NoDataset, match="not finished"):
        Records(config.out, "train")
    prepare(config)
    count = len(Records(config.out, "train").facts["shards"])
    assert begun == [0, 1, 2, *range(2, count)]
    prepare(local)
    assert contents(folder / "documents") == contents(local.out)


def test_a_run_reads_them(config, tmp_path):
    """As it reads those of a directory, with their tokenizer beside the model in the end."""
    prepare(config)
    sample(SampleConfig(data=config.out, out=HOME / "packed", kind="packed", length=32, workers=1))
    tokenizer = Records(config.out, "train").tokenizer
    decoder = models.make_decoder(dataclasses.replace(models.DECODER, vocab_size=tokenizer.vocab_size))
    save(decoder, tmp_path / "decoder")
    settings = {"stage": "lm", "data": "gs://bucket/packed", "decoder": str(tmp_path / "decoder"), "steps": 2}
    settings |= {"out": str(tmp_path / "run"), "batch_size": 4, "examples": {"window": 32}}
    home = run_stage(decode(TrainConfig, settings))
    assert Tokenizer(home).fingerprint() == tokenizer.fingerprint()


def test_joined_datasets_may_lie_anywhere(config, tmp_path, folder):
    """Relative to each other in one bucket or one file system, by their address otherwise."""
    prepare(config)
    records = Records(config.out, "test")
    assert joins(records, HOME / "more" / "passages")["path"] == "../../documents"
    assert joins(records, tmp_path / "passages")["path"] == "gs://bucket/documents"
    here = joins(Records(folder / "documents", "test"), HOME / "passages")["path"]
    assert here == str(folder / "documents")
    assert open_joined(config.out, "test")[0].digest == records.digest


def test_places_with_characters_of_patterns(config, folder):
    (folder / "raw").rename(folder / "raw[1]")
    prepare(dataclasses.replace(config, input=HOME / "raw[1]"))
    assert len(Records(config.out, "train").facts["shards"]) > 4


def test_absent_tokenizer_is_named_by_its_address(folder):
    with pytest.raises(FileNotFoundError, match="gs://bucket/raw: no tokenizer.model"):
        Tokenizer("gs://bucket/raw")


def test_copies_of_another_user_are_not_read(config, monkeypatch):
    prepare(config)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    os.mkdir(Path(tempfile.gettempdir()) / f"cepe_jax-{os.getuid()}")
    with pytest.raises(ValueError, match="TMPDIR"):
        Records(config.out, "train")


def test_a_tokenizer_is_not_trained_there(config):
    with pytest.raises(ValueError, match="gs://bucket/documents.*--tokenizer"):
        prepare(dataclasses.replace(config, tokenizer=""))
