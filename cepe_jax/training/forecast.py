"""A forecast of what a run will read, compute, hold and take, from sizes alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from cepe_jax.cost import CHIPS, Chip, chip_of, gib
from cepe_jax.data.loader import Sequences
from cepe_jax.sharding import abstract_mesh, shardings_of
from cepe_jax.training.settings import (
    TrainConfig,
    compute_of,
    mesh_of,
    recipe_of,
    tokens_of_step,
)
from cepe_jax.training.stages import STAGES
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.kinds import Config

USUAL_MFU = 0.4  # of a run that goes well


def forecast(config: TrainConfig, sizes: Config, sources: Sequence[Sequences]) -> Iterator[str]:
    """Yield lines on parameters, tokens, FLOPs, chip hours and memory, which sizes alone say; then on the devices.

    `sources` are the data, as far as they are at hand. ValueError, after the price, where the mesh does not divide the
    batch or the model, or the attention does not take it. The mesh's devices need not be at hand.
    """
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in abstract_parts(sizes).items()}
    trained = sum(count for name, count in counts.items() if name in config.train)
    vocabulary = getattr(sizes, "decoder", sizes).vocab_size
    frozen = sum(counts.values()) - trained
    yield f"{config.stage}: {trained:,} parameters train, {frozen:,} are frozen, vocabulary of {vocabulary:,}"
    here, kind = jax.device_count(), jax.devices()[0].device_kind
    mesh = abstract_mesh(**dataclasses.asdict(config.mesh.over(here)))
    tokens = tokens_of_step(config)
    yield from price(
        steps=config.steps,
        batch_size=config.batch_size,
        tokens=tokens,
        counted="windows" if recipe_of(config).size(None) == config.examples.window else "contexts and windows",
        flops=config.batch_size * STAGES[config.stage].flops(config, sizes, sources).train,
        devices=mesh.size,
        chips={kind: chip} if (chip := chip_of(kind)) else CHIPS,
    )
    mesh_of(config, here)
    held = held_bytes(config, sizes, mesh)
    each = ", ".join(f"{name} {gib(size)}" for name, size in held.items())
    yield f"memory a device: {gib(sum(held.values()))} and activations ({each})"
    elsewhere = "" if mesh.size == here else f" of {mesh.size} devices elsewhere"
    yield f"{here} x {kind}, mesh {dict(mesh.shape)}{elsewhere}"


def price(
    *,
    steps: int,
    batch_size: int,
    tokens: int,
    counted: str,
    flops: float,
    devices: int,
    chips: dict[str, Chip] = CHIPS,
) -> Iterator[str]:
    """Yield lines for people: `tokens` and `flops` are of a step, `counted` says which tokens.

    The hours are of each of `chips`, and of `devices` such chips together.
    """
    yield f"{steps:,} steps of {batch_size:,} sequences, {tokens:,} tokens in {counted}: {steps * tokens:,} tokens"
    yield f"{flops / 1e12:,.3f} TFLOP a step: {steps * flops:.3e} FLOP"
    hours = {name: steps * flops / USUAL_MFU / chip.peak_flops / 3600 for name, chip in chips.items()}
    each = (name + f" {_short(time)}" + f" ({_short(time / devices)})" * (devices > 1) for name, time in hours.items())
    together = f" (hours on {devices})" * (devices > 1)
    yield f"chip hours{together} at an MFU of {USUAL_MFU:.0%}: {', '.join(each)}"


def _short(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def held_bytes(config: TrainConfig, sizes: Config, mesh: AbstractMesh) -> dict[str, int]:
    """Bytes of a device's share of what a run holds through all steps, and of the gradients.

    ValueError where the mesh does not divide the model.
    """
    trains, parts = config.train, abstract_parts(sizes, compute_of(config, jax.default_backend()))
    trainable = {name: part for name, part in parts.items() if name in trains}
    frozen = {name: part for name, part in parts.items() if name not in trains}
    optimizer = config.optimizer.build(config.optimizer.schedule(config.steps))

    def share(tree, itemsize: int) -> int:
        places = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings_of(tree, mesh)), strict=True)
        return itemsize * sum(math.prod(place.shard_shape(x.shape)) for x, place in places)

    return {
        "frozen weights": share(frozen, jnp.dtype(config.dtype).itemsize),
        "weights that train": share(trainable, 4),
        "optimizer": share(jax.eval_shape(optimizer.init, trainable), 4),
        "gradients": share(trainable, 4),
    }


def epochs(steps: int, batch_size: int, examples: dict[str, int], weights: Sequence[float]) -> Iterator[str]:
    """Yield how often a run reads each dataset, of these numbers of examples and shares of the mixture."""
    for (name, count), weight in zip(examples.items(), weights, strict=True):
        times = steps * batch_size * weight / sum(weights) / count
        yield f"{name}: {times:,.2f} times each of its {count:,} examples"
