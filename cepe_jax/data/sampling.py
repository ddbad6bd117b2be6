"""Documents to sequences of one length: windows of long documents ("filtered"), and packed ones. To token budgets."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from etils import epath

from cepe_jax.data.builder import Builder, ShardWriter, array, text, token_dtype
from cepe_jax.data.corpus import NAME as DOCUMENTS
from cepe_jax.data.records import Records, opened, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.parsing import Seed

Piece = tuple[int, int, int]  # a document of a shard, and the first and one past the last of its tokens


@dataclass(frozen=True, kw_only=True)
class SampleConfig(JobConfig):
    data: epath.Path  # a dataset of documents
    out: epath.Path  # gets the dataset of sequences
    kind: Literal["filtered", "packed"]  # filtered: windows of long documents; packed: documents one after another
    length: int  # tokens of a sequence, which are those of its contexts and its window
    stride: int = 0  # filtered: tokens from one window of a document to the next; 0 = the length
    budget: dict[str, int] = field(default_factory=dict)  # tokens of each domain, 0 = all; {}: all of each
    split: str = "train"  # split of the documents
    seed: Seed = 0  # draws the documents

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise ValueError(f"length is {self.length}: give a number above 0")
        if self.stride < 0 or (self.stride and self.kind != "filtered"):
            raise ValueError(f"stride is {self.stride}: give a number of tokens, for filtered sequences alone")
        for domain, tokens in self.budget.items():
            if tokens and tokens < self.length:
                raise ValueError(f"budget of {domain} is {tokens}: a sequence has {self.length} tokens")


def windows(lengths: np.ndarray, config: SampleConfig) -> Iterator[Piece]:
    """The windows of documents of these lengths: `length` tokens and, where the document goes on, one more."""
    for document, tokens in enumerate(lengths):
        for start in range(0, int(tokens) - config.length + 1, config.stride or config.length):
            yield document, start, min(start + config.length + 1, int(tokens))


def packs(lengths: np.ndarray, config: SampleConfig, rng: np.random.Generator) -> Iterator[list[Piece]]:
    """Sequences of pieces in random order, `length` + 1 tokens each; what did not fit of a piece comes again later.

    No token is in two sequences, and all are in one but those of the last, which is not full.
    """
    whole = config.length + 1  # the last label too
    pieces = [
        (document, start, min(start + whole, int(tokens)))
        for document, tokens in enumerate(lengths)
        for start in range(0, int(tokens), whole)
    ]
    waiting = deque(pieces[i] for i in rng.permutation(len(pieces)))
    room = sum(end - start for _, start, end in pieces)
    while room >= whole:
        sequence, missing = [], whole
        while missing:
            document, start, end = waiting.popleft()
            cut = min(end, start + missing)
            sequence.append((document, start, cut))
            if cut < end:
                waiting.append((document, cut, end))
            missing -= cut - start
        room -= whole
        yield sequence


def supply(lengths: np.ndarray, config: SampleConfig) -> int:
    """Return how many sequences documents of these lengths give."""
    if config.kind == "packed":
        return int(lengths.sum()) // (config.length + 1)
    enough = lengths[lengths >= config.length]
    return int(((enough - config.length) // (config.stride or config.length) + 1).sum())


def apportion(total: int, supplies: list[int]) -> list[int]:
    """`total` in shares as the supplies are to each other, none above its own, by largest remainder."""
    whole = sum(supplies)
    shares = [total * one // whole for one in supplies]
    left = sorted(range(len(supplies)), key=lambda i: (-(total * supplies[i] % whole), i))
    for i in left[: total - sum(shares)]:
        shares[i] += 1
    return shares


def quotas(records: Records, config: SampleConfig) -> list[dict[str, int]]:
    """For each shard of the documents, domain -> sequences that it gives. ValueError where a budget asks for more."""
    names = records.facts["domains"]
    for domain in config.budget:
        if domain not in names:
            raise ValueError(f"budget names {domain}: the domains of {config.data} are {', '.join(names)}")
    shards = range(len(records.facts["shards"]))
    result: list[dict[str, int]] = [{} for _ in shards]
    domains = sorted(config.budget or names)
    all_supplies: dict[str, list[int]] = {domain: [] for domain in domains}
    for shard in shards:
        table = records.lengths(shard)
        for domain in domains:
            all_supplies[domain].append(supply(table[domain][1], config) if domain in table else 0)
    for domain, supplies in all_supplies.items():
        wanted = config.budget.get(domain, 0) // config.length or sum(supplies)
        if wanted > sum(supplies):
            raise ValueError(
                f"budget of {domain} is {config.budget[domain]:,} tokens, and {config.kind} sequences have "
                f"{sum(supplies) * config.length:,}: lower it, or prepare more"
            )
        if wanted:
            for shard, share in zip(result, apportion(wanted, supplies), strict=True):
                shard[domain] = share
    if not any(any(shard.values()) for shard in result):
        raise ValueError(f"{config.data}: no {config.kind} sequence of {config.length} tokens: lower --length")
    return result


def features_of(dtype) -> dict:
    """`name` has a line for each piece of a document: the document, and the piece's first token in it."""
    return {"tokens": array(dtype, None), "name": text(), "domain": text()}


