"""Features of examples: gradients of what a run trains, one for each example, in the shape of Adam's updates.

TAGCOS (arXiv 2407.15235) and LESS (arXiv 2402.04333): at some checkpoints of a run, an example's gradient moves the
stored moments as a step of Adam would; their quotient is projected, and scaled to length 1.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cepe_jax.data.loader import Source, open_source
from cepe_jax.data.recipes import Mixture
from cepe_jax.identity import as_json
from cepe_jax.model.parts import Model, Parts, split
from cepe_jax.parsing import read_json, typed
from cepe_jax.selection.projection import project
from cepe_jax.settings import decode
from cepe_jax.sharding import make_mesh, partition_spec, place_batch
from cepe_jax.training.objectives import Batch, Objective
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import CHECKPOINTS, agreed_template, starting_model
from cepe_jax.training.settings import TrainConfig, compute_of, recipe_of, run_identity, sizes_of
from cepe_jax.training.stages import STAGES
from cepe_jax.training.trainer import TrainState, initial_state
from cepe_jax.weights.checkpoint import Checkpoints, Facts, digests_of

Array = jax.Array


class Dataset(TypedDict):
    """The data of a run, as it stored them."""

    tokenizer: str  # fingerprint
    sequences: list[str]  # digests


@dataclass(frozen=True)
class WarmUp:
    """A run of training, finished or not, whose checkpoints give the gradients."""

    path: Path
    config: TrainConfig
    resolved: dict[str, Any]  # the settings and the data, as the run stored them
    tokenizer: str  # fingerprint of the tokenizer of its data

    @classmethod
    def at(cls, path: Path) -> "WarmUp":
        """Read the settings of the run in `path`; ValueError if it has no second moments, as with Muon."""
        place = path / "config.json"
        if not place.exists():
            raise FileNotFoundError(f"{place}: no run: give the --out of a run of train.py")
        resolved = typed(read_json(place), dict[str, Any], str(place))
        dataset = typed(resolved.get("dataset"), Dataset, f"{place}: dataset")
        config = decode(TrainConfig, {name: value for name, value in resolved.items() if name != "dataset"})
        if config.optimizer.kind != "adamw":
            raise ValueError(
                f"{path}: its optimizer.kind is {config.optimizer.kind}, without Adam's moments of the layers: warm up "
                f"with adamw"
            )
        return cls(path, config, resolved, dataset["tokenizer"])

    def identity(self) -> dict:
        """Return what the run's checkpoints must have in common with it, except for the frozen weights."""
        return run_identity(self.resolved)

    def facts(self, steps: Sequence[int]) -> list[Facts]:
        """Return the facts of the checkpoints of these steps."""
        with self._checkpoints(self.identity()) as checkpoints:
            return [checkpoints.facts(step) for step in steps]

    def source(self, data: Path, split: str) -> Source:
        """Return the records of a dataset as the run's examples; ValueError unless the run could have read them."""
        source = open_source(data, recipe_of(self.config), split)
        STAGES[self.config.stage].check(self.config, data, [source])
        if source.records.tokenizer.fingerprint() != self.tokenizer:
            raise ValueError(
                f"{data} was tokenised with another tokenizer than the data of {self.path}: prepare it with the same"
            )
        agreed_template(self.config, [source])
        if (each := len(source.only(np.array(source.numbers[:1])))) != 1:
            raise ValueError(
                f"{data}: its records make {each} examples each: sample them with --length={source.size}, one for each"
            )
        return source

    def _checkpoints(self, identity: dict):
        directory = self.path / CHECKPOINTS
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: the run has no checkpoints: start it, with --keep=0")
        return contextlib.closing(Checkpoints(directory, identity, reader=True))

    def states(self, steps: Sequence[int], trainable: Parts, frozen: Parts) -> list[TrainState]:
        """Return the states at these steps, on the present mesh; ValueError if the model is another one."""
        optimizer = self.config.optimizer.build(self.config.optimizer.schedule(self.config.steps))
        like = jax.eval_shape(lambda trainable: initial_state(trainable, optimizer), trainable)
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
        digests = digests_of(frozen)
        with self._checkpoints(self.identity() | {"frozen": digests}) as checkpoints:
            for step in steps:
                if checkpoints.facts(step)["identity"].get("frozen") != as_json(digests):
                    start = self.config.cepe or self.config.decoder or self.config.encoder
                    raise ValueError(
                        f"{checkpoints.directory / str(step)} is of another model: the frozen weights of {start} are "
                        f"not those of its training"
                    )
            return [checkpoints.read(step, like) for step in steps]


