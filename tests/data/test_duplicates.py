"""Near-duplicates: signatures against exact similarities, and the datasets without them."""

import dataclasses
import sys
import tracemalloc

import numpy as np
import pytest
from support.tokenizers import byte_level

from cepe_jax.data import duplicates
from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.data.duplicates import (
    BYTES,
    DeduplicateConfig,
    Signatures,
    bands_of,
    deduplicate,
    find,
    shingles,
    signature,
)
from cepe_jax.data.records import read_index
from cepe_jax.data.sampling import SampleConfig, sample

pytest.importorskip("datasketch")
CONFIG = DeduplicateConfig(data=None, out=None)


def similarity(one, other, length: int) -> float:
    """The Jaccard similarity of the sets of runs, by their definition."""
    sets = [{tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)} for tokens in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("length", [1, 5])
def test_signatures_estimate_the_jaccard_similarity(length):
    """512 permutations: a standard error of 0.022 at most. The mean of 30 pairs is nearer."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, shingle=length, permutations=512)
    errors = []
    for changed in np.linspace(0, 0.3, 30):
        one = rng.integers(0, 50_000, 9000).astype(np.uint16)
        other = np.where(rng.random(9000) < changed, rng.integers(0, 50_000, 9000), one).astype(np.uint16)
        estimate = (signature(one, config) == signature(other, config)).mean()
        errors.append(estimate - similarity(one.tolist(), other.tolist(), length))
    assert np.abs(errors).max() < 0.08
    assert abs(np.mean(errors)) < 0.015


def test_shingles_differ_as_their_runs_do():
    tokens = np.array([1, 2, 3, 2, 1, 1, 2, 3, 0, 0, 0, 0], np.uint16)
    runs = [tuple(tokens[i : i + 3]) for i in range(10)]
    hashes = shingles(tokens, 3)
    assert len(set(hashes.tolist())) == len(set(runs)) == 8
    assert hashes.max() > 1 << 31
    assert hashes.max() < 1 << 32
    assert len(shingles(tokens[:2], 3)) == 1
    assert shingles(tokens[:2].astype(np.uint32), 3) == shingles(tokens[:2], 3)


def texts() -> dict[str, str]:
    """Documents by name: of each original a copy, one with another word, and one with another second half."""
    rng = np.random.default_rng(0)
    written = {}
    for number in range(30):
        words = [f"{a}{b}" for a, b in rng.integers(100, 999, (80, 2))]
        changed = [*words[:40], "another", *words[41:]]
        half = [*words[:40], *(f"{a}{b}" for a, b in rng.integers(100, 999, (40, 2)))]
        for kind, content in (("original", words), ("near", changed), ("copy", words), ("half", half)):
            written[f"{number:02}-{kind}"] = " ".join(content)
    return written


@pytest.fixture
def config(tmp_path) -> DeduplicateConfig:
    (tmp_path / "in").mkdir()
    for name, text in texts().items():
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    tokenizer = str(byte_level(tmp_path / "tokenizer.json"))
    options = {"test_fraction": 0.2, "retrieval_fraction": 0.3, "unit_bytes": 20_000, "workers": 1}
    prepare(PrepareConfig(input=tmp_path / "in", out=tmp_path / "documents", tokenizer=tokenizer, **options))
    return DeduplicateConfig(data=tmp_path / "documents", out=tmp_path / "unique", workers=1)


def names(path) -> dict[str, list[str]]:
    return {split: [document.name for document in Corpus(path, split)] for split in read_index(path)["splits"]}


def test_one_of_each_kind_stays(config):
    """In the split that comes first: test, train, retrieval; and halves of a text are not nearly the whole."""
    before = names(config.data)
    assert len(read_index(config.data)["splits"]["train"]["shards"]) > 2
    deduplicate(config)
    after = names(config.out)
    splits = {name.removesuffix(".txt"): split for split, all_names in before.items() for name in all_names}
    left = {name.removesuffix(".txt"): split for split, all_names in after.items() for name in all_names}
    order = ["test", "train", "retrieval"]
    for number in range(30):
        same = [f"{number:02}-{kind}" for kind in ("copy", "near", "original")]
        (kept,) = [name for name in same if name in left]
        assert order.index(left[kept]) == min(order.index(splits[name]) for name in same)
        assert f"{number:02}-half" in left
    assert read_index(config.out)["left_out"] == 60
    for split, all_names in after.items():
        assert all_names == [name for name in before[split] if name in all_names]
        kept = {document.name: document for document in Corpus(config.data, split)}
        assert all((kept[d.name].tokens == d.tokens).all() for d in Corpus(config.out, split))
    report = (config.out / "report.md").read_text()
    assert f"| train | {len(before['train'])} | {len(before['train']) - len(after['train'])} |" in report
    sample(SampleConfig(data=config.out, out=config.out.with_name("packed"), kind="packed", length=50, workers=1))


def test_threshold_decides(config):
    """Of long shingles a tenth has the word in which two documents differ, so that they are not similar enough."""
    deduplicate(dataclasses.replace(config, threshold=0.95, shingle=60))
    left = [name for all_names in names(config.out).values() for name in all_names]
    assert len(left) == 90
    assert sum("near" in name for name in left) == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_units_are_not_done_again(config, workers, monkeypatch):
    """A run that is cut off while it copies goes on, and ends with the bytes of one that was not."""
    whole = dataclasses.replace(config, out=config.out.with_name("whole"), workers=workers)
    deduplicate(whole)
    with monkeypatch.context() as patch:
        patch.setattr(duplicates.KeepUnit, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deduplicate(config)
    assert not (config.out / "dataset.json").exists()
    monkeypatch.setattr(duplicates, "signature", None)  # not made again
    deduplicate(config)
    for path in whole.out.glob("documents-*"):
        assert path.read_bytes() == (config.out / path.name).read_bytes()


def test_equal_documents_meet_among_many_variants(tmp_path):
    """Each band of theirs is also that of variants which are not near them, and which come first."""
    rng = np.random.default_rng(0)
    page = rng.integers(0, 1 << 32, 128, np.uint32)
    variants = np.where(rng.random((3000, 128)) < 0.3, rng.integers(0, 1 << 32, (3000, 128), np.uint32), page)
    variants = variants[(variants == page).mean(axis=1) < 0.8]
    np.save(tmp_path / "a.npy", np.concatenate([variants, np.stack([page] * 20)]))
    assert sum((variants[:, :13] == page[:13]).all(axis=1)) > 5
    kept, _ = find(Signatures([tmp_path / "a.npy"]), bands_of(CONFIG), CONFIG.threshold)
    assert kept[-20:].tolist() == [True] + [False] * 19


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
def test_later_ones_of_a_band_meet(tmp_path, order):
    """Two that are near each other and not near the first of their band: the second goes."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 1 << 32, (2, 128), np.uint32)
    other[:64] = one[:64]
    near = other.copy()
    near[-1] += 1
    np.save(tmp_path / "a.npy", np.stack([one, other, near])[order])
    kept, pairs = find(Signatures([tmp_path / "a.npy"]), bands_of(CONFIG), CONFIG.threshold)
    assert kept.tolist() == [True, True, False]
    assert [pair[:2] for pair in pairs] == [(2, order.index(1))]


