"""Writing datasets of records: ArrayRecord shards in TFDS's serialisation, unit by unit, by any number of processes.

A unit gives one shard to each split; its mark in `units/`, written last, says that these are whole. When all units have
one, `register` writes the index `dataset.json`, and after it the metadata by which TFDS knows a dataset. What has no
such metadata is not read.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cepe_jax.data.records import (
    DATASET,
    TFDS_FILES,
    check_shard,
    digest_of,
    lengths_path,
    read_index,
    read_lengths,
    shard_path,
)
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_files import BESIDE, NAMES, TEMPLATE
from cepe_jax.directories import is_a_writers, staged, staged_directory, staged_path, write_json, write_text
from cepe_jax.identity import as_json, refuse_another_run
from cepe_jax.parsing import read_json, typed

log = logging.getLogger(__name__)

TOKENIZER_FILES = *NAMES, *BESIDE, TEMPLATE


def array(dtype, *shape: int | None):
    """A TFDS feature that is stored as bytes: eleven times as fast to write as a list of numbers."""
    import tensorflow_datasets as tfds  # takes a quarter of a second: only what reads or writes records pays for it

    return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype).type, encoding="bytes")


def text():
    import tensorflow_datasets as tfds

    return tfds.features.Text()


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


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
        digest = _sha256(self._staged)
        domains = sorted(self._counts)
        numbers = {domain: number for number, domain in enumerate(domains)}
        table = np.array([(numbers[domain], length) for domain, length in self._lengths], np.int64).reshape(-1, 2)
        lengths = lengths_path(self.path)
        with staged(lengths) as place, open(place, "wb") as file:
            np.save(file, table)
        facts = {
            "records": len(self._lengths),
            "bytes": self._staged.stat().st_size,
            "sha256": digest,
            "domains": {domain: _counts(self._counts[domain]) for domain in domains},
        }
        self._staged.rename(self.path)
        return facts


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        identity = as_json(identity)
        self.out, self.units, self.identity = out, out / "units", identity
        stored = self.units / "identity.json"
        if self.finished:
            refuse_another_run(out, read_index(out)["identity"], identity)
            log.info("%s is finished: remove it to make it again", out)
            return
        if not stored.exists():
            inside = {path.name for path in out.iterdir() if not is_a_writers(path)} if out.exists() else set()
            begun = "units" in inside and inside <= {"units", *TOKENIZER_FILES}  # by a job now, or one that was killed
            if inside and not begun:
                raise ValueError(f"{out} exists and is no unfinished dataset: remove it or give another name")
            self.units.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, out, self.units)
            write_json(stored, identity)
        refuse_another_run(out, read_json(stored, mend=f"remove {out}"), identity)
        if tokenizer is not None and Tokenizer(out).fingerprint() != tokenizer.fingerprint():
            raise ValueError(f"{out}: its tokenizer is not {tokenizer.path}, of which it is a copy: remove {out}")

    @property
    def finished(self) -> bool:
        return (self.out / TFDS_FILES[-1]).exists()

    def forget(self) -> None:
        """Another run may begin here, with another tokenizer: this one failed before its first unit."""
        for name in TOKENIZER_FILES:
            (self.out / name).unlink(missing_ok=True)
        (self.units / "identity.json").unlink()

    def mark(self, number: int, key, facts: dict) -> None:
        """Says that the unit is whole; `key` says of which input."""
        facts = as_json({"key": key} | facts)
        write_json(self.units / f"{number:05}.json", facts | {"sha256": digest_of(facts)})

    def marked(self, number: int, key) -> dict | None:
        """Return what `mark` was given for the unit, if it was for the same input.

        A mark that is not as it was written counts for nothing.
        """
        path = self.units / f"{number:05}.json"
        if not path.exists():
            return None
        try:
            facts = typed(read_json(path), dict[str, Any], str(path))
        except ValueError:
            facts = {}
        if facts.pop("sha256", "") != digest_of(facts):
            log.warning("%s is damaged or of an earlier version: its unit is done again", path)
            return None
        return facts if facts["key"] == as_json(key) else None

    def register(self, name: str, features: dict, marks: list[dict], facts: dict, notes: str = "") -> None:
        """Makes the directory a dataset of the units with these marks, each of which has `splits`: {split: facts}.

        `facts` go into the index, `notes` to the report's end. Two processes that do it at once write the same bytes.
        """
        import tensorflow_datasets as tfds

        splits, infos = {}, []
        for split in marks[0]["splits"]:
            shards = [mark["splits"][split] for mark in marks]
            for number, shard in enumerate(shards):
                path = shard_path(self.out, name, split, number, len(shards))
                check_shard(path, shard["bytes"])
                again = f"remove {self.units / f'{number:05}.json'}, and run it again"
                if _sha256(path) != shard["sha256"]:
                    raise ValueError(f"{path} is not what was written: {again}")
                read_lengths(lengths_path(path), shard, again)
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
        index = {"name": name, "identity": self.identity} | facts | {"splits": splits}
        write_json(self.out / DATASET, index | {"sha256": digest_of(index)})
        write_text(self.out / "report.md", report(name, splits) + notes)
        with staged_directory(self.units / "metadata") as place:
            for split in splits:  # TFDS looks for the names of shards beside its metadata
                shard_path(place, name, split, 0, len(marks)).touch()
            tfds.folder_dataset.write_metadata(
                data_dir=place,
                features=tfds.features.FeaturesDict(features),
                split_infos=infos,
                check_data=False,  # checking imports TensorFlow
            )
            for file in TFDS_FILES:
                (place / file).rename(self.out / file)
        for left in self.out.glob(f".{name}-*"):  # of processes that were killed
            left.unlink(missing_ok=True)


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
    name = "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"
    beside = [(tokenizer.path.with_name(other), out / other) for other in (*BESIDE, TEMPLATE)]
    for source, target in (*beside, (tokenizer.path, out / name)):
        if source.exists():
            place = staged_path(staging / target.name)
            shutil.copy(source, place)
            place.rename(target)
