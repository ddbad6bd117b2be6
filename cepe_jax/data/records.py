"""Datasets of records: ArrayRecord shards that TFDS reads without TensorFlow, whole or refused.

A dataset is written unit by unit, by any number of processes. A unit gives one shard to each split; its mark in
`units/`, written last, says that these are whole. When all units have one, `register` writes the index
`dataset.json`, and after it the metadata by which TFDS knows a dataset. What has no such metadata is not read.
"""

import functools
import hashlib
import json
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cepe_jax.data.tokenizer import NAMES as TOKENIZER_NAMES
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.directories import refuse_another_run, staged_path

INDEX = "dataset.json"
TFDS_FILES = "features.json", "dataset_info.json"  # the second makes a directory a TFDS dataset
TOKENIZER_FILES = *TOKENIZER_NAMES, "tokenizer_config.json"


def array(dtype, *shape: int | None):
    """A TFDS feature that is stored as bytes: eleven times as fast to write as a list of numbers."""
    import tensorflow_datasets as tfds  # takes a quarter of a second: only what reads or writes records pays for it

    return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype).type, encoding="bytes")


def text():
    import tensorflow_datasets as tfds

    return tfds.features.Text()


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_json(path: Path, value) -> None:
    """`value` at `path`, whole or not at all."""
    staged = staged_path(path)
    staged.write_text(json.dumps(value, indent=1))
    staged.rename(path)


def shard_path(out: Path, name: str, split: str, number: int, count: int) -> Path:
    return out / f"{name}-{split}.array_record-{number:05}-of-{count:05}"


