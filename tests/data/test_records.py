"""Datasets of records: TFDS reads what was written, facts are exact, and what is damaged is refused by name."""

import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cepe_jax.data import builder as builder_module
from cepe_jax.data import records
from cepe_jax.data.builder import Builder, ShardWriter, add_counts, array, copy_tokenizer, report, text, token_dtype
from cepe_jax.data.records import Records, lengths_path, read_index, shard_path
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train

NAME = "things"
TRAIN_TEXTS = ["a tale of two cities, a tale of two towns"] * 20
# split -> shards -> records (domain, tokens, lengths of pieces)
CONTENT = {
    "train": [
        [("b", [1, 5, 2], ()), ("a", [7] * 9, (4, 5)), ("b", [1, 2], ())],
        [],
        [("a", [65535, 0, 3, 4], ()), ("ä c", [9], ())],
    ],
    "test": [[("a", [3], ())], [], []],
    "none": [[], [], []],
}
FEATURES = {"tokens": array(np.uint16, None), "name": text(), "domain": text()}


def write_dataset(out: Path, content=CONTENT, tokenizer: Tokenizer | None = None) -> Path:
    builder = Builder(out, {"setting": 1}, tokenizer)
    count = len(next(iter(content.values())))
    for number in range(count):
        splits = {}
        for split, shards in content.items():
            writer = ShardWriter(shard_path(out, NAME, split, number, count), FEATURES)
            for place, (domain, tokens, pieces) in enumerate(shards[number]):
                record = {"tokens": np.array(tokens, np.uint16), "name": f"{split}é{number}.{place}", "domain": domain}
                writer.write(record, domain, len(tokens), pieces)
            splits[split] = writer.close()
        builder.mark(number, [number], {"splits": splits})
    marks = [builder.marked(number, [number]) for number in range(count)]
    builder.register(NAME, FEATURES, marks, {"tokenizer": tokenizer.fingerprint() if tokenizer else "", "more": [1]})
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train(TRAIN_TEXTS, 275, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> Path:
    return write_dataset(tmp_path_factory.mktemp("written") / "data", tokenizer=tokenizer)


@pytest.fixture
def dataset(written, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "data")


def plain(records) -> list[tuple]:
    def text(value: str | bytes) -> str:
        return value if isinstance(value, str) else value.decode()

    return [(text(r["name"]), text(r["domain"]), r["tokens"].dtype, r["tokens"].tolist()) for r in records]


def expected(split: str) -> list[tuple]:
    return [
        (f"{split}é{number}.{place}", domain, np.uint16, tokens)
        for number, shard in enumerate(CONTENT[split])
        for place, (domain, tokens, _) in enumerate(shard)
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_written_is_read(written, split):
    records = Records(written, split)
    assert plain(records) == expected(split)
    assert len(records) == len(expected(split))
    for number in (-1, len(records)):
        with pytest.raises(IndexError):
            records[number]
    assert plain(pickle.loads(pickle.dumps(records))) == expected(split)


def test_tfds_reads_the_same(written, tmp_path):
    """By the directory alone, wherever it is moved."""
    for path in (written, shutil.copytree(written, tmp_path / "moved")):
        builder = tfds.builder_from_directory(path)
        assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
            split: len(expected(split)) for split in CONTENT
        }
        for split in ("train", "test"):
            source = builder.as_data_source(split)
            assert plain(source[number] for number in range(len(source))) == expected(split)
        assert builder.info.splits["train"].num_bytes == sum(
            path.stat().st_size for path in written.glob("things-train.array_record-*-of-00003")
        )


def test_tensorflow_is_not_imported(tmp_path):
    """Neither to prepare, sample, retrieve, nor to read and load, where it is installed."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("print('imported')")
    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.txt").write_text(TRAIN_TEXTS[0] * 2)
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.recipes import WindowsInContext
from cepe_jax.data.records import Records
from cepe_jax.data.retrieval import RetrieveConfig, retrieve
from cepe_jax.data.sampling import SampleConfig, sample
home = Path({str(tmp_path)!r})
given = dict(workers=1, seed=0)
prepare(PrepareConfig(input=home / "in", out=home / "out", vocab_size=275, test_fraction=0.3, **given))
sample(SampleConfig(data=home / "out", out=home / "sampled", kind="packed", length=8, **given))
assert len(Corpus(home / "out", "train")[0].tokens) > 10
assert len(Records(home / "sampled", "train")[0]["tokens"]) == 9
passages = dict(passage_split="train", k=2, passage_length=4, query_tokens=4)
retrieve(RetrieveConfig(data=home / "sampled", passages=home / "out", out=home / "retrieved", **passages, **given))
recipe = WindowsInContext(ExampleConfig(window=8, num_chunks=2, chunk_length=4))
data = examples(open_mix(home, {{"retrieved": 1.0}}, recipe), [1.0], recipe, seed=0)
assert next(batches(data, 2))["context"].shape == (2, 2, 4)
assert "tensorflow" not in sys.modules
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["done"], done.stderr


def test_counts_and_histograms_are_exact(written):
    """Against a recount from the records and the lengths of their pieces."""
    for split, shards in CONTENT.items():
        facts = read_index(written)["splits"][split]
        everything = [record for shard in shards for record in shard]
        domains = sorted({domain for domain, _, _ in everything})
        assert list(facts["domains"]) == domains
        for domain in [None, *domains]:
            chosen = [record for record in everything if domain in (None, record[0])]
            counts = facts if domain is None else facts["domains"][domain]
            assert counts["records"] == len(chosen)
            assert counts["tokens"] == sum(len(tokens) for _, tokens, _ in chosen)
            pieces = [piece for _, tokens, pieces in chosen for piece in pieces or [len(tokens)]]
            bins = [sum(2 ** (b - 1) <= piece < 2**b for piece in pieces) for b in range(1, 6)]
            assert counts["histogram"] == [0, *bins][: len(counts["histogram"])]
            assert sum(counts["histogram"]) == len(pieces)
        for shard, stored in zip(shards, facts["shards"], strict=True):
            assert stored["records"] == len(shard)
            assert {d: c["tokens"] for d, c in stored["domains"].items()} == {
                d: sum(len(t) for domain, t, _ in shard if domain == d) for d in sorted({r[0] for r in shard})
            }


def test_counts_are_added():
    counts = [{"records": 1, "tokens": 5, "histogram": [0, 1]}, {"records": 2, "tokens": 3, "histogram": [0, 2, 0, 4]}]
    assert add_counts(counts) == {"records": 3, "tokens": 8, "histogram": [0, 3, 0, 4]}
    assert add_counts([]) == {"records": 0, "tokens": 0, "histogram": []}


def test_the_report(written):
    index = read_index(written)
    said = (written / "report.md").read_text()
    assert said == report(NAME, index["splits"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    assert rows[2:] == [
        ["train", "a", "2", "13", "4-7: 3"],
        ["train", "b", "2", "5", "2-3: 2"],
        ["train", "ä c", "1", "1", "1-1: 1"],
        ["train", "all", "5", "19", "1-1: 1, 2-3: 2, 4-7: 3"],
        ["test", "a", "1", "1", "1-1: 1"],
        ["test", "all", "1", "1", "1-1: 1"],
        ["none", "all", "0", "0", ""],
    ]


def test_lengths_by_domain(written):
    records = Records(written, "train")
    found = [{d: (n.tolist(), l.tolist()) for d, (n, l) in records.lengths(shard).items()} for shard in range(3)]
    assert found == [{"a": ([1], [9]), "b": ([0, 2], [3, 2])}, {}, {"a": ([3], [4]), "ä c": ([4], [1])}]
    for shard in range(3):
        for domain, (numbers, lengths) in records.lengths(shard).items():
            assert [(r["domain"], len(r["tokens"])) for r in map(records.__getitem__, numbers)] == [
                (domain, length) for length in lengths
            ]


def test_the_digest_is_of_the_content(written, tmp_path):
    digest = Records(written, "train").digest
    assert Records(write_dataset(tmp_path / "same"), "train").digest == digest
    first, second, third = CONTENT["train"]
    others = [
        [[("b", [1, 5, 3], ()), *first[1:]], second, third],
        [[("a", [1, 5, 2], ()), *first[1:]], second, third],
        [first[::-1], second, third],
        [third, second, first],
        [[*first, ("a", [1], ())], second, third],
    ]
    digests = [
        Records(write_dataset(tmp_path / str(n), CONTENT | {"train": other}), "train").digest
        for n, other in enumerate(others)
    ]
    assert len({digest, *digests}) == 6


def test_facts_of_the_index(written):
    index = read_index(written)
    assert (index["name"], index["identity"], index["more"]) == (NAME, {"setting": 1}, [1])


def refused(path: Path, split: str = "train") -> str:
    """What the error says, at opening or at reading."""

    def read_all():
        records = Records(path, split)
        return list(records), [records.lengths(shard) for shard in range(3)], records.tokenizer

    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_all()
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGE = {
    "a shard cut short": (lambda d: cut(shard(d), 60), r" 60 bytes .* \d+: "),
    "a shard a byte short": (lambda d: cut(shard(d), shard(d).stat().st_size - 1), r" \d+ bytes .* \d+: "),
    "a shard that is empty": (lambda d: cut(shard(d), 0), r" 0 bytes .* \d+: "),
    "a shard that grew": (lambda d: shard(d).write_bytes(shard(d).read_bytes() + b"\0"), r" \d+ bytes .* \d+: "),
    "a shard missing": (lambda d: shard(d).unlink(), "shard .*missing"),
    "zeros in a shard": (lambda d: shard(d).write_bytes(bytes(shard(d).stat().st_size)), "damaged"),
    "no table of lengths": (lambda d: lengths_path(shard(d)).unlink(), r"\.lengths\.npy: missing"),
    "a table cut short": (lambda d: cut(lengths_path(shard(d)), 140), r"\.lengths\.npy: missing"),
    "a table that is empty": (lambda d: cut(lengths_path(shard(d)), 0), r"\.lengths\.npy: missing"),
    "another table": (
        lambda d: shutil.copy(lengths_path(shard(d, 2)), lengths_path(shard(d))),
        r"\.lengths\.npy: .*its shard",
    ),
    "another length": (lambda d: change_table(d, 0, 1), r"\.lengths\.npy: .*its shard"),
    "another domain": (lambda d: change_table(d, 0, 0), r"\.lengths\.npy: .*its shard"),
    "a table of another kind": (
        lambda d: np.save(lengths_path(shard(d)), np.zeros(3, int)),
        r"\.lengths\.npy: .*its shard",
    ),
    "the index cut short": (lambda d: cut(d / "dataset.json", 50), "dataset.json is not JSON"),
    "no index": (lambda d: (d / "dataset.json").unlink(), "not finished"),
    "no metadata": (lambda d: (d / "dataset_info.json").unlink(), "not finished"),
    "the metadata cut short": (lambda d: cut(d / "dataset_info.json", 50), "TFDS .*metadata"),
    "no features": (lambda d: (d / "features.json").unlink(), "TFDS .*metadata"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer.model"),
    "another tokenizer": (lambda d: train(TRAIN_TEXTS, 276, d / "tokenizer.model"), "its tokenizer .*tokenised"),
}


def shard(dataset: Path, number: int = 0) -> Path:
    return shard_path(dataset, NAME, "train", number, 3)


def change_table(dataset: Path, row: int, column: int) -> None:
    path = lengths_path(shard(dataset))
    table = np.load(path)
    table[row, column] ^= 1
    np.save(path, table)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(dataset, damage):
    spoil, said = DAMAGE[damage]
    assert plain(Records(dataset, "train")) == expected("train")
    spoil(dataset)
    assert re.search(said, refused(dataset))


def test_a_flipped_byte_is_noticed_or_changes_nothing(dataset):
    """In the shard's header, in its records, in what fills its blocks, and in its footer."""
    path = shard(dataset)
    content = path.read_bytes()
    messages = []
    used = [*range(0, 700, 23), *range(700, len(content), 9973), *range(len(content) - 300, len(content), 37)]
    for place in used:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            assert plain(Records(dataset, "train")) == expected("train")
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(message.startswith(f"{dataset}: ") and "\n" not in message for message in messages)


def test_no_dataset(tmp_path, written):
    with pytest.raises(ValueError, match="split valid: .*train, test, none"):
        Records(written, "valid")
    with pytest.raises(ValueError, match=f"{written}: .*none split .*empty"):
        Records(written, "none")
    assert re.search(r"no dataset: .*scripts/prepare_data\.py", refused(tmp_path))
    Builder(tmp_path / "begun", {})
    assert "not finished" in refused(tmp_path / "begun")


def test_a_dataset_goes_on_for_the_same_run_alone(tmp_path, tokenizer):
    def begin(setting=1, **more):
        return Builder(tmp_path / "out", {"setting": setting, "path": tmp_path, **more}, tokenizer)

    builder = begin()
    assert not builder.finished
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    builder.mark(0, ("a", 1), {"splits": {}})
    assert begin().marked(0, ("a", 1)) == {"key": ["a", 1], "splits": {}}
    assert begin().marked(0, ("a", 2)) is None  # other input
    assert begin().marked(1, ("a", 1)) is None
    with pytest.raises(ValueError, match="setting .* 1 .* 2 "):
        begin(2)
    with pytest.raises(ValueError, match='more .* null .* "x" '):
        begin(more="x")
    finished = write_dataset(tmp_path / "finished")
    assert Builder(finished, {"setting": 1}).finished
    with pytest.raises(ValueError, match="setting .* 1 .* 2 "):
        Builder(finished, {"setting": 2})


@pytest.mark.parametrize("name", ["mine.txt", ".hidden", "tokenizer.model", "dataset.json"])
def test_what_is_there_is_not_touched(tmp_path, tokenizer, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} exists.*unfinished"):
        Builder(tmp_path, {}, tokenizer)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_jobs_that_begin_at_once(tmp_path, tokenizer, monkeypatch):
    """Wherever another job stands in its beginning, this one goes on; the other's settings still count."""
    out = tmp_path / "out"
    write_json = builder_module.write_json

    def another_begins_in_the_middle(path, value):
        monkeypatch.setattr(builder_module, "write_json", write_json)
        assert path.name == "identity.json"
        Builder(out, {"setting": 1}, tokenizer)
        write_json(path, value)

    monkeypatch.setattr(builder_module, "write_json", another_begins_in_the_middle)
    Builder(out, {"setting": 1}, tokenizer)
    assert Tokenizer(out).fingerprint() == tokenizer.fingerprint()
    assert sorted(path.name for path in out.rglob("*")) == ["identity.json", "tokenizer.model", "units"]

    monkeypatch.setattr(builder_module, "write_json", lambda *_: 1 / 0)  # killed before it could say its settings
    with pytest.raises(ZeroDivisionError):
        Builder(tmp_path / "killed", {}, tokenizer)
    monkeypatch.undo()
    assert not Builder(tmp_path / "killed", {}, tokenizer).finished


def test_registering_twice_at_once_is_the_same(dataset):
    before = {path.name: path.read_bytes() for path in dataset.iterdir() if path.is_file()}
    builder = Builder(dataset, {"setting": 1})
    (dataset / ".things-train.array_record-00000-of-00003.99").write_text("of a process that was killed")
    marks = [builder.marked(number, [number]) for number in range(3)]
    builder.register(NAME, FEATURES, marks, {k: read_index(dataset)[k] for k in ("tokenizer", "more")})
    assert {path.name: path.read_bytes() for path in dataset.iterdir() if path.is_file()} == before


def test_a_mark_without_its_shard_is_not_registered(dataset):
    builder = Builder(dataset, {"setting": 1})
    (dataset / "dataset_info.json").unlink()
    cut(shard(dataset), 60)
    with pytest.raises(ValueError, match=" 60 bytes .*shard"):
        builder.register(NAME, FEATURES, [builder.marked(n, [n]) for n in range(3)], {})
    assert not builder.finished


def test_nothing_has_its_name_before_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path / "x", FEATURES)
    writer.write({"tokens": np.zeros(3, np.uint16), "name": "", "domain": ""}, "", 3)
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    facts = writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.lengths.npy"]
    assert facts["bytes"] == (tmp_path / "x").stat().st_size


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "x", FEATURES)

    class Full:
        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            raise RuntimeError("write() failed: No space left on device")

    writer._writer.close()
    writer._writer = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.write({"tokens": np.zeros(3, np.uint16), "name": "", "domain": ""}, "", 3)
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_ids_fit_their_type():
    assert [token_dtype(size) for size in (300, 65_536, 65_537, 128_256)] == [np.uint16] * 2 + [np.uint32] * 2


@pytest.mark.parametrize("name", ["tokenizer.json", "other.json", "llama.model"])
def test_the_tokenizer_is_copied_under_its_usual_name(tmp_path, tokenizer, name):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / name).write_bytes(b"content")
    (tmp_path / "from" / "tokenizer_config.json").write_text("{}")
    given = object.__new__(Tokenizer)
    given.path = tmp_path / "from" / name
    (tmp_path / "out").mkdir()
    copy_tokenizer(given, tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    usual = "tokenizer.model" if name.endswith(".model") else "tokenizer.json"
    assert found == {usual: b"content", "tokenizer_config.json": b"{}"}


def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch):
    """Readers keep their shards open: a thousand of them would meet the usual soft limit in the middle of training."""
    raised = []
    monkeypatch.setattr(records.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(records.resource, "setrlimit", lambda which, limits: raised.append((which, limits)))
    records.allow_open_files(700)
    assert not raised
    records.allow_open_files(1000)
    assert raised == [(resource.RLIMIT_NOFILE, (4096, 4096))]
    with pytest.raises(ValueError, match="4000 .* 4096 .*ulimit -Hn"):
        records.allow_open_files(4000)
