"""Reading datasets of records through TFDS, without TensorFlow: any record by its number, or a refusal."""

import bisect
import functools
import hashlib
import io
import itertools
import json
import resource
from collections.abc import Iterator
from tokenize import TokenError
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_files import TOKENIZER_FILES
from cepe_jax.directories import Place, beside, copy_once, is_remote, local_directory, place, relative_to, size_of
from cepe_jax.parsing import read_json, typed

Record = dict[str, np.ndarray | str]
DATASET = "dataset.json"  # our facts of a dataset
CONVERSATIONS, PREFERENCES = "conversations", "preferences"  # the names of datasets of them
CORESET = "coreset"  # the name of a dataset of numbers of another one's records, which are read in their place
TFDS_FILES = "features.json", "dataset_info.json"  # the second makes a directory a TFDS dataset

AGAIN = "prepare the dataset again"
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]  # tokens


class Counts(TypedDict):
    records: Count
    tokens: Count
    histogram: list[Count]


class Shard(TypedDict):
    records: Count
    bytes: Count
    sha256: str
    domains: dict[str, Counts]


class Split(Counts):
    domains: dict[str, Counts]
    shards: list[Shard]


class Joins(TypedDict):
    """The split of another dataset, to whose records those of this one belong: one to each, or some to be selected."""

    path: str  # relative to this dataset
    split: str
    digest: str


class Index(TypedDict):
    """The facts of a dataset that this package reads; those who write one may add others."""

    name: str
    identity: dict[str, Any]
    tokenizer: str
    splits: dict[str, Split]
    joins: NotRequired[Joins]
    selects: NotRequired[Joins]
    sources: NotRequired[str]
    length: NotRequired[Size]
    passage_length: NotRequired[Size]
    query_tokens: NotRequired[Size]
    window: NotRequired[Size]
    context: NotRequired[Count]
    top_k: NotRequired[Size]


def shard_path(out: Place, name: str, split: str, number: int, count: int) -> Place:
    return out / f"{name}-{split}.array_record-{number:05}-of-{count:05}"


def lengths_path(shard: Place) -> Place:
    """Return the file with the domain (its place among the shard's) and the length of each record of the shard."""
    return shard.with_name(f"{shard.name}.lengths.npy")


def check_shard(path: Place, size: int) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the dataset is missing: bring it back, or prepare it again")
    if (found := size_of(path)) != size:
        raise ValueError(f"{path}: {found} bytes of a shard that has {size}: fetch it again, or prepare it again")