@contextmanager
def _writing() -> Iterator[None]:
    """OSError where the record format cannot write, such as on a full disk: it raises a bare RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


class ShardWriter:
    """Writes one shard; `close` gives its file the name `path`, and returns the facts that its unit's mark keeps."""

    def __init__(self, path: Path, features: dict):
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self.path, self.features = path, tfds.features.FeaturesDict(features)
        self._serializer = ExampleSerializer(self.features.get_serialized_info())
        self._staged = staged_path(path)
        self._writer = ArrayRecordWriter(str(self._staged), "group_size:1")  # any record is read by itself
        self._counts: dict[str, list[tuple[int, Sequence[int]]]] = {}
        self._lengths: list[tuple[str, int]] = []

    def write(self, record: dict, domain: str, length: int, pieces: Sequence[int] = ()) -> None:
        """Counts `length` tokens of the domain, and in its histogram `pieces`, the lengths of a record of several."""
        example = self._serializer.get_tf_example(self.features.encode_example(record))
        with _writing():
            self._writer.write(example.SerializeToString(deterministic=True))  # else each process has another order
        self._counts.setdefault(domain, []).append((length, pieces or (length,)))
        self._lengths.append((domain, length))

    def close(self) -> dict:
        with _writing():
            self._writer.close()
        with open(self._staged, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        domains = sorted(self._counts)
        numbers = {domain: number for number, domain in enumerate(domains)}
        table = np.array([(numbers[domain], length) for domain, length in self._lengths], np.int64).reshape(-1, 2)
        with open(f"{self._staged}.npy", "wb") as file:
            np.save(file, table)
        facts = {
            "records": len(self._lengths),
            "bytes": self._staged.stat().st_size,
            "sha256": digest,
            "domains": {domain: _counts(self._counts[domain]) for domain in domains},
        }
        Path(f"{self._staged}.npy").rename(lengths_path(self.path))
        self._staged.rename(self.path)
        return facts


def lengths_path(shard: Path) -> Path:
    """Where the domain (its place among the shard's) and the length of each of its records stand."""
    return shard.with_name(f"{shard.name}.lengths.npy")


def _counts(records: list[tuple[int, Sequence[int]]]) -> dict:
    """Exact counts, and the histogram: `histogram[b]` pieces have 2^(b-1) to 2^b - 1 tokens."""
    bins = np.bincount([piece.bit_length() for _, pieces in records for piece in pieces])
    return {"records": len(records), "tokens": sum(length for length, _ in records), "histogram": bins.tolist()}


def add_counts(all_counts) -> dict:
    """The counts of several parts of a dataset as those of the whole."""
    total = {"records": 0, "tokens": 0, "histogram": []}
    for counts in all_counts:
        total["records"] += counts["records"]
        total["tokens"] += counts["tokens"]
        wide = max(len(total["histogram"]), len(counts["histogram"]))
        padded = (h + [0] * (wide - len(h)) for h in (total["histogram"], counts["histogram"]))
        total["histogram"] = [a + b for a, b in zip(*padded, strict=True)]
    return total


class Builder:
    """The directory of a dataset that is being written: which of its units are finished, and its registration."""

    def __init__(self, out: Path, identity: dict, tokenizer: Tokenizer | None = None):
        """Begins the dataset or goes on with it; ValueError if `out` holds anything else.

        `identity` is what must be equal for a run to go on where another stopped. The tokenizer's files are copied.
        """
        identity = _plain(identity)
        self.out, self.units, self.identity = out, out / "units", identity
        stored = self.units / "identity.json"
        if self.finished:
            refuse_another_run(out, read_index(out)["identity"], identity)
            print(f"{out} is finished: remove it to make it again")
            return
        if not stored.exists():
            inside = {path.name for path in out.iterdir()} if out.exists() else set()
            begun = "units" in inside and inside <= {"units", *TOKENIZER_FILES}  # by a job now, or one that was killed
            if inside and not begun:
                raise ValueError(f"{out} exists and is no unfinished dataset: remove it or give another name")
            self.units.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, out, self.units)
            write_json(stored, identity)
        refuse_another_run(out, json.loads(stored.read_text()), identity)

    @property
    def finished(self) -> bool:
        return (self.out / TFDS_FILES[-1]).exists()

    def forget(self) -> None:
        """Another run may begin here: this one failed before its first unit."""
        (self.units / "identity.json").unlink()

    def mark(self, number: int, key, facts: dict) -> None:
        """Says that the unit is whole; `key` says of which input."""
        write_json(self.units / f"{number:05}.json", {"key": _plain(key)} | facts)

    def marked(self, number: int, key) -> dict | None:
        """What `mark` was given for the unit, if it was for the same input."""
        path = self.units / f"{number:05}.json"
        facts = json.loads(path.read_text()) if path.exists() else {"key": None}
        return facts if facts["key"] == _plain(key) else None

    def register(self, name: str, features: dict, marks: list[dict], facts: dict) -> None:
        """Makes the directory a dataset of the units with these marks, each of which has `splits`: {split: facts}.

        `facts` go into the index. Two processes that do it at once write the same bytes.
        """
        import tensorflow_datasets as tfds

        splits, infos = {}, []
        for split in marks[0]["splits"]:
            shards = [mark["splits"][split] for mark in marks]
            for number, shard in enumerate(shards):
                check_shard(shard_path(self.out, name, split, number, len(shards)), shard["bytes"])
            names = sorted({domain for shard in shards for domain in shard["domains"]})
            domains = {d: add_counts(s["domains"][d] for s in shards if d in s["domains"]) for d in names}
            splits[split] = add_counts(domains.values()) | {"domains": domains, "shards": shards}
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard["records"] for shard in shards],
                    num_bytes=sum(shard["bytes"] for shard in shards),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=self.out, dataset_name=name, split=split, filetype_suffix="array_record"
                    ),
                )
            )
        write_json(self.out / INDEX, {"name": name, "identity": self.identity} | facts | {"splits": splits})
        (self.out / "report.md").write_text(report(name, splits))
        staged = staged_path(self.units / "metadata")
        staged.mkdir(exist_ok=True)
        for split in splits:  # TFDS looks for the names of shards beside its metadata
            shard_path(staged, name, split, 0, len(marks)).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=staged,
            features=tfds.features.FeaturesDict(features),
            split_infos=infos,
            check_data=False,  # checking imports TensorFlow
        )
        for file in TFDS_FILES:
            (staged / file).rename(self.out / file)
        shutil.rmtree(staged)
        for left in self.out.glob(f".{name}-*"):  # of processes that were killed
            left.unlink(missing_ok=True)


def _plain(value):
    """`value` as JSON gives it back, dataclasses as objects and paths as text."""
    return json.loads(json.dumps(value, default=lambda v: str(v) if isinstance(v, Path) else vars(v)))


def report(name: str, splits: dict) -> str:
    """The counts as a table for people."""
    lines = [
        f"Records of {name}. The last column has tokens of a piece (a stretch of one document): how many pieces.",
        "",
        "| split | domain | records | tokens | lengths |",
        "|---|---|---|---|---|",
    ]
    for split, facts in splits.items():
        for domain, counts in [*facts["domains"].items(), ("all", facts)]:
            bins = [(1 << b >> 1, (1 << b) - 1, n) for b, n in enumerate(counts["histogram"]) if n]
            lengths = ", ".join(f"{low}-{high}: {n:,}" for low, high, n in bins)
            lines.append(f"| {split} | {domain} | {counts['records']:,} | {counts['tokens']:,} | {lengths} |")
    return "\n".join(lines) + "\n"


def copy_tokenizer(tokenizer: Tokenizer, out: Path, staging: Path) -> None:
    """The tokenizer's files in `out`, called what a directory's tokenizer is called; each of them whole."""
    settings = tokenizer.path.with_name("tokenizer_config.json")  # names the special tokens of a tokenizer.json
    name = "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"
    for source, target in ((settings, out / settings.name), (tokenizer.path, out / name)):
        if source.exists():
            staged = staged_path(staging / target.name)
            shutil.copy(source, staged)
            staged.rename(target)


