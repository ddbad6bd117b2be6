"""Near-duplicates among a dataset's documents, found by MinHash and left out (Broder, 1997).

The similarity of two documents is the Jaccard similarity of their sets of shingles (runs of tokens), as their
signatures estimate it. Signatures lie in files, 4 bytes for each permutation. In memory there is one band of them at a
time, the one thing that grows with the corpus: BYTES for each document.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from cepe_jax.data.builder import Builder, ShardWriter
from cepe_jax.data.corpus import NAME, Corpus, features_of
from cepe_jax.data.records import allow_open_files, opened, read_index, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.directories import staged
from cepe_jax.progress import track

SIGNATURES = "signatures"  # below `out`
KEPT = "kept.npy"  # among them: of all documents in order, which stay
ORDER = "test", "train", "retrieval"  # of near-duplicates the last ones go: none of a test is trained on
BYTES = 42  # a document: its band's hash, its place in the order of hashes, the first of its group, and sorting's share
BLOCK = 1 << 13  # shingles that are hashed at once, and pairs that are compared at once
LISTED = 100  # pairs in the report
ROUNDS = 16  # firsts of a group that its documents are compared with
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio: a product with it depends on every bit

Pair = tuple[int, int, float]  # a document that goes, the one that it nearly is, and their similarity


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig(JobConfig):
    data: epath.Path  # a dataset of documents
    out: Path  # gets the dataset of those that stay
    threshold: float = 0.8  # Jaccard similarity from which two documents are near-duplicates
    shingle: int = 5  # tokens of a shingle
    permutations: int = 128  # numbers of a signature

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}: give a similarity between 0 and 1")
        for name, least in ("shingle", 1), ("permutations", 16):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")


def import_datasketch():
    try:
        import datasketch
    except ImportError:
        raise ValueError("near-duplicates need datasketch: pip install '.[duplicates]' in the checkout") from None
    return datasketch


class Part(NamedTuple):
    """A shard of documents. Parts follow each other in the order of the comparison: the splits in ORDER."""

    split: str
    shard: int
    offset: int  # of its first document in the split
    first: int  # the number of its first document among all
    count: int  # documents


def parts_of(corpora: dict[str, Corpus]) -> list[Part]:
    parts, first = [], 0
    for split, corpus in corpora.items():
        offset = 0
        for shard, facts in enumerate(corpus.records.facts["shards"]):
            parts.append(Part(split, shard, offset, first, facts["records"]))
            offset, first = offset + facts["records"], first + facts["records"]
    return parts


def bands_of(config: DeduplicateConfig) -> list[slice]:
    """Return the bands, columns of signatures, that best tell pairs above the threshold from pairs below it.

    The last one is all columns: equal signatures agree there.
    """
    datasketch = import_datasketch()
    try:
        lsh = datasketch.MinHashLSH(config.threshold, config.permutations)
    except ValueError as error:
        values = f"threshold is {config.threshold}, and permutations {config.permutations} ({error})"
        raise ValueError(f"{values}: lower the first, or raise --permutations") from None
    return [slice(first, first + lsh.r) for first in range(0, lsh.b * lsh.r, lsh.r)] + [slice(config.permutations)]


@one_job
def deduplicate(config: DeduplicateConfig) -> None:
    """A dataset at `config.out` of the documents that are not nearly an earlier one."""
    bands = bands_of(config)
    index = read_index(config.data)
    corpora = {s: Corpus(config.data, s) for s in ORDER if s in index["splits"] and index["splits"][s]["records"]}
    parts, tokenizer = parts_of(corpora), next(iter(corpora.values())).tokenizer
    digests = {split: corpus.records.digest for split, corpus in corpora.items()}
    settings = config.identity("data", "out") | {"data": digests}
    builder = Builder(config.out, settings, tokenizer)
    if builder.finished:
        return
    of_signatures = {name: value for name, value in settings.items() if name != "threshold"}
    signing, sizes = Builder(config.out / SIGNATURES, of_signatures), [part.count for part in parts]
    if run_units(signing, parts, sizes, SignUnit(config, digests), config, "sign, documents") is None:
        return
    kept, pairs = find(Signatures([signature_path(config.out, part) for part in parts]), bands, config.threshold)
    for split, corpus in corpora.items():
        if not any(kept[part.first : part.first + part.count].any() for part in parts if part.split == split):
            builder.forget()  # the same signatures may do with another threshold
            raise ValueError(
                f"threshold is {config.threshold}, and all {len(corpus)} documents of split {split} are as near to "
                "earlier ones: raise it"
            )
    with staged(config.out / SIGNATURES / KEPT) as place, open(place, "wb") as file:
        np.save(file, kept)
    units = [(tuple(p for p in parts if p.shard == shard),) for shard in range(1 + max(p.shard for p in parts))]
    sizes = [sum(part.count for part in unit) for (unit,) in units]
    marks = run_units(builder, units, sizes, KeepUnit(config, digests, len(units)), config, "copy, documents")
    if marks is None:
        return
    facts = {"tokenizer": index["tokenizer"], "left_out": len(kept) - int(kept.sum())}
    builder.register(NAME, features_of(tokenizer), marks, facts, notes(corpora, parts, kept, pairs))


def signature_path(out: Path, part: Part) -> Path:
    return out / SIGNATURES / f"{part.split}-{part.shard:05}.npy"


def row_hashes(rows_NC: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each row (N,)."""
    hashes_N = np.zeros(len(rows_NC), np.uint64)
    for column_N in rows_NC.T:
        hashes_N = (hashes_N ^ column_N) * GOLDEN
        hashes_N ^= hashes_N >> np.uint64(32)
    return hashes_N


