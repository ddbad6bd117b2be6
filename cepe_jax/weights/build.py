"""The tensors that a model consists of, one per layer, and a model built from them.

Names are the paths in the model's parts with the layer's number after the stack's: `decoder.layers.3.attention.q`,
`cross.0.q` (cross-attention counts in its own stack), `encoder.mlm_head.dense`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from cepe_jax.config import FLOAT32, Compute
from cepe_jax.model.parts import Model, Parts
from cepe_jax.progress import track
from cepe_jax.sharding import is_variable, shardings_of
from cepe_jax.weights.kinds import Config, kind_of

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # (name, index in our axes) -> that part of the tensor


class Source(Protocol):
    """A model at a path. Only its config is read until a tensor is asked for; then all are checked against it."""

    path: Path
    config: Config
    facts: dict  # of Hugging Face's config.json, beyond our config

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return a tensor, or a slice of it, by our name and in our layout; ValueError if the tensors are not whole."""
        ...

    def write_assets(self, to: Path) -> None:
        """Write the tokenizer, chat template and generation settings to directory `to`."""
        ...


def abstract_parts(config: Config, compute: Compute = FLOAT32) -> Parts:
    """Return the parts of this config's model with shapes for arrays; ValueError if it cannot be computed so."""
    return jax.eval_shape(lambda: kind_of(config).create(config, compute, key=jax.random.key(0)).parts)


def _is_stack(leaf: nnx.Variable) -> bool:
    return leaf.get_metadata()["axes"][0] == "layer"


def _leaves(parts: Parts) -> Iterator[tuple[list[str], nnx.Variable]]:
    """Yield each Variable with the names of its tensors: one for each layer of a stack."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts, is_leaf=is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if _is_stack(leaf):
            # A part's stack is its `layers`, or the part itself.
            stack, rest = re.fullmatch(r"(.*\.layers|[^.]*)\.(.*)", name).groups()
            yield [f"{stack}.{layer}.{rest}" for layer in range(leaf.shape[0])], leaf
        else:
            yield [name], leaf


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    shape_of = {}
    for names, leaf in _leaves(abstract_parts(config)):
        shape_of.update(dict.fromkeys(names, leaf.shape[1:] if _is_stack(leaf) else leaf.shape))
    return shape_of


def tensors_of(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a model in memory, fetched from the devices one by one, of all processes to each."""
    for names, leaf in _leaves(model.parts):
        if _is_stack(leaf):
            for layer, name in enumerate(names):
                yield name, _fetch(leaf[layer])
        else:
            yield names[0], _fetch(leaf[...])


def _fetch(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def build(config: Config, compute: Compute, read: Read, master: tuple[str, ...] = ()) -> Model:
    """The model of `config`, weights in the dtype of activations, filled through `read`.

    The weights of the parts named in `master` are float32 all the same.

    Under a mesh (`jax.set_mesh`) each array is born sharded, and only this process's slices of it are read.
    """
    parts = abstract_parts(config, compute)
    if unknown := set(master) - set(parts):
        raise ValueError(f"no part {', '.join(sorted(unknown))} to keep in float32: this model has {', '.join(parts)}")
    mesh = jax.sharding.get_mesh()
    treedef = jax.tree.structure(parts, is_leaf=is_variable)
    shardings = [None] * treedef.num_leaves if mesh.empty else jax.tree.leaves(shardings_of(parts, mesh))
    filled = []
    leaves = list(zip(_leaves(parts), shardings, strict=True))
    for (names, leaf), sharding in track(leaves, "loading weights"):
        weights = "float32" if names[0].split(".")[0] in master else compute.dtype
        filled.append(leaf.replace(_fill(names, leaf, sharding, weights, read)))
    return kind_of(config).model.from_parts(jax.tree.unflatten(treedef, filled))


def _fill(names: list[str], leaf: nnx.Variable, sharding, dtype: str, read: Read) -> jax.Array:
    slabs: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

    def slab(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(i.indices(size) for i, size in zip(index, leaf.shape, strict=True))
        if bounds not in slabs:
            out = np.empty([stop - start for start, stop, _ in bounds], dtype)
            if _is_stack(leaf):
                for row, layer in enumerate(range(*bounds[0])):
                    out[row] = read(names[layer], index[1:])
            else:
                out[...] = read(names[0], index)
            slabs[bounds] = out
        return slabs[bounds]

    if sharding is None:  # not committed to a device: beside what is made later, jit would compile again for it
        return jnp.asarray(slab((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, slab)