def checkpoint_weights(config: TrainConfig, steps: Sequence[int]) -> np.ndarray:
    """Return the mean learning rate of the steps up to each checkpoint, from the one before; they sum to 1."""
    rates = np.asarray(jax.vmap(config.optimizer.schedule(config.steps))(jnp.arange(max(steps))), np.float64)
    means = np.array([rates[first:last].mean() for first, last in zip((0, *steps), steps, strict=False)])
    if not means.sum() > 0:
        raise ValueError(f"the learning rates up to steps {list(steps)} are 0: give --weights, or later steps")
    return means / means.sum()


def flat(tree) -> Array:
    """Return all numbers of a tree in the order of its leaves: (P)."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def example_gradients(objective: Objective, kind: type[Model], trainable: Parts, frozen: Parts, batch: Batch) -> Array:
    """Return the gradient of each example's own loss with respect to all that trains: (B, P)."""

    def gradient(example) -> Array:
        rows = jax.tree.map(lambda x: x[None], example)

        def loss(trainable: Parts) -> Array:
            return objective(kind.from_parts(trainable | frozen), rows, objective.weights(rows))[0]

        return flat(jax.grad(loss)(trainable))

    return jax.vmap(gradient)(batch)


def adam_update(gradient: Array, mean: Array, square: Array, config: OptimizerConfig) -> Array:
    """Return m' / sqrt(v' + eps), for moments m' and v' that this gradient has joined; no bias is corrected.

    The epsilon stands under the root, as in LESS: with v' below it the quotient is far smaller than Adam's own update.
    """
    mean = config.beta1 * mean + (1 - config.beta1) * gradient
    square = config.beta2 * square + (1 - config.beta2) * gradient**2
    return mean / jnp.sqrt(square + config.eps)


def update_function(
    objective: Objective, kind: type[Model], optimizer: OptimizerConfig, dim: int, seed: int, mesh: Mesh
) -> Callable[..., Array]:
    """Return `updates(trainable, mean_P, square_P, frozen, batch)`: projected updates (B, dim), each of length 1.

    The examples are cut over the mesh. Each of its devices has all weights, and computes its examples by itself: within
    one, the batch of the model is a single example.
    """

    def updates(trainable: Parts, mean_P: Array, square_P: Array, frozen: Parts, batch: Batch) -> Array:
        gradients_BP = example_gradients(objective, kind, trainable, frozen, batch)
        updates_BF = project(adam_update(gradients_BP, mean_P, square_P, optimizer), dim, seed)
        lengths_B1 = jnp.linalg.norm(updates_BF, axis=1, keepdims=True)
        return updates_BF / jnp.where(lengths_B1 == 0, 1, lengths_B1)

    whole, rows = PartitionSpec(), partition_spec(("batch",))
    specs = {"in_specs": (whole, whole, whole, whole, rows), "out_specs": rows}
    return jax.jit(jax.shard_map(updates, mesh=mesh, check_vma=False, **specs))


def feature_function(
    warm_up: WarmUp, steps: Sequence[int], weights: Sequence[float], dim: int, seed: int, source: Source
) -> Callable[[Sequence[int], int], np.ndarray]:
    """Return a function from the numbers of up to `batch_size` records, and that size, to features (n, dim), fp32.

    A feature is the weighted sum of the updates at the checkpoints. Where contexts are masked at random, a record's
    mask is drawn from the seed and its number.
    """
    config, recipe = warm_up.config, recipe_of(warm_up.config)
    tokenizer, mesh = source.records.tokenizer, make_mesh(data=jax.device_count())
    objective, mixture = STAGES[config.stage].objective(config), Mixture([source])
    with jax.set_mesh(mesh):
        compute, sizes = compute_of(config, jax.default_backend()), sizes_of(config, tokenizer.vocab_size)
        model = starting_model(config, sizes, compute, tokenizer)
        trainable, frozen = split(model, config.train)
        states = warm_up.states(steps, trainable, frozen)
    moments = [tuple(flat(optax.tree.get(state.opt_state, name)) for name in ("mu", "nu")) for state in states]
    points = [(state.trainable, *pair) for state, pair in zip(states, moments, strict=True)]
    updates = update_function(objective, type(model), config.optimizer, dim, seed, mesh)

    def features_of(numbers: Sequence[int], batch_size: int) -> np.ndarray:
        examples = [
            recipe(source.only(np.array([number]))[0], np.random.default_rng((seed, number)), mixture)
            for number in numbers
        ]
        examples += examples[-1:] * (batch_size - len(examples))
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        with jax.set_mesh(mesh):
            placed = place_batch(batch, mesh, batch_size)
            of_points = [updates(*point, frozen, placed) for point in points]
        features = sum(weight * np.asarray(one) for weight, one in zip(weights, of_points, strict=True))
        if not np.isfinite(features).all():
            bad = next(n for n, row in zip(numbers, features, strict=False) if not np.isfinite(row).all())
            raise ValueError(f"{source.path}: the gradient of record {bad} is not finite in {warm_up.path}")
        return features[: len(numbers)].astype(np.float32)

    return features_of
