"""Datasets written by hand, whose tokens are what the test says, and a small real one."""

import dataclasses
import sysconfig
from pathlib import Path

import numpy as np

from cepe_jax.data.builder import Builder, ShardWriter, array, text
from cepe_jax.data.corpus import NAME, PrepareConfig, prepare
from cepe_jax.data.records import Records, read_index, shard_path
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train

SEQUENCE = {"tokens": array(np.uint16, None), "name": text(), "domain": text()}


def make_tokenizer(home: Path) -> Tokenizer:
    return train(
        ["".join(chr(97 + i % 26) for i in range(j, j + 40)) for j in range(60)], 300, home / "tokenizer.model"
    )


def write(
    path: Path,
    name: str,
    features: dict,
    shards: list[list[dict]],
    tokenizer: Tokenizer,
    lengths: list[int] | None = None,
    **facts,
) -> Path:
    """A dataset `name` at `path` with a train split of these shards of records; `facts` go into its index.

    `lengths` are those of each shard's records in tokens; None: all have the index's.
    """
    builder = Builder(path, {}, tokenizer)
    marks = []
    for number, records in enumerate(shards):
        shard = ShardWriter(shard_path(path, name, "train", number, len(shards)), features)
        for place, record in enumerate(records):
            typed = {
                n: np.asarray(v, features[n].np_dtype) if isinstance(v, np.ndarray) else v for n, v in record.items()
            }
            shard.write(typed, "d", lengths[place] if lengths else facts.get("length", 1))
        marks.append({"splits": {"train": shard.close()}})
    builder.register(name, features, marks, {"tokenizer": tokenizer.fingerprint()} | facts)
    return path


def write_documents(out: Path, shards: list[dict[str, list[int]]], ends: bool = False) -> Path:
    """Write documents of these lengths, by domain in each shard, in which no token is twice; with `ends` BOS and EOS.

    A token says whence it is: those of a document follow each other. The domains of a shard are in random order.
    """
    tokenizer = train(["some words, some more words"] * 20, 275, out.with_suffix(".model"))
    builder = Builder(out, {}, tokenizer)
    first = tokenizer.vocab_size if ends else 0
    for number, domains in enumerate(shards):
        writer = ShardWriter(shard_path(out, NAME, "train", number, len(shards)), SEQUENCE)
        documents = [(domain, length) for domain, lengths in domains.items() for length in lengths]
        for place in np.random.default_rng(number).permutation(len(documents)):
            domain, length = documents[place]
            tokens = np.arange(first, first := first + length, dtype=np.uint16)
            if ends:
                tokens[0], tokens[-1] = tokenizer.bos_id, tokenizer.eos_id
            writer.write({"tokens": tokens, "name": f"{domain}/{number}@{place}.txt", "domain": domain}, domain, length)
        builder.mark(number, [], {"splits": {"train": writer.close()}})
    marks = [builder.marked(number, []) for number in range(len(shards))]
    builder.register(NAME, SEQUENCE, marks, {"tokenizer": tokenizer.fingerprint()})
    return out


def write_sequences(
    path: Path, sequences: list[np.ndarray], length: int, tokenizer: Tokenizer, shards: int = 2
) -> Path:
    """A dataset of sequences, in `shards` shards."""
    records = [{"tokens": tokens, "name": f"{i}@0", "domain": "d"} for i, tokens in enumerate(sequences)]
    cuts = np.array_split(np.arange(len(records)), shards)
    return write(path, "filtered", SEQUENCE, [[records[i] for i in cut] for cut in cuts], tokenizer, length=length)


def splits_by_jobs(config: SampleConfig, *shards: str) -> dict:
    """Return the splits of the sequences that the jobs of these shards make."""
    for shard in shards:
        sample(dataclasses.replace(config, shard=shard))
    return read_index(config.out)["splits"]


def joins(base: Path) -> dict:
    """What the index of a dataset says that was made for `base`, beside it."""
    records = Records(base, "train")
    return {"path": f"../{base.name}", "split": "train", "digest": records.digest}


def make_data(home: Path, vocab_size: int) -> Path:
    """Sequences of 32 tokens of a package's files: windows of each, and packed ones."""
    library = Path(sysconfig.get_path("stdlib")) / "json"
    fractions = {"test_fraction": 0.3, "retrieval_fraction": 0.0}
    prepare(
        PrepareConfig(input=library, out=home / "docs", patterns=("*.py",), vocab_size=vocab_size, seed=1, **fractions)
    )
    for kind in ("filtered", "packed"):
        sample(SampleConfig(data=home / "docs", out=home / kind, kind=kind, length=32, workers=1))
    return home
