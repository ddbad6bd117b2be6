"""Batches for training: global batch n is a pure function of (seed, n), on any number of hosts."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np

from cepe_jax.data.conversations import Packs
from cepe_jax.data.examples import REFERENCE
from cepe_jax.data.preferences import Pairs
from cepe_jax.data.recipes import Mixture, PairsOfAnswers, Recipe
from cepe_jax.data.records import (
    CONVERSATIONS,
    CORESET,
    PREFERENCES,
    NoDataset,
    Record,
    Records,
    is_dataset,
    open_joined,
    read_index,
)
from cepe_jax.directories import Place, beside

if TYPE_CHECKING:
    import grain

ENDLESS = 1 << 40  # batches; what repeats for ever has more, and Grain counts in floats, which round above its integers


class Sequences:
    """The sequences of a dataset, cut into examples' worth of tokens: a random-access source for Grain.

    Another dataset may be joined to them (passages, a teacher's probabilities): its fields are in their records.
    """

    def __init__(self, path: Place, recipe: Recipe, split: str = "train"):
        """Raise ValueError if the dataset has no sequences or too short ones, or joins another than it was made for."""
        self.path, (self.records, self.joined) = path, open_joined(path, split)
        known = self.joined.index if self.joined else {}
        self.query = {name: value for name, value in known.items() if name == "query_tokens"}
        if isinstance(recipe, PairsOfAnswers):
            raise ValueError(f"{path} holds {self.records.name}: prepare pairs (prepare_data.py preferences) first")
        if "length" not in self.records.index:
            raise ValueError(f"{path} holds {self.records.name}: sample sequences from it first")
        self.size = recipe.size(self.joined)
        length = self.records.index["length"]
        if length < self.size:
            raise ValueError(
                f"{path}: its sequences have {length} tokens, and an example here has {self.size}: sample longer ones, "
                f"or lower the window"
            )
        self.per_sequence = 1 if self.joined else length // self.size
        self.numbers = range(len(self.records))  # of the records, in the order of the examples
        self.digest = self.records.digest + (self.joined.digest if self.joined else "")  # of all that a record holds

    def only(self, numbers: Sequence[int]) -> Self:
        """Return these records alone, as often as they are named."""
        subset = copy.copy(self)
        subset.numbers = numbers
        return subset

    def __len__(self) -> int:
        return len(self.numbers) * self.per_sequence

    def __getitem__(self, number: int) -> Record:
        """Return the record; its `tokens` are `size` and, if the document goes on, one more."""
        place, part = divmod(int(number), self.per_sequence)
        number = int(self.numbers[place])
        record = self.records[number]
        start = part * self.size
        record["tokens"] = record["tokens"][start : start + self.size + 1]
        return record | self.joined[number] | self.query if self.joined else record


Source = Sequences | Packs | Pairs


def examples(
    sources: Sequence[Source], weights: Sequence[float], recipe: Recipe, seed: int, by_size: bool = False
) -> "grain.MapDataset":
    """Return the examples by number, without end, of sources mixed as `_mixed` says."""
    import grain  # takes a second or two: only what loads data pays for it

    parts = [grain.MapDataset.source(source) for source in sources]
    mixed = _mixed(parts, weights, seed, by_size)
    return mixed.seed(seed).random_map(partial(recipe, mixture=Mixture(sources)))


def _mixed(
    parts: Sequence["grain.MapDataset"], weights: Sequence[float], seed: int, by_size: bool
) -> "grain.MapDataset":
    """Return the parts without end, mixed by weight: each piece of a part comes once before any comes again.

    By size a pass over all has each piece as often as its part's weight says, a whole number, and comes again in
    another order.
    """
    import grain

    if by_size:
        copies = [part for part, weight in zip(parts, weights, strict=True) for _ in range(int(weight))]
        return grain.MapDataset.concatenate(copies).shuffle(seed=seed).repeat()
    return grain.MapDataset.mix([part.shuffle(seed=seed + i).repeat() for i, part in enumerate(parts)], weights)


def names_in(
    sources: Sequence[Source],
    weights: Sequence[float],
    seed: int,
    batch_size: int,
    number: int,
    by_size: bool = False,
) -> list[str]:
    """Return the sequences of global batch `number`: the dataset of each, and the first line of its name.

    Those of the windows: with foreign_rate the context of some is of other documents, which are not named.
    """
    import grain

    named = [
        grain.MapDataset.source(source).map(
            lambda record, path=source.records.path: f"{path.name}/{record['name'].splitlines()[0]}"
        )
        for source in sources
    ]
    mixed = _mixed(named, weights, seed, by_size)
    return [mixed[i] for i in range(number * batch_size, (number + 1) * batch_size)]


def batches(
    data: "grain.MapDataset", batch_size: int, first: int = 0, rows: Sequence[int] | None = None, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Global batches first, first + 1, ..., read ahead by threads, or by `workers` processes.

    Of each these `rows` alone, or all. The whole state of a loader is its step.
    """
    import grain

    rows = range(batch_size) if rows is None else rows

    def example(index: int):
        number, place = divmod(index, len(rows))
        return data[number * batch_size + rows[place]]

    count = min(len(data) // batch_size, ENDLESS) * len(rows)
    mine = grain.MapDataset.range(count).map(example).batch(len(rows))[first:]
    ahead = mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # Grain's processes ask for flags that only an absl program parses
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    iterator = iter(ahead)
    try:
        yield from iterator
    finally:
        iterator.close()  # its processes and shared memory would stay


def open_mix(data: Place, mix: dict[str, float], recipe: Recipe, split: str = "train") -> list[Source]:
    """Return the datasets below `data` that `mix` names, or `data` itself if it names none. All have one tokenizer."""
    check_mix(data, mix)
    sources = [open_source(data / name, recipe, split) for name in mix or [""]]
    fingerprints = {source.records.tokenizer.fingerprint() for source in sources}
    if len(fingerprints) > 1:
        raise ValueError(f"{data}: {', '.join(mix)} were tokenised with different tokenizers: prepare them again")
    return sources


def open_source(path: Place, recipe: Recipe, split: str) -> Source:
    """Return the dataset at `path` as the recipe's records; of a coreset, the records that it selects.

    ValueError if the coreset was made for others than those that are there, or the recipe leaves none of them.
    """
    index = read_index(path)
    if index["name"] != CORESET:
        kinds = {CONVERSATIONS: Packs, PREFERENCES: Pairs, REFERENCE: Pairs}
        return kinds.get(index["name"], Sequences)(path, recipe, split)
    coreset = Records(path, split)
    selects = coreset.fact("selects")
    source = open_source(beside(path, selects["path"]), recipe, selects["split"])
    if source.digest != selects["digest"]:
        raise ValueError(f"{path} selects from another dataset than {source.path} is now: select again")
    rows = np.array([(record["number"], record["repeats"]) for record in coreset])
    subset = source.only(np.repeat(*rows.T))
    if not len(subset):
        raise ValueError(f"{path}: no record that it selects fits {source.size} tokens: raise examples.window")
    subset.path, subset.digest = path, source.digest + coreset.digest
    return subset


def check_mix(data: Place, mix: dict[str, float]) -> None:
    """Raise NoDataset, with the mend, unless `mix` names datasets below `data`, or without it `data` is one."""
    absent = [name for name in mix or [""] if not is_dataset(data / name)]
    if not absent:
        return
    below = ", ".join(sorted(path.name for path in data.iterdir() if is_dataset(path))) if data.is_dir() else ""
    make = "make it with scripts/prepare_data.py"
    if not mix:
        raise NoDataset(f"{data}: no dataset: {f'give one below it ({below}), or mix' if below else make}")
    mend = f"name in mix what is there ({below}), or {make}" if below else make
    if is_dataset(data):
        mend = f"{data} is a dataset itself, which --mix={{}} reads"
    raise NoDataset(f"{data / absent[0]}: no dataset, and mix names {absent[0]} below data={data}: {mend}")