def documents_in(name: str) -> set[str]:
    """The documents that a sequence of this name has pieces of."""
    return {line.rpartition("@")[0] for line in name.split("\n")}


@one_job
def sample(config: SampleConfig) -> None:
    """A dataset of sequences at `config.out`, with as many tokens of each domain as the budget says."""
    records = Records(config.data, config.split)
    if records.name != DOCUMENTS:
        raise ValueError(f"{config.data} holds {records.name} records: sequences are sampled from {DOCUMENTS}")
    tokenizer = records.tokenizer
    settings = config.identity("data", "out") | {"data": records.digest}
    units = [(quota,) for quota in quotas(records, config)]
    builder = Builder(config.out, settings, tokenizer)
    if builder.finished:
        return
    dtype = token_dtype(tokenizer.vocab_size)
    work = SampleUnit(config, len(units), dtype, records.digest)
    sizes = [sum(quota.values()) for (quota,) in units]
    marks = run_units(builder, units, sizes, work, config, f"sample {config.kind}, sequences")
    if marks is not None:
        facts = {"tokenizer": tokenizer.fingerprint(), "length": config.length}
        builder.register(config.kind, features_of(dtype), marks, facts)


@dataclass(frozen=True)
class SampleUnit:
    """The work on a shard of documents: its share of the sequences of each domain, in a shard of their own."""

    config: SampleConfig
    num_units: int
    dtype: type
    digest: str

    def __call__(self, number: int, quota: dict[str, int]) -> Work:
        config = self.config
        records = opened(config.data, config.split, self.digest)
        path = shard_path(config.out, config.kind, config.split, number, self.num_units)
        shard = ShardWriter(path, features_of(self.dtype))
        rng = np.random.default_rng((config.seed, number))
        table = records.lengths(number)
        for domain, wanted in quota.items():
            places, lengths = table.get(domain, (np.zeros(0, int), np.zeros(0, int)))
            if config.kind == "filtered":
                possible = [[window] for window in windows(lengths, config)]
                sequences = [possible[i] for i in sorted(rng.permutation(len(possible))[:wanted])]
            else:
                sequences = [sequence for sequence, _ in zip(packs(lengths, config, rng), range(wanted), strict=False)]
            # A sequence may be of many documents, and a document in many sequences: they are held at once.
            documents = {d: records[places[d]] for d in sorted({d for sequence in sequences for d, *_ in sequence})}
            for sequence in sequences:
                tokens = np.concatenate([documents[d]["tokens"][start:end] for d, start, end in sequence])
                name = "\n".join(f"{documents[d]['name']}@{start}" for d, start, _ in sequence)
                pieces = [end - start for _, start, end in sequence]
                shard.write({"tokens": tokens, "name": name, "domain": domain}, domain, config.length, pieces)
                yield 1, config.length
        return {"splits": {config.split: shard.close()}}
