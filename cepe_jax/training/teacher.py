"""A teacher's probabilities for sequences, prepared: stage ceped then needs no teacher in its steps.

The result is a dataset whose record i belongs to record i of the sequences. What imports jax is imported where a unit
is worked on: the script's other commands start many processes that need none.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cepe_jax.config import Compute, Dtype
from cepe_jax.data.builder import Builder, ShardWriter, array, token_dtype
from cepe_jax.data.examples import TEACHER
from cepe_jax.data.records import Records, joins, opened, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units

CHUNK = 512  # positions whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(JobConfig):
    model: Path  # a directory in our format: its decoder is the teacher
    data: Path  # a dataset of sequences, each of them one example
    out: Path  # gets the dataset of probabilities
    window: int = 2048  # tokens that the student's decoder reads; the teacher's expectation after each is stored
    context: int = 2048  # tokens before them, which the student reads in chunks
    top_k: int = 50  # likeliest tokens that are stored
    batch_size: int = 8  # sequences at once
    dtype: Dtype = "float32"  # type of weights and activations

    def __post_init__(self):
        super().__post_init__()
        for name in ("window", "context", "top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")


def features_of(dtype, top_k: int) -> dict:
    """For each token of the window the likeliest next ones, and their probabilities with the rest's mass at the end."""
    return {"teacher_index": array(dtype, None, top_k), "teacher_prob": array(np.float16, None, top_k + 1)}


@one_job
def teach(config: TeacherConfig) -> None:
    """A dataset at `config.out` of what the teacher expects in the window of each sequence."""
    base = Records(config.data, "train")
    vocab_size, model_hash = check(config, base)
    settings = config.identity("out", "batch_size") | {"data": base.digest, "model": model_hash}
    builder = Builder(config.out, settings, base.tokenizer)
    if builder.finished:
        return
    sizes = [shard["records"] for shard in base.facts["shards"]]
    units = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    dtype = token_dtype(vocab_size)
    work = TeachUnit(config, len(units), dtype, base.digest)
    job = replace(config, workers=config.workers or 1)  # an accelerator is one process's
    marks = run_units(builder, units, sizes, work, job, "teach, sequences")
    if marks is None:
        return
    facts = {name: getattr(config, name) for name in ("window", "context", "top_k")}
    facts |= {"tokenizer": base.index["tokenizer"], "joins": joins(base, config.out)}
    builder.register(TEACHER, features_of(dtype, config.top_k), marks, facts)


def check(config: TeacherConfig, base: Records) -> tuple[int, str]:
    """The size of the teacher's vocabulary, and the hash of its weights; ValueError where it cannot teach the data."""
    import jax

    from cepe_jax.weights.source import check_positions, open_ours

    span = config.context + config.window
    length = base.index.get("length", 0)
    if not span <= length < 2 * span:
        raise ValueError(
            f"{config.data}: its records are no sequences of {span} tokens, context and window, for one example each: "
            f"sample them with --length={span}"
        )
    base.tokenizer.check_is_of(config.model)
    directory = open_ours(config.model)
    if directory.base_hash is None:
        raise ValueError(f"{config.model} is an encoder: give the directory of a decoder")
    check_positions(directory, span)
    vocab_size = directory.files.tensors["decoder.embed"].shape[0]
    if vocab_size < (needed := max(base.tokenizer.vocab_size, config.top_k)):
        raise ValueError(
            f"the teacher's vocabulary of {vocab_size} is below {needed}, top_k or the ids of {config.data}: "
            f"change one of them"
        )
    if config.batch_size % jax.device_count():
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {jax.device_count()} devices")
    return vocab_size, directory.base_hash


@functools.lru_cache(maxsize=1)
def opened_teacher(config: TeacherConfig) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return `teacher_top` of up to `batch_size` sequences; the model, cut over all devices, is loaded once."""
    import jax

    from cepe_jax.sharding import make_mesh, place_batch
    from cepe_jax.training.objectives import teacher_top
    from cepe_jax.weights.source import load

    mesh = make_mesh(fsdp=jax.device_count())
    with jax.set_mesh(mesh):
        decoder = load(config.model, Compute(config.dtype)).decoder
    run = jax.jit(lambda decoder, tokens_BS: teacher_top(decoder, tokens_BS, config.window, config.top_k, CHUNK))

    def expects(tokens_BS: np.ndarray) -> dict[str, np.ndarray]:
        filled = np.pad(tokens_BS, ((0, config.batch_size - len(tokens_BS)), (0, 0)))
        with jax.set_mesh(mesh):
            taught = run(decoder, place_batch({"tokens": filled}, mesh, config.batch_size)["tokens"])
        return {name: np.asarray(x)[: len(tokens_BS)] for name, x in taught.items()}

    return expects


@dataclass(frozen=True)
class TeachUnit:
    """The work on a shard of sequences: what is expected in their windows, in a shard of its own."""

    config: TeacherConfig
    num_units: int
    dtype: type  # of token ids
    digest: str  # of the sequences

    def __call__(self, number: int, first: int, count: int) -> Work:
        config = self.config
        base, expects = opened(config.data, "train", self.digest), opened_teacher(config)
        path = shard_path(config.out, TEACHER, "train", number, self.num_units)
        shard = ShardWriter(path, features_of(self.dtype, config.top_k))
        for start in range(first, first + count, config.batch_size):
            records = [base[n] for n in range(start, min(start + config.batch_size, first + count))]
            tokens = [record["tokens"][: config.context + config.window] for record in records]
            taught = expects(np.stack(tokens).astype(np.int32))
            for record, index, prob in zip(records, *taught.values(), strict=True):
                result = {"teacher_index": index.astype(self.dtype), "teacher_prob": prob.astype(np.float16)}
                shard.write(result, record["domain"], config.window)
                yield 1, config.window
        return {"splits": {"train": shard.close()}}
