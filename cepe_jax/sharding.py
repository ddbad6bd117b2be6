"""The place of arrays on a mesh: one table from logical axes to mesh axes. Nothing else knows the mesh's names."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "memory", "tensor")

# Logical axis -> mesh axes. Within one array a mesh axis is used once, by the first logical axis that names it.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "looked_up": ("data",),  # rows of a table whose width is split over fsdp
    "window": ("context",),  # tokens of a window in training, in the order of `balanced`
    "memory": ("memory",),
    "embed": ("context", "fsdp"),  # of a weight, which all that share the tokens share; rows take fsdp from its end
    "vocab": ("tensor",),
    "encoder_vocab": (),  # the tokenizer's vocabulary and a mask id: 32,001 divides by no useful number
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "length": (),
    "layer": (),
    "head_dim": (),
    None: (),
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    memory: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """A mesh over `devices`, or all there are; ValueError when the sizes do not multiply to their number."""
    shape, count = (data, fsdp, context, memory, tensor), jax.device_count() if devices is None else len(devices)
    if (product := math.prod(shape)) != count:
        sizes = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh {sizes} wants {product} devices and there are {count}: change the sizes")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def abstract_mesh(
    data: int = 1, fsdp: int = 1, context: int = 1, memory: int = 1, tensor: int = 1
) -> jax.sharding.AbstractMesh:
    """A mesh of these sizes without its devices, which may be elsewhere."""
    shape, types = (data, fsdp, context, memory, tensor), (AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.AbstractMesh(shape, MESH_AXES, axis_types=types)


def partition_spec(axes: tuple[str | None, ...], usable=MESH_AXES) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes, over the mesh axes in `usable`."""
    used: set[str] = set()
    spec = []
    for logical in axes:
        taken = tuple(a for a in RULES[logical] if a in usable and a not in used)
        used.update(taken)
        spec.append(taken[0] if len(taken) == 1 else taken or None)
    return PartitionSpec(*spec)