def test_memory_is_bytes_for_each_document(tmp_path):
    """Of 300,000 documents with signatures of 16 numbers, half of which share a band with an earlier one."""
    rng, count = np.random.default_rng(0), 300_000
    rows = rng.integers(0, 1 << 32, (count, 16), np.uint32)
    rows[1::2, :8] = rows[::2, :8]
    np.save(tmp_path / "a.npy", rows)
    del rows
    signatures = Signatures([tmp_path / "a.npy"])
    tracemalloc.start()
    kept, pairs = find(signatures, [slice(8), slice(8, 16)], 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not kept[1::2].any()
    assert kept[::2].all()
    assert pairs[0] in [(n + 1, n, 0.5) for n in range(0, count, 2)]
    assert peak < BYTES * count + (10 << 20)
    assert peak > BYTES * count / 2


@pytest.mark.parametrize("shard", ["0/40", "39/40"])
def test_jobs_without_shards_of_their_own(config, shard):
    """A job may have nothing to sign and nothing to copy, before the others and after them."""
    deduplicate(dataclasses.replace(config, shard=shard))
    assert not (config.out / "dataset.json").exists()
    deduplicate(config)
    deduplicate(dataclasses.replace(config, shard=shard))
    assert read_index(config.out)["left_out"] == 60


def test_split_that_would_be_empty(config):
    """Nothing looks whole, and another threshold does with the same signatures."""
    with pytest.raises(ValueError, match=r"threshold is 0\.02.* train "):
        deduplicate(dataclasses.replace(config, threshold=0.02, shingle=3))
    assert not (config.out / "dataset.json").exists()
    before = {path: path.stat().st_mtime_ns for path in config.out.glob("signatures/*-0*.npy")}
    deduplicate(dataclasses.replace(config, threshold=0.9, shingle=3))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(before) > 5


def test_threshold_without_bands(config):
    with pytest.raises(ValueError, match=r"threshold is 0\.999.*permutations 128.*--permutations"):
        deduplicate(dataclasses.replace(config, threshold=0.999))


def test_library_that_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"\.\[duplicates\]"):
        deduplicate(config)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 1.0), ("threshold", 0.0), ("shingle", 0), ("permutations", 8)]
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}"):
        dataclasses.replace(CONFIG, **{name: value})
