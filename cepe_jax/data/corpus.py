"""Raw documents to tokenised ones: a dataset of documents, split by document."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from etils import epath

from cepe_jax.data.builder import Builder, ShardWriter, array, text, token_dtype
from cepe_jax.data.examples import Document
from cepe_jax.data.records import Records, read_index, shard_path
from cepe_jax.data.sources import Extent, holds_lines, plan, read, text_of
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer, file_in, opened_tokenizer
from cepe_jax.data.tokenizer_training import train, training_pieces
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.directories import Place, is_remote
from cepe_jax.parsing import Seed

log = logging.getLogger(__name__)

NAME = "documents"
SPLITS = ("train", "test", "retrieval")
TOKENIZER_TEXT = 1 << 27  # characters a tokenizer is trained on at most, the same number from each unit
LISTED_FAULTS = 100  # of a unit; the others are counted
HOPELESS = 1000  # documents


@dataclass(frozen=True, kw_only=True)
class RawConfig(JobConfig):
    """Raw files, and their division into units and splits."""

    input: epath.Path  # a directory of raw files
    out: epath.Path  # gets the dataset; an unfinished one is completed
    patterns: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")  # files below `input`
    exclude: tuple[str, ...] = ()  # files below a folder of one of these names are left out
    domain_field: str = ""  # the domain in a line of JSON, such as meta.source; "": the first folder below `input`
    bad_share: float = 0.001  # share of documents that may be unreadable or empty; more are an error
    test_fraction: float = 0.01  # share of documents for evaluation
    unit_bytes: int = 1 << 28  # stored bytes of a unit of work, which gives a shard to each split
    seed: Seed = 0  # draws the documents of each split

    skip_shorter: ClassVar[int] = 0
    retrieval_fraction: ClassVar[float] = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("test_fraction", "retrieval_fraction", "bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        if not self.test_fraction:
            raise ValueError("test_fraction is 0: there would be nothing to evaluate on")
        if self.test_fraction + self.retrieval_fraction >= 1:
            raise ValueError(
                f"test_fraction {self.test_fraction} and retrieval_fraction {self.retrieval_fraction} leave nothing to "
                "train on"
            )
        if self.out.resolve() == self.input.resolve():
            raise ValueError(f"out is the input, {self.out}: give another directory")
        if self.unit_bytes < 1:
            raise ValueError(f"unit_bytes is {self.unit_bytes}: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(RawConfig):
    patterns: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.txt")  # files below `input`
    tokenizer: str = ""  # its file or directory; "": one is trained on the training split
    vocab_size: int = 2048  # pieces of a tokenizer that is trained
    skip_shorter: int = 0  # characters; shorter documents are counted and left out
    retrieval_fraction: float = 0.5  # share of documents for retrieval

    def __post_init__(self):
        super().__post_init__()
        if not self.tokenizer and self.shard != JobConfig.shard:
            raise ValueError("several jobs need one tokenizer: train it first, and give it with --tokenizer")
        if not self.tokenizer and is_remote(self.out):
            raise ValueError(f"out is {self.out}: train a tokenizer first, and give it with --tokenizer")


def split_of(key: str, config: RawConfig) -> str:
    """The split of a document: a function of its key and the seed, so it stays when others come and go.

    The key is the name of a file that is one document, and the text of a line: copies of it share a split.
    """
    digest = hashlib.sha256(f"{config.seed}:".encode())
    digest.update(key.encode())
    draw = int.from_bytes(digest.digest()[:8], "big") / 2**64
    if draw < config.test_fraction:
        return "test"
    return "retrieval" if draw >= 1 - config.retrieval_fraction else "train"


def documents_of(
    config: RawConfig, unit: list[Extent], counts: dict, content: Callable[..., str] = text_of
) -> Iterator[tuple[str, str, str, str]]:
    """(split, name, domain, text) of the unit's documents; `counts` gets what was left out. `content`: see `read`.

    ValueError where the unit begins with HOPELESS bad ones and not one good. Whether `bad_share` of all documents are
    bad, only the whole can tell.
    """
    for extent in unit:
        for document in read(config.input, extent, config.domain_field, content):
            counts["documents"] += 1
            if document.text is not None and len(document.text) < config.skip_shorter:
                counts["skipped"] += 1
            elif document.fault:
                count_bad(document.fault, counts, config)
            else:
                key = document.text if holds_lines(extent.path) else document.name
                yield split_of(key, config), document.name, document.domain, document.text


def count_bad(fault: str, counts: dict, config: RawConfig) -> None:
    """Count a document that is left out; ValueError where the first HOPELESS all are."""
    counts["bad"] += 1
    if len(counts["faults"]) < LISTED_FAULTS:
        counts["faults"].append(fault)
    if counts["bad"] == counts["documents"] == HOPELESS:
        check_share(counts, config)  # such as another name for the text: not after hours of useless work


def no_counts() -> dict:
    return {"documents": 0, "skipped": 0, "bad": 0, "faults": []}


def check_share(counts: dict, config: RawConfig) -> None:
    if counts["bad"] > config.bad_share * counts["documents"]:
        raise ValueError(
            f"{counts['bad']} of {counts['documents']} documents are bad, more than --bad_share={config.bad_share} "
            f"of them, the first at {counts['faults'][0]}"
        )


@one_job
def prepare(config: PrepareConfig) -> None:
    """A dataset of documents at `config.out`: a document is BOS, its tokens, EOS. Whole, or not a dataset yet.

    Units that are finished already, by this job or another, are not done again.
    """
    given = Tokenizer(config.tokenizer) if config.tokenizer else None
    build(config, given, NAME, SPLITS, features_of, TokeniseUnit)


def build(
    config: RawConfig,
    given: Tokenizer | None,
    name: str,
    splits: tuple[str, ...],
    features: Callable[[Tokenizer], dict],
    work_on: Callable[[RawConfig, int], Callable[..., Work]],
    template: Template | None = None,
) -> None:
    """The dataset `name` of raw files at `config.out`, unit by unit; without a tokenizer one is trained first.

    `work_on(config, units)` is the work on a unit, whose mark has the counts of `no_counts` and of each split.
    `template` is the chat template, if one writes the texts; the dataset has it.
    """
    units = plan(config.input, config.patterns, config.exclude, config.unit_bytes, config.out)
    settings = config.identity("input", "out", "bad_share")
    settings["tokenizer"] = given.fingerprint() if given else ""
    settings["input"] = f"{len(units)} units"  # their number is in the names of all shards
    settings |= {"template": template.digest} if template else {}
    builder = Builder(config.out, settings, given, template.source if template else "")
    sources = hashlib.sha256(repr(units).encode()).hexdigest()
    if builder.finished:
        if read_index(config.out)["sources"] != sources:
            raise ValueError(f"{config.out} is finished, of other files than {config.input} holds: give another --out")
        return
    if not given and file_in(config.out) is None:
        try:
            train_tokenizer(config, units)
        except BaseException:
            builder.forget()
            raise
    tokenizer = Tokenizer(config.out)
    sizes = [sum(extent.size for extent in unit) for unit in units]
    work = work_on(config, len(units))
    marks = run_units(builder, [(unit,) for unit in units], sizes, work, config, "tokenise, bytes")
    if marks is None:
        return
    if {mark["tokenizer"] for mark in marks} != {tokenizer.fingerprint()}:
        raise ValueError(f"{config.out}: its tokenizer has changed since the first unit: remove {config.out}")
    counts = {count: sum(mark[count] for mark in marks) for count in ("documents", "skipped", "bad")}
    counts["faults"] = [fault for mark in marks for fault in mark["faults"]]
    for fault in counts["faults"]:
        log.warning("left out: %s", fault)
    check_share(counts, config)
    for split in ("train", "test"):
        if not any(mark["splits"][split]["records"] for mark in marks):
            raise ValueError(
                f"no document fell into the {split} split: change --test_fraction {config.test_fraction}, or --patterns"
            )
    facts = {"tokenizer": tokenizer.fingerprint(), "counts": counts, "sources": sources}
    builder.register(name, features(tokenizer), marks, facts)


def train_tokenizer(config: PrepareConfig, units: list[list[Extent]]) -> None:
    """Puts a tokenizer in `config.out`, trained on documents of the training split, some of each unit."""

    def texts() -> Iterator[str]:
        for unit in units:
            room = TOKENIZER_TEXT // len(units)
            for split, _, _, content in documents_of(config, unit, no_counts()):
                if split == "train" and room > 0:
                    yield from training_pieces(content[:room])
                    room -= len(content)
                if room <= 0:
                    break

    log.info("training a tokenizer of %d pieces", config.vocab_size)
    train(texts(), config.vocab_size, config.out / "tokenizer.model")


def features_of(tokenizer: Tokenizer) -> dict:
    return {"tokens": array(token_dtype(tokenizer.vocab_size), None), "name": text(), "domain": text()}


@dataclass(frozen=True)
class TokeniseUnit:
    """The work on a unit: its documents, tokenised, in a shard of each split."""

    config: PrepareConfig
    num_units: int

    def __call__(self, number: int, unit: list[Extent]) -> Work:
        tokenizer = opened_tokenizer(self.config.out)
        features, dtype = features_of(tokenizer), token_dtype(tokenizer.vocab_size)
        shards = {
            split: ShardWriter(shard_path(self.config.out, NAME, split, number, self.num_units), features)
            for split in SPLITS
        }
        counts = no_counts()
        for extent in unit:
            seen = 0.0
            for split, name, domain, content in documents_of(self.config, [extent], counts):
                ids = np.concatenate([np.asarray(part, dtype) for part in tokenizer.parts(content, bos=True, eos=True)])
                shards[split].write({"tokens": ids, "name": name, "domain": domain}, domain, len(ids))
                # How far into a compressed file a document is cannot be told from outside: by its text, at most all.
                more = min(len(content), extent.size - seen)
                seen += more
                yield more, len(ids)
            yield extent.size - seen, 0
        facts = counts | {"tokenizer": tokenizer.fingerprint()}
        return facts | {"splits": {split: shard.close() for split, shard in shards.items()}}


class Corpus:
    """One split of a prepared dataset: a sequence of documents."""

    def __init__(self, path: Place, split: str):
        self.records = Records(path, split)
        if self.records.name != NAME:
            raise ValueError(f"{path} holds {self.records.name} records: give a dataset of {NAME}")
        self.tokenizer = self.records.tokenizer

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Document:
        record = self.records[number]
        return Document(record["name"], record["tokens"], record["domain"])

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))