def check_shard(path: Path, size: int) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the dataset is missing: bring it back, or prepare it again")
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path}: {found} bytes of a shard that has {size}: fetch it again, or prepare it again")


def read_index(path: Path) -> dict:
    """The facts of the dataset at `path`; FileNotFoundError where there is none, or none yet."""
    if not (path / TFDS_FILES[-1]).exists() or not (path / INDEX).exists():
        state = "not finished: run the command that writes it again" if (path / "units").exists() else "no dataset"
        raise FileNotFoundError(f"{path}: {state}: datasets are made with scripts/prepare_data.py")
    try:
        return json.loads((path / INDEX).read_text())
    except ValueError as error:
        raise ValueError(f"{path / INDEX} is damaged ({error}): prepare the dataset again") from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def allow_open_files(number: int) -> None:
    """Readers keep the shards open that they have read from: raises this process' limit of open files as far as it may.

    ValueError where that is not far enough.
    """
    needed = number + 256  # what else a process has open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ValueError(f"{number} shards, and {hard} files may be open: raise ulimit -Hn, or --unit_bytes")
    if needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@functools.lru_cache(maxsize=4)
def opened(path: Path, split: str, digest: str) -> "Records":
    """The records with this digest, opened once by a process that works on one unit after another."""
    records = Records(path, split)
    if records.digest != digest:
        raise ValueError(f"{path} has changed since this run began: start it again")
    return records


class Records:
    """One split of a dataset, a sequence of records; it can be sent to other processes.

    A record is a dict of arrays and bytes, as TFDS reads it. `index` is the content of dataset.json.
    """

    def __init__(self, path: Path, split: str):
        import tensorflow_datasets as tfds

        self.path, self.split, self.index = Path(path), split, read_index(Path(path))
        self.name = self.index["name"]
        if split not in self.index["splits"]:
            raise ValueError(f"{path}: has no split {split}: it has {', '.join(self.index['splits'])}")
        self.facts = self.index["splits"][split]
        if not self.facts["records"]:
            raise ValueError(f"{path}: its {split} split is empty")
        shards = self.facts["shards"]
        for number, shard in enumerate(shards):
            check_shard(shard_path(self.path, self.name, split, number, len(shards)), shard["bytes"])
        allow_open_files(len(shards))
        try:
            self._source = tfds.builder_from_directory(self.path).as_data_source(split)
        except Exception as error:  # whatever TFDS meets in a damaged file
            raise ValueError(f"{path}: TFDS cannot read its metadata ({_reason(error)}): prepare it again") from None
        if len(self._source) != self.facts["records"]:
            raise ValueError(
                f"{path}: TFDS counts {len(self._source)} records and {INDEX} {self.facts['records']}: prepare it again"
            )

    def __len__(self) -> int:
        return self.facts["records"]

    def __getitem__(self, number: int) -> dict:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        try:
            return self._source[number]
        except Exception as error:  # what the record format raises is a bare RuntimeError
            raise ValueError(f"{self.path}: record {number} of {self.split} is damaged ({_reason(error)})") from error

    def __iter__(self) -> Iterator[dict]:
        return (self[number] for number in range(len(self)))

    def lengths(self, shard: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Domain -> the numbers and the lengths, in tokens, of the shard's records that are of it."""
        shards = self.facts["shards"]
        path = lengths_path(shard_path(self.path, self.name, self.split, shard, len(shards)))
        try:
            table = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: missing or damaged ({error}): prepare {self.path} again") from None
        first = sum(before["records"] for before in shards[:shard])
        lengths, sound = {}, table.shape == (shards[shard]["records"], 2)
        for number, (domain, counts) in enumerate(shards[shard]["domains"].items() if sound else ()):
            rows = np.flatnonzero(table[:, 0] == number)
            lengths[domain] = first + rows, table[rows, 1]
            sound &= len(rows) == counts["records"] and table[rows, 1].sum() == counts["tokens"]
        if not sound:
            raise ValueError(f"{path}: is not of its shard, or damaged: prepare {self.path} again")
        return lengths

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; ValueError when the one beside them is another."""
        tokenizer = Tokenizer(self.path)
        if tokenizer.fingerprint() != self.index["tokenizer"]:
            raise ValueError(f"{self.path}: its tokenizer is not the one it was tokenised with: prepare it again")
        return tokenizer

    @property
    def digest(self) -> str:
        """Equal for splits with the same records in the same order."""
        return hashlib.sha256(" ".join(shard["sha256"] for shard in self.facts["shards"]).encode()).hexdigest()