def _sizes() -> dict[str, int]:
    """Return the present mesh's axes over which the compiler cuts arrays: none without a mesh or in `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto}


def split_axes(logical: str) -> tuple[str, ...]:
    """The axes of the present mesh along which several devices share this logical axis; none without a mesh."""
    sizes = _sizes()
    return tuple(axis for axis in RULES[logical] if sizes.get(axis, 1) > 1)


def num_shards(logical: str) -> int:
    """Into how many parts the present mesh cuts this logical axis."""
    sizes = _sizes()
    return math.prod(sizes[axis] for axis in split_axes(logical))


def window_parts(length: int) -> int:
    """Return the number of devices that share a window of `length` tokens: 1 if two parts for each do not divide it."""
    parts = num_shards("window")
    return 1 if length % (2 * parts) else parts


def balanced(x_BT: jax.Array | np.ndarray, parts: int) -> jax.Array | np.ndarray:
    """Return `x_BT` (B, T, ...) in the order in which `parts` devices share it, so that causal attention is even work.

    Of 2 `parts` chunks device i has chunks i and 2 `parts` - 1 - i.
    """
    order = [chunk for part in range(parts) for chunk in (part, 2 * parts - 1 - part)]
    return x_BT.reshape(x_BT.shape[0], 2 * parts, -1, *x_BT.shape[2:])[:, np.array(order)].reshape(x_BT.shape)


def in_order(x_BT: jax.Array, parts: int) -> jax.Array:
    """Return the inverse of `balanced`."""
    pairs = x_BT.reshape(x_BT.shape[0], parts, 2, -1, *x_BT.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x_BT.shape)


def rows_of_a_device(rows: int) -> int:
    """Return how many of a batch's rows a device computes: its share, or all if the devices cannot share them."""
    shards = num_shards("batch")
    return rows if rows % shards else rows // shards


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, placed after the table while tracing under a mesh; the same array otherwise."""
    sizes = _sizes()
    if not sizes or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, tuple(sizes)))


def constrain_like(tree):
    """`tree` while tracing under a mesh, each Variable placed as its `axes` say; other leaves as they are."""

    def place(leaf):
        return leaf.replace(constrain(leaf[...], *leaf.get_metadata()["axes"])) if is_variable(leaf) else leaf

    return jax.tree.map(place, tree, is_leaf=is_variable)


def gathered(tree):
    """Return `tree` while tracing under a mesh, no Variable cut along its axis "embed"; others as they are.

    For a loop that would gather them in each of its steps. A Variable of a stack may be one layer's.
    """

    def place(leaf):
        if not is_variable(leaf):
            return leaf
        axes = leaf.get_metadata()["axes"][-leaf.ndim :]
        return leaf.replace(constrain(leaf[...], *(None if name == "embed" else name for name in axes)))

    return jax.tree.map(place, tree, is_leaf=is_variable)


def on_shards(function, in_axes: Sequence, out_axes: tuple[str | None, ...]):
    """`function` of every device's shard of each argument, placed after the table; without a mesh, itself.

    `in_axes` has the logical axes of each, or a tree of PartitionSpecs for a tree of arrays.

    For kernels that the compiler cannot partition. An axis must divide by the devices it is split over, but for the
    batch's: rows that do not divide, as one prompt's, are computed by every device.
    """
    if not _sizes():
        return function

    def call(*inputs):
        arrays = [(x, axes) for x, axes in zip(inputs, in_axes, strict=True) if isinstance(axes, tuple)]
        rows = [x.shape[axes.index("batch")] for x, axes in arrays if "batch" in axes]
        batch = None if any(size % num_shards("batch") for size in rows) else "batch"

        def spec(axes):
            if not isinstance(axes, tuple):
                return axes
            return partition_spec(tuple(batch if name == "batch" else name for name in axes))

        in_specs, out_specs = tuple(map(spec, in_axes)), spec(out_axes)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)

    return call


def of_two_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """Return `function(x)`: on GPUs, for one row along `axis`, the first row of what it makes of that row twice.

    XLA makes sums over the other operand of a product with a single row and, for their sake, turns the whole stack of
    weights or the whole cache around, once for each token.
    """
    if x.shape[axis] != 1:
        return function(x)

    def of_both(x: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(function(jnp.concatenate([x, x], axis)), 0, 1, axis=axis)

    return jax.lax.platform_dependent(x, cuda=of_both, default=function)


def is_variable(x) -> bool:
    """Return true for a Variable with an array. Optax empties those that one of several optimisers leaves out."""
    return isinstance(x, nnx.Variable) and bool(jax.tree.leaves(x))


def shardings_of(tree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
    """A tree like `tree` with a NamedSharding for each Variable (from its `axes`), replicated for other leaves.

    ValueError where an axis of one does not divide by the devices it is split over.
    """

    def rule(path, leaf):
        if not is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata()["axes"]
        spec = partition_spec(axes)
        for logical, size, name in zip(axes, leaf.shape, spec, strict=True):
            names = [name] if isinstance(name, str) else name or ()
            if size % math.prod(mesh.shape[name] for name in names):
                raise ValueError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: its {size} of {logical} do not divide "
                    f"by {' x '.join(f'mesh.{name}, which is {mesh.shape[name]}' for name in names)}: change the mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(rule, tree, is_leaf=is_variable)


def batch_axes(x) -> tuple[str | None, ...]:
    """Logical axes of an array of a batch: its rows, and whatever each holds."""
    return ("batch", *[None] * (x.ndim - 1))


def rows_of(process: int, mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process' devices hold, ascending; all where there is no mesh.

    They need not be contiguous: a mesh follows the torus, and a host's chips are a block of it. Processes may hold
    the same ones.
    """
    if mesh.empty:
        return list(range(batch_size))
    places = NamedSharding(mesh, partition_spec(("batch",))).devices_indices_map((batch_size,))
    spans = {span.indices(batch_size) for device, (span,) in places.items() if device.process_index == process}
    return sorted(row for span in spans for row in range(*span))


def place_batch(batch: dict, mesh: jax.sharding.Mesh, batch_size: int) -> dict:
    """Global arrays of `batch_size` rows over the mesh's batch axes, from this process' rows in the order of `rows_of`.

    Where there is no mesh, the arrays as they are.
    """
    if mesh.empty:
        return batch

    def place(x):
        sharding = NamedSharding(mesh, partition_spec(batch_axes(x)))
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(place, batch)
