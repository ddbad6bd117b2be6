"""Batches for each stage of training: global batch n is a pure function of (seed, n), on any number of hosts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cepe_jax.data.examples import (
    TEACHER,
    Example,
    ExampleConfig,
    chunks_before,
    duplicate,
    mask_chunks,
    masked_lm,
    previous_document,
    retrieved,
    taught,
    window_at,
)
from cepe_jax.data.records import NoDataset, Records, is_dataset
from cepe_jax.data.retrieval import NAME as RETRIEVED
from cepe_jax.data.sampling import documents_in

if TYPE_CHECKING:
    import grain

Stage = Literal["lm", "mlm", "warmup", "cepe", "ceped"]
ENDLESS = 1 << 40  # batches; what repeats for ever has more, and Grain counts in floats, which round above its integers


class Sequences:
    """The sequences of a dataset, cut into examples' worth of tokens: a random-access source for Grain.

    What another dataset joined to a sequence (its passages, its teacher's probabilities) is in its record.
    """

    def __init__(self, path: Path, stage: Stage, config: ExampleConfig, split: str = "train"):
        """ValueError where the dataset has no sequences, too short ones, or does not join the one it was made for."""
        self.joined, self.query = None, {}
        self.records = Records(path, split)
        if joins := self.records.index.get("joins"):
            self.joined, self.records = self.records, Records(path / joins["path"], joins["split"])
            if joins["digest"] != self.records.digest or len(self.joined) != len(self.records):
                raise ValueError(
                    f"{path} does not join {self.records.path}: it has {len(self.joined)} records for others than the "
                    f"{len(self.records)} there: make it again"
                )
        if "length" not in self.records.index:
            raise ValueError(f"{path} holds {self.records.name}: sample sequences from it first")
        self.size = config.window
        if self.joined and self.joined.name == RETRIEVED:
            self.query = {"query_tokens": self.joined.index["query_tokens"]}
            check_retrieved(path, self.joined.index, config)
        elif stage in ("cepe", "ceped"):
            self.size = config.span
        if self.joined and self.joined.name == TEACHER:
            check_taught(path, self.joined.index, config)
        length = self.records.index["length"]
        if length < self.size:
            raise ValueError(
                f"{path}: its sequences have {length} tokens, and an example of {stage} has {self.size}: "
                f"sample longer ones, or lower the window"
            )
        self.per_sequence = 1 if self.joined else length // self.size

    @property
    def digest(self) -> str:
        """Of all that a record holds."""
        return self.records.digest + (self.joined.digest if self.joined else "")

    def __len__(self) -> int:
        return len(self.records) * self.per_sequence

    def __getitem__(self, number: int) -> dict:
        """The record; its `tokens` are `size` and, where the document goes on, one more."""
        number, part = divmod(int(number), self.per_sequence)
        record = self.records[number]
        start = part * self.size
        record["tokens"] = record["tokens"][start : start + self.size + 1]
        return record | self.joined[number] | self.query if self.joined else record


def check_retrieved(path: Path, index: dict, config: ExampleConfig) -> None:
    """ValueError where a window would have no label, or a chunk no room for a passage."""
    if index["query_tokens"] > config.window:
        raise ValueError(
            f"{path}: its passages were found for {index['query_tokens']} tokens, whose labels are ignored, and the "
            f"window has {config.window}: retrieve with fewer --query_tokens"
        )
    needed = index["passage_length"] * (2 if config.neighbours == "joint" else 1)
    if needed > config.chunk_length:
        raise ValueError(f"{path}: its chunks have {needed} tokens, chunk_length is {config.chunk_length}: raise it")


def check_taught(path: Path, index: dict, config: ExampleConfig) -> None:
    """ValueError where the teacher read other tokens than an example has, or was asked about others."""
    for name, size in ("window", config.window), ("context", config.span - config.window):
        if index[name] != size:
            raise ValueError(f"{path}: its teacher's {name} has {index[name]} tokens, here it has {size}: change one")


class ToExample:
    """A record and a random generator to an example of the stage; it can be sent to other processes."""

    def __init__(self, sources: Sequence[Sequences], stage: Stage, config: ExampleConfig):
        tokenizer = sources[0].records.tokenizer
        self.special, self.mask_id = (tokenizer.bos_id, tokenizer.eos_id), tokenizer.mask_id
        self.stage, self.config = stage, config
        self.with_context = [source for source in sources if source.size > config.window]

    def __call__(self, record: dict, rng: np.random.Generator) -> Example:
        config, tokens = self.config, record["tokens"]
        match self.stage:
            case "lm":
                return window_at(tokens, 0, config.window)
            case "mlm":
                return masked_lm(tokens[: config.window], self.special, self.mask_id, config.mlm_rate, rng)
            case "warmup":
                return duplicate(tokens, 0, config)
            case "cepe" | "ceped":
                return mask_chunks(self._with_context(record, rng), config, rng)

    def _with_context(self, record: dict, rng: np.random.Generator) -> Example:
        config = self.config
        start = config.num_chunks * config.chunk_length
        if "passages" in record:
            example = retrieved(record, config)
            del example["scores"]  # training reads none, and a mixture's examples have the same fields
            return example
        example = previous_document(record["tokens"], start, config)
        if rng.random() < config.foreign_rate:
            other = self._of_other_documents(record, rng)
            example |= chunks_before(other["tokens"], start, config.num_chunks, config.chunk_length)
        return example | taught(record, config) if "teacher_prob" in record else example

    def _of_other_documents(self, record: dict, rng: np.random.Generator) -> dict:
        """A record that shares no document with this one: its context could hold the window."""
        own = documents_in(record["name"].decode())
        for _ in range(100):
            source = self.with_context[rng.integers(len(self.with_context))]
            other = source[rng.integers(len(source))]
            if not own & documents_in(other["name"].decode()):
                return other
        raise ValueError("foreign_rate needs sequences of several documents: in 100 draws all were of the same")


def blank(stage: Stage, config: ExampleConfig) -> Example:
    """An example of the stage with nothing in it: its arrays' names, shapes and dtypes."""
    tokens, rng = np.zeros(config.span + 1, np.int32), np.random.default_rng(0)
    match stage:
        case "lm":
            return window_at(tokens, 0, config.window)
        case "mlm":
            return masked_lm(tokens[: config.window], (), 0, config.mlm_rate, rng)
        case "warmup":
            return duplicate(tokens, 0, config)
        case "cepe" | "ceped":
            return previous_document(tokens, config.span - config.window, config)


def examples(
    sources: Sequence[Sequences], weights: Sequence[float], stage: Stage, config: ExampleConfig, seed: int
) -> "grain.MapDataset":
    """Example n at index n, for ever, of sources mixed by weight.

    Each piece of a source comes once before any comes again, in another order.
    """
    import grain  # takes a second or two: only what loads data pays for it

    mixed = grain.MapDataset.mix(_shuffled(sources, seed), weights)
    return mixed.seed(seed).random_map(ToExample(sources, stage, config))


def _shuffled(sources: Sequence[Sequences], seed: int) -> list["grain.MapDataset"]:
    import grain

    return [grain.MapDataset.source(source).shuffle(seed=seed + i).repeat() for i, source in enumerate(sources)]


def names_in(
    sources: Sequence[Sequences], weights: Sequence[float], seed: int, batch_size: int, number: int
) -> list[str]:
    """Which sequences global batch `number` is made of: the dataset of each, and the first line of its name.

    Those of the windows: with foreign_rate the context of some is of other documents, which are not named.
    """
    import grain

    named = [
        records.map(lambda record, path=source.records.path: f"{path.name}/{record['name'].decode().splitlines()[0]}")
        for source, records in zip(sources, _shuffled(sources, seed), strict=True)
    ]
    mixed = grain.MapDataset.mix(named, weights)
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


def open_mix(
    data: Path, mix: dict[str, float], stage: Stage, config: ExampleConfig, split: str = "train"
) -> list[Sequences]:
    """The datasets below `data` that `mix` names; `data` itself where it names none. All of one tokenizer."""
    check_mix(data, mix)
    sources = [Sequences(data / name, stage, config, split) for name in mix or [""]]
    fingerprints = {source.records.tokenizer.fingerprint() for source in sources}
    if len(fingerprints) > 1:
        raise ValueError(f"{data}: {', '.join(mix)} were tokenised with different tokenizers: prepare them again")
    return sources


def check_mix(data: Path, mix: dict[str, float]) -> None:
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
