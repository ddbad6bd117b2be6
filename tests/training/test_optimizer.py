"""Muon against singular vectors, and AdamW for what Muon leaves out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.models import relative_error

from cepe_jax.model.parts import split
from cepe_jax.training.optimizer import OptimizerConfig

RATE, DECAY = 0.1, 0.3


@pytest.fixture(scope="module")
def updates(cepe):
    """The weights of a model, a gradient, and its first updates by Muon and by AdamW with Nesterov momentum."""
    trained, _ = split(cepe, ("decoder", "encoder", "cross"))
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), trained)

    def first(optimizer: optax.GradientTransformation) -> dict[str, np.ndarray]:
        update, _ = jax.jit(optimizer.update)(gradient, optimizer.init(trained), trained)
        return named(update)

    muon = OptimizerConfig("muon", clip_norm=1e9, weight_decay=DECAY).build(optax.constant_schedule(RATE))
    return named(trained), named(gradient), first(muon), first(optax.adamw(RATE, weight_decay=DECAY, nesterov=True))


def named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf[...]) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        *((f"{stack}.{name}", 1) for stack in ("decoder.layers.attention", "cross") for name in ("q", "k", "v")),
        *((f"{stack}.o", 2) for stack in ("decoder.layers.attention", "cross")),
        *((f"{part}.layers.mlp.{name}", 1) for part in ("decoder", "encoder") for name in ("gate", "up", "down")),
    ],
)
def test_updates_of_matrices_are_orthogonal(name, inputs, updates):
    """U V' of each layer's gradient, whose heads are one axis, times 0.2 sqrt(max(rows, columns)) and the rate.

    Five Newton-Schulz steps bring singular values near 1, not to it.
    """
    weights, gradient, by_muon, _ = updates
    decayed = by_muon[name] + RATE * DECAY * weights[name]
    for layer, update in zip(gradient[name], decayed, strict=True):
        rows = int(np.prod(layer.shape[:inputs]))
        left, values, right = np.linalg.svd(layer.reshape(rows, -1), full_matrices=False)
        wanted = 0.2 * RATE * np.sqrt(max(left.shape[0], right.shape[1]))
        turned = -left.T @ update.reshape(rows, -1) @ right.T / wanted
        kept = values > 0.1 * values[0]  # five steps do not lift smaller ones
        assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-4
        assert ((np.diag(turned)[kept] > 0.6) & (np.diag(turned)[kept] < 1.3)).all()


def test_adamw_updates_the_rest(updates):
    _, gradient, by_muon, by_adamw = updates
    rest = {name for name in gradient if relative_error(by_muon[name], by_adamw[name]) < 1e-5}
    stacks = (".attention.", ".mlp.", "cross.q", "cross.k", "cross.v", "cross.o")
    assert rest == {name for name in gradient if not any(stack in name for stack in stacks)}
    assert {"decoder.embed", "decoder.norm.scale", "encoder.layers.mlp_norm.scale"} <= rest


def test_an_unknown_optimiser():
    with pytest.raises(ValueError, match="'lion'.*adamw.*muon"):
        OptimizerConfig("lion")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [0.0, -1.0, math.inf, math.nan]),
        ("clip_norm", [0.0, math.nan]),
        ("eps", [0.0, math.nan]),
        ("warmup_fraction", [-0.1, 1.0, math.nan]),
        ("beta1", [-0.1, 1.0, math.nan]),
        ("beta2", [1.5, math.nan]),
        ("weight_decay", [-0.1, math.inf, math.nan]),
    ],
)
def test_every_setting_has_a_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"optimizer.{name} is {value}: "):
            OptimizerConfig(**{name: value})
