"""Documents to sequences of one length, to token budgets: windows of long documents ("filtered"), packed, concatenated.

Packed sequences are of stretches of documents in random order. Concatenated ones are of whole documents, of which long
ones may come more often (Fu et al. 2024), with a text between them instead of BOS and EOS (ChatQA 2, 2407.14482).
"""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
from etils import epath

from cepe_jax.data.builder import Builder, ShardWriter, array, text, token_dtype
from cepe_jax.data.concatenation import Piece, Stream, chosen, cut, exact, separator_ids
from cepe_jax.data.corpus import NAME as DOCUMENTS
from cepe_jax.data.records import Record, Records, opened, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.parsing import Seed


@dataclass(frozen=True, kw_only=True)
class SampleConfig(JobConfig):
    data: epath.Path  # a dataset of documents
    out: epath.Path  # gets the dataset of sequences
    kind: Literal["filtered", "packed", "concatenated"]  # windows of long documents; stretches of any; whole documents
    length: int  # tokens of a sequence, which are those of its contexts and its window
    stride: int = 0  # filtered: tokens from one window of a document to the next; 0 = the length
    budget: dict[str, int] = field(default_factory=dict)  # tokens of each domain, 0 = all; {}: all of each
    shares: dict[int, float] = field(default_factory=dict)  # concatenated: share of documents from each length on
    separator: str = ""  # concatenated: text between documents in place of their BOS and EOS; "": they keep these
    separator_as_text: bool = False  # the separator names a special token, and its characters are meant
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
        for name in ("shares", "separator", "separator_as_text"):
            if (value := getattr(self, name)) and self.kind != "concatenated":
                raise ValueError(
                    f"{name} is {value}: it is for concatenated sequences alone, and the kind is {self.kind}"
                )
        if self.separator_as_text and not self.separator:
            raise ValueError("separator_as_text is true, and there is no separator: give one")
        for low, share in self.shares.items():
            if low < 0 or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ValueError(f"shares has {low}: {share}: give a length in tokens, and a share above 0")
        if self.shares and (total := sum(exact(self.shares).values())) != 1:
            raise ValueError(f"shares sum to {float(total)}: give shares that sum to 1")


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
    shards = range(len(records.facts["shards"]))
    result: list[dict[str, int]] = [{} for _ in shards]
    domains = domains_of(records, config)
    all_supplies: dict[str, list[int]] = {domain: [] for domain in domains}
    for shard in shards:
        table = records.lengths(shard)
        for domain in domains:
            all_supplies[domain].append(supply(table[domain][1], config) if domain in table else 0)
    for domain, supplies in all_supplies.items():
        wanted = wanted_of(domain, sum(supplies), config)
        if wanted:
            for shard, share in zip(result, apportion(wanted, supplies), strict=True):
                shard[domain] = share
    return result


def domains_of(records: Records, config: SampleConfig) -> list[str]:
    """Return the domains of the sequences, in order; ValueError if the budget names others than the documents have."""
    names = records.facts["domains"]
    for domain in config.budget:
        if domain not in names:
            raise ValueError(f"budget names {domain}: the domains of {config.data} are {', '.join(names)}")
    return sorted(config.budget or names)


def wanted_of(domain: str, supply: int, config: SampleConfig) -> int:
    """Return how many sequences of a domain the budget asks for; ValueError if there are fewer and none may repeat."""
    wanted = config.budget.get(domain, 0) // config.length or supply
    if wanted > supply and not config.shares:
        raise ValueError(
            f"budget of {domain} is {config.budget[domain]:,} tokens, and {config.kind} sequences have "
            f"{supply * config.length:,}: lower it, or prepare more"
        )
    return wanted


