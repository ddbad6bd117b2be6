"""Whole documents one after another: streams of one domain and range of lengths, which sequences are cut from.

A stream has no end: its documents come in random order and, once all have come, again in another order. However far it
is read, each has come as often as the others, up to one. In a pass the documents of a shard stand together, so a part
of a stream lies in few shards.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cepe_jax.data.records import Records
from cepe_jax.data.template import PRIVATE_USE
from cepe_jax.data.tokenizer import Tokenizer

Piece = tuple[int, int, int]  # a record, and the first and one past the last of its tokens


def separator_ids(tokenizer: Tokenizer, separator: str, as_text: bool) -> list[int]:
    """Return the ids of the separator's characters; none is a special token's.

    ValueError if the separator names a special token, unless `as_text` says that its characters are meant.
    """
    named = [name for name in tokenizer.special if name in separator]
    if named and not as_text:
        raise ValueError(
            f"separator is {separator!r}, and {named[0]} is special token {tokenizer.special[named[0]]}: give "
            f"--separator_as_text to write its characters and not the token, or another text"
        )
    escape = next(character for character in map(chr, PRIVATE_USE) if character not in separator)
    ids = tokenizer.encode_special(tokenizer.escaped(separator, escape), escape)
    if separator and not ids:
        raise ValueError(f"separator is {separator!r}, which the tokenizer reads as nothing: give another text")
    return ids


def exact(shares: dict[int, float]) -> dict[int, Fraction]:
    """Return the shares by least length, in order, as the decimals that were written: 0.1 + 0.2 is 0.3."""
    return {low: Fraction(str(shares[low])) for low in sorted(shares)}


@dataclass(frozen=True)
class Stream:
    """The documents of a domain that have `low` tokens or more and, unless it is 0, fewer than `high`."""

    domain: str
    low: int
    high: int
    key: tuple[int, int]  # of its draws: the seed, and the number of the domain
    added: int  # tokens by which a document is longer in the stream than its record
    sizes: tuple[int, ...]  # tokens of each shard's documents in the stream

    @property
    def size(self) -> int:
        """The number of tokens of a pass."""
        return sum(self.sizes)

    def pieces(self, records: Records, start: int, end: int) -> Iterator[Piece]:
        """Yield the pieces that stand from token `start` to token `end` of the stream."""
        for number in range(start // self.size, -(-end // self.size)):
            at = number * self.size
            for shard in np.random.default_rng((*self.key, self.low, number)).permutation(len(self.sizes)).tolist():
                if at < end and at + self.sizes[shard] > start:
                    places, lengths = chosen(records.lengths(shard), self.domain, self.low, self.high)
                    # NumPy pads seeds with zeros: the shard's number must not be one.
                    order = np.random.default_rng((*self.key, self.low, number, shard + 1)).permutation(len(places))
                    ends = at + np.cumsum(lengths[order] + self.added)
                    for i in range(np.searchsorted(ends, start, "right"), len(ends)):
                        first = at if i == 0 else int(ends[i - 1])
                        if first >= end:
                            break
                        yield int(places[order[i]]), max(start - first, 0), min(end, int(ends[i])) - first
                at += self.sizes[shard]


def chosen(
    table: dict[str, tuple[np.ndarray, np.ndarray]], domain: str, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers and lengths of a shard's records that have the domain, and `low` to `high` - 1 tokens."""
    places, lengths = table.get(domain, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
    fit = (lengths >= low) & ((lengths < high) | (high == 0))
    return places[fit], lengths[fit]


def cut(pieces: Iterable[Piece], length: int) -> Iterator[list[Piece]]:
    """Yield the pieces in sequences of `length` tokens, which together they fill."""
    sequence, missing = [], length
    for document, start, end in pieces:
        while start < end:
            stop = min(end, start + missing)
            sequence.append((document, start, stop))
            missing -= stop - start
            start = stop
            if not missing:
                yield sequence
                sequence, missing = [], length
