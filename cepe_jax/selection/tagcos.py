"""TAGCOS: a small part of a dataset whose gradients stand for those of all of it (arXiv 2407.15235).

The result is a dataset of numbers of records, which training reads in the place of the whole one. As in
`training/reference.py`, what imports jax is imported late.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from cepe_jax.data.builder import Builder, ShardWriter, array
from cepe_jax.data.records import CORESET, digest_of, shard_path
from cepe_jax.data.units import JobConfig, Work, one_job, run_units
from cepe_jax.directories import one_writer_in, relative_to, staged
from cepe_jax.identity import as_json
from cepe_jax.parsing import Seed
from cepe_jax.selection.coreset import Choice, PursuitConfig, clusters_of, coreset, import_sklearn, repeats_of

if TYPE_CHECKING:
    from cepe_jax.data.loader import Source
    from cepe_jax.selection.gradients import WarmUp

log = logging.getLogger(__name__)
FEATURES = Path("units/features")  # below `out`, unless they have another place


@dataclass(frozen=True, kw_only=True)
class TagcosConfig(JobConfig):
    run: Path  # the --out of a run of train.py: the warm-up, whose checkpoints give the gradients
    steps: tuple[int, ...]  # its checkpoints, by their steps, ascending
    data: epath.Path  # the dataset to select from: the run's, or another one of its kind and tokenizer
    out: Path  # gets the coreset
    split: str = "train"  # split of the data
    fraction: float = 0.05  # share of the examples that is selected, exactly
    clusters: int = 100  # clusters of k-means
    starts: int = 1  # k-means runs, each from other centroids, of which the best counts
    dim: int = 8192  # numbers of a feature, after the projection
    weights: tuple[float, ...] = ()  # of the checkpoints; []: the mean learning rates of the steps up to each
    pursuit: PursuitConfig = PursuitConfig()  # the choice within a cluster
    use_weights: bool = False  # records come in proportion to their weights; false: each once, as in the paper
    repeats: int = 4  # use_weights: times that a record comes on average, before any order begins again
    features: Path | None = None  # gets the features, which coresets of one warm-up may share; None: below `out`
    batch_size: int = 8  # examples at once
    seed: Seed = 0  # draws signs, masks of contexts and the first centroids

    def __post_init__(self):
        super().__post_init__()
        if not self.steps or sorted(set(self.steps)) != list(self.steps) or self.steps[0] < 1:
            raise ValueError(f"steps is {list(self.steps)}: give steps of checkpoints, ascending, as [10, 20, 30]")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}: give a share of the data, above 0 and at most 1")
        if self.weights and (len(self.weights) != len(self.steps) or not all(0 <= w < np.inf for w in self.weights)):
            raise ValueError(
                f"weights is {list(self.weights)}: give one of 0 or more for each of {len(self.steps)} steps"
            )
        if self.weights and not any(self.weights):
            raise ValueError(f"weights is {list(self.weights)}: give one above 0")
        if self.features is not None and self.features.resolve() == self.out.resolve():
            raise ValueError(f"features is out, {self.out}: give another directory, or leave it out")
        for name in ("clusters", "starts", "dim", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")


OF_FEATURES = "steps", "split", "dim", "weights", "seed"  # settings by which features are what they are


def features_of(config: TagcosConfig) -> dict:
    """Return the features of a record: which record of the data, and how often it comes."""
    features = {"number": array(np.int64), "repeats": array(np.int32)}
    return features | ({"weight": array(np.float32)} if config.use_weights else {})


@one_job
def tagcos(config: TagcosConfig) -> None:
    """A dataset at `config.out` of the records that are selected; `mix` names it as any other."""
    import jax

    from cepe_jax.selection.gradients import WarmUp

    if config.batch_size % jax.device_count():
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {jax.device_count()} devices")
    import_sklearn()  # not to be missed after hours of gradients
    warm_up = WarmUp.at(config.run)
    facts, source = warm_up.facts(config.steps), warm_up.source(config.data, config.split)
    budget = round(config.fraction * len(source.numbers))
    if not budget:
        raise ValueError(f"fraction {config.fraction} of {len(source.numbers)} examples is less than one: raise it")
    if config.clusters > len(source.numbers):
        raise ValueError(f"clusters is {config.clusters}, and there are {len(source.numbers)} examples: lower it")
    inputs = {"data": source.digest, "checkpoints": [digest_of(as_json(one)) for one in facts]}
    settings = config.identity("run", "data", "out", "features", "batch_size") | inputs
    builder = Builder(config.out, settings, source.records.tokenizer)
    if builder.finished:
        return
    place = config.features or config.out / FEATURES
    with one_writer_in(place, config.shard.replace("/", "-of-")):
        marked = Builder(place, {name: settings[name] for name in OF_FEATURES} | inputs)
        sizes = [shard["records"] for shard in source.records.facts["shards"]]
        units = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
        if any(marked.marked(number, unit) is None for number, unit in enumerate(units)):
            for line in cost(config, warm_up, source):
                log.info("%s", line)
        work = FeatureUnit(replace(config, features=place), source.digest)
        job = replace(config, workers=config.workers or 1)  # an accelerator is one process's
        marks = run_units(marked, units, sizes, work, job, "gradients, examples")
    if marks is None:
        return
    with one_writer_in(config.out, "selection"):  # of jobs that end together one selects
        if not builder.finished:
            features_ND = read_features(place, [mark["rows"] for mark in marks], config.dim)
            try:
                register(config, builder, source, features_ND, budget)
            except ValueError:
                builder.forget()  # another choice may be made here, from the same features
                raise


def features_path(place: Path, unit: int) -> Path:
    return place / f"{unit:05}.npy"


def read_features(place: Path, rows: Sequence[int], dim: int) -> np.ndarray:
    """Return the features of all units, which have these numbers of rows; ValueError if a file is damaged."""
    parts = []
    for unit, count in enumerate(rows):
        path = features_path(place, unit)
        try:
            parts.append(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            reason = str(error).partition("\n")[0]
        else:
            reason = f"{list(parts[-1].shape)}, and not {[count, dim]}"
            if parts[-1].shape == (count, dim):
                continue
        raise ValueError(f"{path}: missing or damaged ({reason}): remove {place}, and run it again")
    return np.concatenate(parts)


def cost(config: TagcosConfig, warm_up: "WarmUp", source: "Source") -> Iterator[str]:
    """Yield lines on what the features will take, by sizes alone."""
    import jax

    from cepe_jax.cost import gib
    from cepe_jax.selection.projection import projection_flops
    from cepe_jax.training.settings import sizes_of
    from cepe_jax.training.stages import STAGES
    from cepe_jax.weights.build import abstract_parts

    run, examples, points = warm_up.config, len(source.numbers), len(config.steps)
    sizes = sizes_of(run, source.records.tokenizer.vocab_size)
    parts = abstract_parts(sizes)
    parameters = sum(leaf.size for name in run.train for leaf in jax.tree.leaves(parts[name]))
    passes = examples * points
    gradients = passes * STAGES[run.stage].flops(run, sizes, [source]).train
    projections = passes * projection_flops(parameters, config.dim)
    yield f"{examples:,} examples, {points} checkpoints, {parameters:,} parameters train ({', '.join(run.train)})"
    yield (
        f"{gradients:.3e} FLOP for gradients, {projections:.3e} for projections to {config.dim:,} numbers "
        f"({projections / (gradients + projections):.0%} of both)"
    )
    on_device = 4 * config.batch_size // jax.device_count() * parameters
    yield f"features: {gib(4 * examples * config.dim)}; gradients: {gib(on_device)} a device, and as much for updates"


@functools.lru_cache(maxsize=1)
def opened_features(config: TagcosConfig, digest: str) -> "tuple[Source, Callable[[Sequence[int], int], np.ndarray]]":
    """Return the data and the function from records to features; the models are loaded once."""
    from cepe_jax.selection.gradients import WarmUp, checkpoint_weights, feature_function

    warm_up = WarmUp.at(config.run)
    source = warm_up.source(config.data, config.split)
    if source.digest != digest:
        raise ValueError(f"{config.data} has changed since this run began: start it again")
    weights = np.array(config.weights, np.float64)
    weights = weights / weights.sum() if len(weights) else checkpoint_weights(warm_up.config, config.steps)
    log.info("weights of the checkpoints: %s", ", ".join(f"{weight:.4f}" for weight in weights))
    return source, feature_function(warm_up, config.steps, weights, config.dim, config.seed, source)


@dataclass(frozen=True)
class FeatureUnit:
    """The work on a shard of the data: the features of those of its records that a window holds, in a file."""

    config: TagcosConfig
    digest: str  # of the data

    def __call__(self, number: int, first: int, count: int) -> Work:
        config = self.config
        source, of_records = opened_features(config, self.digest)
        numbers = [n for n in source.numbers if first <= n < first + count]
        features = np.zeros((len(numbers), config.dim), np.float32)
        for start in range(0, len(numbers), config.batch_size):
            some = numbers[start : start + config.batch_size]
            features[start : start + len(some)] = of_records(some, config.batch_size)
            yield len(some), len(some) * source.size
        yield count - len(numbers), 0
        with staged(features_path(config.features, number)) as place, open(place, "wb") as file:
            np.save(file, features)
        return {"rows": len(numbers)}


def register(config: TagcosConfig, builder: Builder, source: "Source", features_ND: np.ndarray, budget: int) -> None:
    """Select by the features of the records `source.numbers`, and make the result a dataset."""
    labels_N, centroids_CD = clusters_of(features_ND, config.clusters, config.seed, config.starts)
    choices = coreset(features_ND, labels_N, centroids_CD, budget, config.pursuit)
    if fills := sum(choice.fills for choice in choices):
        log.info("%d of %d examples fill budgets of clusters whose pursuit ended early", fills, budget)
    rows, weights = (np.concatenate([getattr(choice, name) for choice in choices]) for name in ("rows", "weights"))
    repeats = repeats_of(weights, config.repeats * budget) if config.use_weights else np.ones(budget, int)
    lengths = lengths_of(source)
    shard = ShardWriter(shard_path(config.out, CORESET, config.split, 0, 1), features_of(config))
    for n in np.argsort(rows):
        number = int(source.numbers[rows[n]])
        record = {"number": np.int64(number), "repeats": np.int32(repeats[n])}
        record |= {"weight": np.float32(weights[n])} if config.use_weights else {}
        shard.write(record, *lengths[number])
    marks = [{"splits": {config.split: shard.close()}}]
    selects = {"path": relative_to(config.data, config.out), "split": config.split, "digest": source.digest}
    facts = {"tokenizer": source.records.index["tokenizer"], "selects": selects}
    builder.register(CORESET, features_of(config), marks, facts, notes(choices))


def lengths_of(source: "Source") -> dict[int, tuple[str, int]]:
    """Return the domain and the length in tokens of each record."""
    tables = [source.records.lengths(shard) for shard in range(len(source.records.facts["shards"]))]
    return {
        int(number): (domain, int(length))
        for table in tables
        for domain, pairs in table.items()
        for number, length in zip(*pairs, strict=True)
    }


def notes(choices: Sequence[Choice]) -> str:
    """Return the clusters as a table for people."""
    lines = [
        "",
        "The clusters. Residuals are relative to the centroid: of the weighted sum of the selected, and of their plain "
        "mean. Fills are those that the pursuit did not choose.",
        "",
        "| cluster | examples | selected | fills | residual, weighted | residual, mean |",
        "|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(choices):
        residuals = f"{one.weighted_residual:.3f} | {one.mean_residual:.3f}" if len(one.rows) else "- | -"
        lines.append(f"| {number} | {one.cluster_size:,} | {len(one.rows):,} | {one.fills:,} | {residuals} |")
    return "\n".join(lines) + "\n"
