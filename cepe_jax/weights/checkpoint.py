"""Checkpoints of training: what trains, the optimiser's state and the step, through Orbax. Never the frozen base.

State is stored as plain dicts, readable without our classes. Orbax checks neither array data nor foreign
directories, and nnx merges by order, so names, shapes, dtypes and a digest of every array are checked here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from cepe_jax.directories import refuse_another_run


def digests_of(state) -> dict[str, int]:
    """A number for every array of `state` by path, the same for every sharding, another for other bits."""
    return {name: int(value) for name, value in jax.device_get(_digests(_flat(state))).items()}


def _digest(x: jax.Array) -> jax.Array:
    """A position-dependent sum of the bits; unsigned sums wrap, so their order does not matter."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


@jax.jit
def _digests(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _digest(x) for name, x in flat.items()}


def _flat(state) -> dict[str, jax.Array]:
    """Path -> array of every leaf, in the tree's own order."""
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in leaves
    }


def _unflat(flat: dict[str, jax.Array], like):
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


class Checkpoints:
    """The checkpoints of one run, in `directory`: at most the newest two are kept.

    `identity` is what a checkpoint must have in common with the run that resumes from it: the resolved
    configuration, the hash of the frozen base. It is stored with each and compared on restore.
    """

    def __init__(self, directory: Path, identity: dict):
        self.directory, self.identity = Path(directory), identity
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(self, step: int, state) -> None:
        """Starts saving; the arrays may be donated as soon as this returns."""
        flat = _flat(state)
        facts = {"identity": self.identity, "digests": digests_of(state)}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(flat), facts=ocp.args.JsonSave(facts))
        )

    def restore(self, like) -> tuple[int, object] | None:
        """(step, state) of the newest checkpoint, shaped and placed like `like`; None where there is none.

        ValueError for a checkpoint that is damaged, of another run, or of another model.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        where = self.directory / str(step)
        mend = f"remove it to go on from the one before, or start in another directory ({self._others(step)})"
        try:
            facts = self.manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
        except Exception as error:  # Orbax raises many kinds, with pages of traces
            raise ValueError(f"{where}: damaged ({_first_line(error)}): {mend}") from None
        refuse_another_run(where, facts["identity"], self.identity)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _flat(like).items()
        }
        stored = facts["digests"]
        if differing := sorted(set(stored) ^ set(abstract)):
            raise ValueError(f"{where}: differs from this model in {differing[0]}: {mend}")
        try:
            flat = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]
        except Exception as error:
            raise ValueError(f"{where}: damaged or of other shapes ({_first_line(error)}): {mend}") from None
        state = _unflat(flat, like)
        for name, value in digests_of(state).items():
            if value != stored[name]:
                raise ValueError(f"{where}: {name} is damaged, its digest differs from the stored one: {mend}")
        return step, state

    def close(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _others(self, step: int) -> str:
        earlier = [s for s in self.manager.all_steps() if s < step]
        return f"there is one of step {max(earlier)}" if earlier else "there is no earlier one"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