def read_lengths(path: Place, shard: Shard, mend: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Domain -> which of a shard's records are of it, and their lengths; ValueError unless its counts are theirs."""
    try:
        table = np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy parses the header as Python
        raise ValueError(f"{path}: missing or damaged ({error}): {mend}") from None
    lengths, sound = {}, table.shape == (shard["records"], 2)
    for number, (domain, counts) in enumerate(shard["domains"].items() if sound else ()):
        rows = np.flatnonzero(table[:, 0] == number)
        lengths[domain] = rows, table[rows, 1]
        sound &= len(rows) == counts["records"] and table[rows, 1].sum() == counts["tokens"]
    if not sound:
        raise ValueError(f"{path}: is not of its shard, or damaged: {mend}")
    return lengths


class NoDataset(FileNotFoundError):
    """There is no dataset, or it is not finished."""


def is_dataset(path: Place) -> bool:
    """Return whether a dataset is at `path`, finished or not."""
    return (path / DATASET).exists() or (path / "units").exists()


def read_index(path: Place) -> Index:
    """Return the facts of the dataset at `path`; NoDataset where there is none, or none yet."""
    if not (path / TFDS_FILES[-1]).exists() or not (path / DATASET).exists():
        state = "not finished: run the command that writes it again" if (path / "units").exists() else "no dataset"
        raise NoDataset(f"{path}: {state}: datasets are made with scripts/prepare_data.py")
    place = path / DATASET
    facts = read_json(place, mend=AGAIN)
    digest = facts.pop("sha256", None)  # datasets of earlier versions have none
    index = facts | typed(facts, Index, str(place), AGAIN)
    if digest not in (None, digest_of(facts)):
        raise ValueError(f"{place} is not what was written, its sha256 differs from the stored one: {AGAIN}")
    for name, split in index["splits"].items():
        if "length" in index and split["tokens"] != index["length"] * split["records"]:
            held = f"{split['records']} sequences of {index['length']} tokens, and {split['tokens']} tokens in all"
            raise ValueError(f"{place}: {name} has {held}: {AGAIN}")
    return index


def digest_of(facts: dict) -> str:
    """Return the digest of facts, which is stored among them as `sha256`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _of_the_process(error: Exception) -> bool:
    """Return True for an error that sound files meet too, where memory or open files run out."""
    return isinstance(error, MemoryError | ImportError | OSError) and not isinstance(error, FileNotFoundError)


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
def opened(path: Place, split: str, digest: str) -> "Records":
    """The records with this digest, opened once by a process that works on one unit after another."""
    records = Records(path, split)
    if records.digest != digest:
        raise ValueError(f"{path} has changed since this run began: start it again")
    return records


class Records:
    """One split of a dataset, a sequence of records; it can be sent to other processes.

    `index` is the content of dataset.json. A shard in a bucket is copied to this machine, whole, when the first of its
    records is read.
    """

    def __init__(self, path: Place, split: str):
        import tensorflow_datasets as tfds

        self.path, self.split = place(path), split
        self.index = read_index(self.path)
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
        self._here = self.path
        if is_remote(self.path):
            self._here = local_directory(digest_of(self.index))
            for name in (*TFDS_FILES, *(name for name in TOKENIZER_FILES if (self.path / name).exists())):
                copy_once(self.path / name, self._here / name)
        self._ends = list(itertools.accumulate(shard["records"] for shard in shards))
        try:
            self._source = tfds.builder_from_directory(self._here).as_data_source(split)
        except Exception as error:  # whatever TFDS meets in a damaged file
            if _of_the_process(error):
                raise
            raise ValueError(f"{path}: TFDS cannot read its metadata ({_reason(error)}): prepare it again") from None
        if len(self._source) != self.facts["records"]:
            raise ValueError(
                f"{path}: TFDS counts {len(self._source)} records, {DATASET} {self.facts['records']}: prepare it again"
            )

    def __len__(self) -> int:
        return self.facts["records"]

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        if is_remote(self.path):
            self._bring(bisect.bisect_right(self._ends, number))
        try:
            fields = self._source[number]
            return {key: value.decode() if isinstance(value, bytes) else value for key, value in fields.items()}
        except Exception as error:  # what the record format raises is a bare RuntimeError
            if _of_the_process(error):
                raise
            raise ValueError(f"{self.path}: record {number} of {self.split} is damaged ({_reason(error)})") from error

    def _bring(self, shard: int) -> None:
        """Copy a shard to this machine, unless it is there."""
        path = shard_path(self.path, self.name, self.split, shard, len(self._ends))
        copy_once(path, self._here / path.name)

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def lengths(self, shard: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Domain -> the numbers and the lengths, in tokens, of the shard's records that are of it."""
        shards = self.facts["shards"]
        path = lengths_path(shard_path(self.path, self.name, self.split, shard, len(shards)))
        first = sum(before["records"] for before in shards[:shard])
        found = read_lengths(path, shards[shard], f"prepare {self.path} again")
        return {domain: (first + rows, lengths) for domain, (rows, lengths) in found.items()}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; ValueError when the one beside them is another."""
        tokenizer = Tokenizer(self._here)
        if tokenizer.fingerprint() != self.index["tokenizer"]:
            raise ValueError(f"{self.path}: its tokenizer is not the one it was tokenised with: prepare it again")
        return tokenizer

    def fact(self, name: str) -> Any:
        """Return what the index says of `name`; ValueError if nothing, as in datasets of earlier versions."""
        if name not in self.index:
            raise ValueError(f"{self.path / DATASET} has no {name}: {AGAIN}")
        return self.index[name]

    @property
    def digest(self) -> str:
        """Equal for splits with the same records in the same order."""
        return hashlib.sha256(" ".join(shard["sha256"] for shard in self.facts["shards"]).encode()).hexdigest()


def joins(records: Records, out: Place) -> Joins:
    """Return what the index at `out` says of these records, if each of its own belongs to one of them."""
    return {"path": relative_to(records.path, out), "split": records.split, "digest": records.digest}


def open_joined(path: Place, split: str) -> tuple[Records, Records | None]:
    """Return the records at `path`; of a dataset that joins another, that one's, and its own.

    ValueError if it was made for others than those that are there.
    """
    joined = Records(path, split)
    if not (where := joined.index.get("joins")):
        return joined, None
    records = Records(beside(path, where["path"]), where["split"])
    if where["digest"] != records.digest or len(joined) != len(records):
        raise ValueError(
            f"{path} does not join {records.path}: it has {len(joined)} records for others than the "
            f"{len(records)} there: make it again"
        )
    return records, joined
