"""A reference's log-probabilities of pairs of answers, prepared: stage dpo then trains whatever it is told to.

The result is a dataset whose record i belongs to pair i. As in `teacher.py`, what imports jax is imported late.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cepe_jax.config import CepeConfig, Compute, DecoderConfig, Dtype
from cepe_jax.data.builder import Builder, ShardWriter, array
from cepe_jax.data.examples import REFERENCE, Example, ExampleConfig
from cepe_jax.data.recipes import PairsOfAnswers
from cepe_jax.data.records import PREFERENCES, Record, Records, joins, opened, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units

CHUNK = 512  # positions whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(JobConfig):
    model: Path  # a directory in our format: the model that training starts from
    data: Path  # a dataset of pairs of answers
    out: Path  # gets the dataset of log-probabilities
    split: str = "train"  # split of the pairs
    window: int = 4096  # tokens of a text at most
    num_chunks: int = 16  # chunks of context that an encoder reads
    chunk_length: int = 256  # tokens of a chunk
    batch_size: int = 8  # pairs at once
    dtype: Dtype = "float32"  # type of weights and activations

    def __post_init__(self):
        super().__post_init__()
        ExampleConfig(self.window, self.num_chunks, self.chunk_length)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give a number above 0")


def features_of() -> dict:
    """Return the features: the log-probabilities of the better and of the worse answer."""
    return {"reference": array(np.float32, 2)}


def recipe_for(config: ReferenceConfig) -> PairsOfAnswers:
    from cepe_jax.weights.source import open_ours

    examples = ExampleConfig(config.window, config.num_chunks, config.chunk_length)
    return PairsOfAnswers(examples, isinstance(open_ours(config.model).config, CepeConfig))


@one_job
def refer(config: ReferenceConfig) -> None:
    """A dataset at `config.out` of the log-probabilities that the model gives both answers of each pair."""
    import jax

    from cepe_jax.weights.source import open_ours

    base, directory, recipe = Records(config.data, config.split), open_ours(config.model), recipe_for(config)
    if base.name != PREFERENCES:
        raise ValueError(f"{config.data} holds {base.name}: prepare pairs of answers with prepare_data.py preferences")
    if type(directory.config) not in (CepeConfig, DecoderConfig):
        raise ValueError(f"{config.model} writes no text: give the directory of a decoder or a CEPE")
    base.tokenizer.check_is_of(config.model)
    known = getattr(directory.config, "decoder", directory.config).vocab_size
    if known < base.tokenizer.vocab_size:
        raise ValueError(
            f"{config.model} knows {known} ids, and {config.data} has {base.tokenizer.vocab_size}: give its model"
        )
    if config.batch_size % jax.device_count():
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {jax.device_count()} devices")
    settings = config.identity("out", "batch_size") | {"data": base.digest, "model": directory.hashes.all}
    builder = Builder(config.out, settings, base.tokenizer)
    if builder.finished:
        return
    sizes = [shard["records"] for shard in base.facts["shards"]]
    units = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    work = ReferUnit(config, len(units), base.digest)
    marks = run_units(builder, units, sizes, work, replace(config, workers=config.workers or 1), "refer, pairs")
    if marks is None:
        return
    chunks = [config.num_chunks, config.chunk_length] if recipe.reads_documents else []
    facts = {
        "tokenizer": base.index["tokenizer"],
        "joins": joins(base, config.out),
        "chunks": chunks,
        "window": config.window,
    }
    builder.register(REFERENCE, features_of(), marks, facts)


@functools.lru_cache(maxsize=1)
def opened_reference(config: ReferenceConfig) -> Callable[[Sequence[Record]], np.ndarray]:
    """Return a function from up to `batch_size` pairs to their log-probabilities (n, 2); the model is loaded once."""
    import jax

    from cepe_jax.sharding import make_mesh, place_batch
    from cepe_jax.training.objectives import log_probabilities
    from cepe_jax.weights.source import load

    mesh, recipe = make_mesh(fsdp=jax.device_count()), recipe_for(config)
    with jax.set_mesh(mesh):
        model = load(config.model, Compute(config.dtype))
    run = jax.jit(lambda model, batch: log_probabilities(model, batch, CHUNK))

    def log_probabilities_of(records: Sequence[Record]) -> np.ndarray:
        made: list[Example] = [recipe(record, np.random.default_rng(0), None) for record in records]
        made += made[-1:] * (config.batch_size - len(made))
        batch = {name: np.stack([example[name] for example in made]) for name in made[0]}
        with jax.set_mesh(mesh):
            found = run(model, place_batch(batch, mesh, config.batch_size))
        found = np.asarray(found)[: len(records)]
        if not np.isfinite(found).all():
            raise ValueError(f"log-probabilities of {config.model} are not finite: its weights may be damaged")
        return found

    return log_probabilities_of


@dataclass(frozen=True)
class ReferUnit:
    """The work on a shard of pairs, in a shard of its own."""

    config: ReferenceConfig
    num_units: int
    digest: str  # of the pairs

    def __call__(self, number: int, first: int, count: int) -> Work:
        config = self.config
        base, log_probabilities_of = opened(config.data, config.split, self.digest), opened_reference(config)
        shard = ShardWriter(shard_path(config.out, REFERENCE, config.split, number, self.num_units), features_of())
        for start in range(first, first + count, config.batch_size):
            records = [base[n] for n in range(start, min(start + config.batch_size, first + count))]
            fit = [max(len(record["chosen"]), len(record["rejected"])) <= config.window for record in records]
            found = np.full((len(records), 2), np.nan, np.float32)  # of texts that are too long to be trained on
            if any(fit):
                found[fit] = log_probabilities_of([record for record, fits in zip(records, fit, strict=True) if fits])
            for record, both in zip(records, found, strict=True):
                shard.write({"reference": both}, record["domain"], 1)
                yield 1, len(record["chosen"]) + len(record["rejected"])
        return {"splits": {config.split: shard.close()}}