def streams(records: Records, config: SampleConfig, separator: Sequence[int]) -> dict[Stream, int]:
    """Return the streams of the domains and ranges of lengths, each with the number of sequences that are cut from it.

    These are shares of a domain's sequences by largest remainder. ValueError for a share of no documents.
    """
    shares = exact(config.shares) or {0: Fraction(1)}
    ranges = list(zip(shares, [*list(shares)[1:], 0], strict=True))
    added = len(separator) - 2 if separator else 0  # BOS and EOS
    domains = domains_of(records, config)
    sizes: dict[tuple[str, int], list[int]] = {(domain, low): [] for domain in domains for low in shares}
    for shard in range(len(records.facts["shards"])):
        table = records.lengths(shard)
        for domain in domains:
            for low, high in ranges:
                _, lengths = chosen(table, domain, low, high)
                sizes[domain, low].append(int(lengths.sum()) + added * len(lengths))
    result, numbers = {}, {domain: number for number, domain in enumerate(records.facts["domains"])}
    for domain in domains:
        for low, high in ranges:
            if not sum(sizes[domain, low]):
                lengths = f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"
                raise ValueError(
                    f"shares: no document of {domain} has {lengths}: change --shares, or leave out {domain}"
                )
        supply = sum(sum(sizes[domain, low]) for low in shares) // (config.length + 1)
        counts = apportion(wanted_of(domain, supply, config), list(shares.values()))
        for (low, high), count in zip(ranges, counts, strict=True):
            key = config.seed, numbers[domain]
            result[Stream(domain, low, high, key, added, tuple(sizes[domain, low]))] = count
    return result


def features_of(dtype) -> dict:
    """Return the features: `name` has a line for each piece, of its document and its first token there.

    A separator counts to the document before it, whose BOS does not count then.
    """
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
    dtype, num_units = token_dtype(tokenizer.vocab_size), len(records.facts["shards"])
    shared = config, num_units, dtype, records.digest
    if config.kind == "concatenated":
        separator = separator_ids(tokenizer, config.separator, config.separator_as_text)
        counts = streams(records, config, separator)
        work = ConcatenateUnit(*shared, tuple(counts), tuple(separator))
        units = [
            ([(count * n // num_units, count * (n + 1) // num_units) for count in counts.values()],)
            for n in range(num_units)
        ]
        sizes = [sum(last - first for first, last in ranges) for (ranges,) in units]
    else:
        work, units = SampleUnit(*shared), [(quota,) for quota in quotas(records, config)]
        sizes = [sum(quota.values()) for (quota,) in units]
    if not any(sizes):
        raise ValueError(f"{config.data}: no {config.kind} sequence of {config.length} tokens: lower --length")
    builder = Builder(config.out, config.identity("data", "out") | {"data": records.digest}, tokenizer)
    if builder.finished:
        return
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
        shard = self.shard(number)
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
                yield self.write(shard, domain, [(documents[d], start, end) for d, start, end in sequence])
        return {"splits": {config.split: shard.close()}}

    def shard(self, number: int) -> ShardWriter:
        path = shard_path(self.config.out, self.config.kind, self.config.split, number, self.num_units)
        return ShardWriter(path, features_of(self.dtype))

    def write(self, shard: ShardWriter, domain: str, pieces: list[tuple[Record, int, int]]) -> tuple[int, int]:
        """Write a sequence of pieces, each of a document's record, and return what `Work` yields of it."""
        tokens = np.concatenate([document["tokens"][start:end] for document, start, end in pieces])
        name = "\n".join(f"{document['name']}@{start}" for document, start, _ in pieces)
        lengths = [end - start for _, start, end in pieces]
        shard.write({"tokens": tokens, "name": name, "domain": domain}, domain, self.config.length, lengths)
        return 1, self.config.length


@dataclass(frozen=True)
class ConcatenateUnit(SampleUnit):
    """The work on a part of each stream: the sequences of these numbers, in a shard of their own."""

    streams: tuple[Stream, ...]
    separator: tuple[int, ...]

    def __call__(self, number: int, ranges: list[tuple[int, int]]) -> Work:
        config, whole = self.config, self.config.length + 1
        records = opened(config.data, config.split, self.digest)
        shard, tokenizer = self.shard(number), records.tokenizer
        ends = tokenizer.bos_id, tokenizer.eos_id

        @functools.lru_cache(maxsize=1)  # a long document is in sequences one after another
        def document(place: int) -> Record:
            record = records[place]
            if self.separator:
                tokens = record["tokens"]
                if (tokens[0], tokens[-1]) != ends:
                    raise ValueError(
                        f"{record['name']} of {config.data}: BOS and EOS do not enclose it: prepare it again"
                    )
                record["tokens"] = np.concatenate([tokens[1:-1], np.array(self.separator, tokens.dtype)])
            return record

        for stream, (first, last) in zip(self.streams, ranges, strict=True):
            for sequence in cut(stream.pieces(records, first * whole, last * whole), whole):
                yield self.write(shard, stream.domain, [(document(d), start, end) for d, start, end in sequence])
        return {"splits": {config.split: shard.close()}}