def shingles(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return a 32-bit hash of each run of `length` tokens; of a shorter document, of the whole."""
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), min(length, len(tokens)))
    return row_hashes(runs) & np.uint64(0xFFFFFFFF)


@functools.cache
def _empty_signature(permutations: int):
    return import_datasketch().MinHash(permutations, seed=1, hashfunc=int, scheme="affine32")


def signature(tokens: np.ndarray, config: DeduplicateConfig) -> np.ndarray:
    """Return the MinHash signature of a document (permutations,), uint32."""
    hashes, minima = shingles(tokens, config.shingle), _empty_signature(config.permutations).copy()
    for start in range(0, len(hashes), BLOCK):
        minima.update_batch(hashes[start : start + BLOCK])
    return minima.hashvalues


@dataclass(frozen=True)
class SignUnit:
    """The work on a shard of documents: their signatures, in a file."""

    config: DeduplicateConfig
    digests: dict[str, str]  # of the splits

    def __call__(self, number: int, *unit) -> Work:
        part = Part(*unit)
        records = opened(self.config.data, part.split, self.digests[part.split])
        rows = np.zeros((part.count, self.config.permutations), np.uint32)
        for row in range(part.count):
            tokens = records[part.offset + row]["tokens"]
            rows[row] = signature(tokens, self.config)
            yield 1, len(tokens)
        with staged(signature_path(self.config.out, part)) as place, open(place, "wb") as file:
            np.save(file, rows)
        return {}


class Signatures:
    """The signatures in several files, numbered through; they stay on disk."""

    def __init__(self, paths: Sequence[Path]):
        allow_open_files(len(paths))  # a mapped file stays open
        self.parts = [np.load(path, mmap_mode="r") for path in paths]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """Return the signatures with these numbers (n, permutations)."""
        files = np.searchsorted(self.ends, numbers, side="right")
        rows = np.zeros((len(numbers), self.parts[0].shape[1]), np.uint32)
        for file in np.unique(files):
            places = np.flatnonzero(files == file)
            part = self.parts[file]
            rows[places] = part[numbers[places] - (self.ends[file] - len(part))]
        return rows

    def band(self, columns: slice) -> np.ndarray:
        """Return a 64-bit hash of these columns of each signature."""
        hashes = np.zeros(len(self), np.uint64)
        for end, part in zip(self.ends, self.parts, strict=True):
            for start in range(0, len(part), BLOCK):
                rows = part[start : start + BLOCK, columns].astype(np.uint64)
                first = end - len(part) + start
                hashes[first : first + len(rows)] = row_hashes(rows)
        return hashes


def find(signatures: Signatures, bands: Sequence[slice], threshold: float) -> tuple[np.ndarray, list[Pair]]:
    """Return which documents stay (N,), bool, and the first pairs of those that do not.

    Documents are compared that agree in a band: each with the first of these, and those that are not near it with the
    first of them, up to ROUNDS times. A document goes if its similarity to an earlier one is the threshold or more,
    also if that one goes, too.
    """
    kept, pairs = np.ones(len(signatures), bool), []
    for band in track(bands, "compare, bands"):
        hashes = signatures.band(band)
        order = np.argsort(hashes, kind="stable")  # equal ones in order of their numbers
        begins = np.append(True, np.diff(hashes[order]) != 0)
        del hashes
        for _ in range(ROUNDS):
            places = np.flatnonzero(~begins)
            if not len(places):
                break
            heads = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))[places]
            later, firsts = order[places], order[heads]
            near = np.zeros(len(later), bool)
            for start in range(0, len(later), BLOCK):
                some, them = later[start : start + BLOCK], firsts[start : start + BLOCK]
                similar = (signatures[some] == signatures[them]).mean(axis=1)
                near[start : start + BLOCK] = similar >= threshold
                new = (similar >= threshold) & kept[some]
                kept[some[new]] = False
                room = max(LISTED - len(pairs), 0)
                rows = (column[new][:room].tolist() for column in (some, them, similar))
                pairs += zip(*rows, strict=True)
            # Those that are not near stay in the band, in the same groups without their firsts.
            order, heads = later[~near], heads[~near]
            begins = np.append(True, np.diff(heads) != 0)[: len(order)]
    return kept, pairs


@dataclass(frozen=True)
class KeepUnit:
    """The work on the shards with one number: those of their documents that stay, in a shard of each split."""

    config: DeduplicateConfig
    digests: dict[str, str]
    num_units: int

    def __call__(self, number: int, parts: Sequence[Part]) -> Work:
        config, splits = self.config, {}
        kept = np.load(config.out / SIGNATURES / KEPT, mmap_mode="r")
        for part in parts:
            records = opened(config.data, part.split, self.digests[part.split])
            path = shard_path(config.out, NAME, part.split, number, self.num_units)
            writer = ShardWriter(path, features_of(records.tokenizer))
            for row in range(part.count):
                if kept[part.first + row]:
                    record = records[part.offset + row]
                    writer.write(record, record["domain"], len(record["tokens"]))
                yield 1, 0
            splits[part.split] = writer.close()
        return {"splits": splits}


def notes(corpora: dict[str, Corpus], parts: Sequence[Part], kept: np.ndarray, pairs: Sequence[Pair]) -> str:
    """Return which documents were left out, as tables for people."""

    def name_of(number: int) -> str:
        part = next(part for part in parts if part.first <= number < part.first + part.count)
        return f"{part.split}: {corpora[part.split][part.offset + number - part.first].name}"

    lines = ["", "Near-duplicates that were left out.", "", "| split | documents | left out |", "|---|---|---|"]
    for split, corpus in corpora.items():
        stay = sum(int(kept[part.first : part.first + part.count].sum()) for part in parts if part.split == split)
        lines.append(f"| {split} | {len(corpus):,} | {len(corpus) - stay:,} |")
    lines += ["", f"The first {len(pairs)} pairs.", "", "| left out | nearly | similarity |", "|---|---|---|"]
    lines += [f"| {name_of(one)} | {name_of(other)} | {similarity:.2f} |" for one, other, similarity in pairs]
    return "\n".join(lines) + "\n"
