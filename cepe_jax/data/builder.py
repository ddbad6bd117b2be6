"""Writing datasets of records: ArrayRecord shards in TFDS's serialisation, unit by unit, by any number of processes.

A unit gives one shard to each split; its mark in `units/`, written last, says that these are whole. When all units have
one, `register` writes the index `dataset.json`, and after it the metadata by which TFDS knows a dataset. What has no
such metadata is not read.
"""

import hashlib
import io
import logging
import tempfile
from array import array as Numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

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
from cepe_jax.data.tokenizer_files import BESIDE, TEMPLATE, TOKENIZER_FILES
from cepe_jax.directories import (
    Place,
    is_a_writers,
    is_remote,
    size_of,
    staged_path,
    write_bytes,
    write_json,
    write_text,
)
from cepe_jax.identity import as_json, refuse_another_run
from cepe_jax.parsing import read_json, typed

log = logging.getLogger(__name__)


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

    def __init__(self, path: Place, features: dict):
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self.path, self.features = path, tfds.features.FeaturesDict(features)
        self._scratch = tempfile.TemporaryDirectory() if is_remote(path) else None  # the format writes here alone
        self._serializer = ExampleSerializer(self.features.get_serialized_info())
        self._staged = Path(self._scratch.name) / "shard" if self._scratch else staged_path(path)
        self._writer = ArrayRecordWriter(str(self._staged), "group_size:1")  # any record is read by itself
        self._counts: dict[str, _Counts] = {}
        self._table = Numbers("q")  # two for each record: its domain's place among the `_counts`, and its length

    def write(self, record: dict, domain: str, length: int, pieces: Sequence[int] = ()) -> None:
        """Counts `length` tokens of the domain, and in its histogram `pieces`, the lengths of a record of several."""
        example = self._serializer.get_tf_example(self.features.encode_example(record))
        with _writing():
            self._writer.write(example.SerializeToString(deterministic=True))  # else each process has another order
        counts = self._counts.setdefault(domain, _Counts(len(self._counts)))
        counts.records += 1
        counts.tokens += length
        counts.bins.update(piece.bit_length() for piece in pieces or (length,))
        self._table.extend((counts.place, length))

    def close(self) -> dict:
        with _writing():
            self._writer.close()
        digest = _sha256(self._staged)
        domains, table = sorted(self._counts), np.array(self._table, np.int64).reshape(-1, 2)
        places = [self._counts[domain].place for domain in domains]
        table[:, 0] = np.argsort(places)[table[:, 0]]  # in the shard's facts domains are in order
        file = io.BytesIO()
        np.save(file, table)
        write_bytes(lengths_path(self.path), file.getvalue())
        facts = {
            "records": len(table),
            "bytes": size_of(self._staged),
            "sha256": digest,
            "domains": {domain: self._counts[domain].facts for domain in domains},
        }
        if self._scratch:
            epath.Path(self._staged).copy(self.path, overwrite=True)
            self._scratch.cleanup()
        else:
            self._staged.rename(self.path)
        return facts


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class _Counts:
    """Exact counts of a domain's records."""

    place: int  # of the domain among those of the shard, in order of their first records
    records: int = 0
    tokens: int = 0
    bins: Counter[int] = field(default_factory=Counter)

    @property
    def facts(self) -> dict:
        """The counts as the index has them: `histogram[b]` pieces have 2^(b-1) to 2^b - 1 tokens."""
        histogram = [self.bins[b] for b in range(max(self.bins) + 1)]
        return {"records": self.records, "tokens": self.tokens, "histogram": histogram}


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


def mark_name(unit: int) -> str:
    return f"{unit:05}.json"


class Builder:
    """The directory of a dataset that is being written: which of its units are finished, and its registration."""

    def __init__(self, out: Place, identity: dict, tokenizer: Tokenizer | None = None, template: str = ""):
        """Begins the dataset or goes on with it; ValueError if `out` holds anything else.

        `identity` is what must be equal for a run to go on where another stopped. The tokenizer's files are copied,
        with this chat template in place of its own, if there is one.
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
            others = inside - {"units", *TOKENIZER_FILES}
            # By a job now, or one that was killed; other directories of units are steps before the last one.
            begun = "units" in inside and all((out / name / "units").is_dir() for name in others)
            if inside and not begun:
                raise ValueError(f"{out} exists and is no unfinished dataset: remove it or give another name")
            self.units.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, out, template)
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
        write_json(self.units / mark_name(number), facts | {"sha256": digest_of(facts)})

    def marked(self, number: int, key) -> dict | None:
        """Return what `mark` was given for the unit, if it was for the same input.

        A mark that is not as it was written counts for nothing.
        """
        path = self.units / mark_name(number)
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
                again = f"remove {self.units / mark_name(number)}, and run it again"
                if not is_remote(path) and _sha256(path) != shard["sha256"]:  # a bucket compares what it is sent
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
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            for split in splits:  # TFDS looks for the names of shards beside its metadata
                shard_path(place, name, split, 0, len(marks)).touch()
            tfds.folder_dataset.write_metadata(
                data_dir=place,
                features=tfds.features.FeaturesDict(features),
                split_infos=infos,
                check_data=False,  # checking imports TensorFlow
            )
            for file in TFDS_FILES:
                write_bytes(self.out / file, (place / file).read_bytes())
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


def copy_tokenizer(tokenizer: Tokenizer, out: Place, template: str = "") -> None:
    """Write the tokenizer's files in `out`, called what a directory's tokenizer is called; each of them whole.

    `template` is the text of a chat template that takes the place of its own.
    """
    name = "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"
    if template:
        write_text(out / TEMPLATE, template)
    others = BESIDE if template else (*BESIDE, TEMPLATE)
    beside = [(tokenizer.path.with_name(other), out / other) for other in others]
    for source, target in (*beside, (tokenizer.path, out / name)):
        if source.exists():
            write_bytes(target, source.read_bytes())
