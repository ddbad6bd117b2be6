"""Checkpoints of training: what trains, the optimiser's state and the step, through Orbax. Never the frozen base.

State is stored as plain dicts, readable without our classes. Orbax checks neither array data nor foreign
directories, and nnx merges by order, so names, shapes, dtypes and a digest of every array are checked here.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from cepe_jax.directories import is_remote
from cepe_jax.identity import as_of, refuse_another_run
from cepe_jax.parsing import typed
from cepe_jax.sharding import is_variable


def _not_a_trace_of_orbax(record: logging.LogRecord) -> bool:
    """Return False for traces of errors that are raised too, and for the warning of a directory that is only read."""
    return "orbax" not in record.pathname or not (record.exc_info or "read only" in str(record.msg))


def _run_to_the_end(run_sync: Callable) -> Callable:
    """Orbax's `run_sync`, whose event loop stays open until all tasks in it have ended, also where one has failed.

    Orbax closes the loop at the first failure; each array that is still written or read then prints a trace.
    """

    async def ended(coroutine: Coroutine):
        try:
            return await coroutine
        except BaseException:
            if remaining := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(remaining)
            raise

    return lambda coroutine: run_sync(ended(coroutine))


with contextlib.suppress(ImportError, AttributeError):  # a version that has it elsewhere prints the traces, and works
    from orbax.checkpoint._src import asyncio_utils

    asyncio_utils.run_sync = _run_to_the_end(asyncio_utils.run_sync)

# What damaged files end in, and what in messages of these kinds says that it was not the files.
DAMAGE = (ValueError, RecursionError, LookupError, OverflowError, EOFError)
DAMAGE += (FileNotFoundError, NotADirectoryError, IsADirectoryError)
NOT_DAMAGE = re.compile(
    "UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|CANCELLED|ABORTED"
)


KEPT = 2  # checkpoints of a run, the newest


class Array(TypedDict):
    """The type, shape and digest of an array."""

    dtype: str
    shape: list[int]
    digest: int


class Facts(TypedDict):
    """The facts that are stored beside a checkpoint's arrays."""

    identity: dict[str, Any]
    step: int
    arrays: dict[str, Array]


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
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)[0]
    values = ((path, leaf.get_value() if is_variable(leaf) else leaf) for path, leaf in leaves)
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in values}


def _unflat(flat: dict[str, jax.Array], like):
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


def _described(flat: dict[str, jax.Array]) -> dict[str, Array]:
    """Return what is stored beside every array: type, shape, digest. The digests wait for the arrays to be computed."""
    digests = jax.device_get(_digests(flat))
    return {
        name: {"dtype": str(x.dtype), "shape": list(x.shape), "digest": int(digests[name])} for name, x in flat.items()
    }


def any_in(directory: Path | epath.Path) -> bool:
    """Return True if a checkpoint is there, even a damaged one."""
    return bool(ocp.utils.checkpoint_steps_paths(directory))


class Refused(ValueError):
    """A checkpoint is not what its run wrote."""


class Checkpoints:
    """The checkpoints of one run, in `directory`: at most the newest `keep` are kept (None: all).

    `identity` is what a checkpoint must have in common with the run that resumes from it: the resolved
    configuration, the hash of the frozen base. It is stored with each and compared on restore, all that was stored.
    A `reader` leaves the directory as it is: a run may be writing there.
    """

    def __init__(self, directory: Path | epath.Path, identity: dict, keep: int | None = KEPT, *, reader: bool = False):
        self.directory = directory if is_remote(directory) else Path(directory).absolute()
        self.identity = identity
        # Orbax raises what goes wrong with a save, and logs it before, four times and with pages of traces.
        logging.getLogger("absl").addFilter(_not_a_trace_of_orbax)
        writes = {"max_to_keep": keep, "cleanup_tmp_directories": True}
        reads = {"read_only": True, "save_interval_steps": 0, "create": False}
        options = ocp.CheckpointManagerOptions(**(reads if reader else writes))
        with _refusing_damage(self.directory):
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The step of the newest; None where there is none."""
        return self.manager.latest_step()

    def latest_whole(self) -> int | None:
        """The step of the newest that is whole on disk: one that is still being written is not."""
        self.manager.reload()
        return self.manager.latest_step()

    def save(self, step: int, state) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        It waits for the save before this one, for the arrays and for their copies in the host's memory; they are
        written while training goes on. OSError when the save before this one failed.
        """
        flat = _flat(state)
        facts = {"identity": self.identity, "step": step, "arrays": _described(flat)}
        with self._failing_in_one_line():
            args = ocp.args.Composite(state=ocp.args.StandardSave(flat), facts=ocp.args.JsonSave(facts))
            self.manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk; OSError when it failed."""
        with self._failing_in_one_line():
            self.manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.manager.close()

    def restore(self, like) -> tuple[int, object] | None:
        """(step, state) of the newest checkpoint, shaped and placed like `like`; None where there is none.

        Of `like` only shapes, types and shardings are read: its arrays may be gone, or `ShapeDtypeStruct`s.
        ValueError for a checkpoint of another run or another model, and for a damaged one: this names the newest that
        is whole (of many processes none looks further). A directory that has a number for its name is a checkpoint.
        """
        refused: list[int] = []
        reason = ""
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = self.read(step, like)
            except Refused as error:  # its traceback, which holds arrays, ends here
                reason = reason or str(error)
                refused.append(step)
                if jax.process_count() > 1:
                    # Others may have found their parts whole, and wait for this one: it ends, and then they do.
                    before = ", ".join(map(str, steps[len(refused) :])) or "none"
                    raise ValueError(f"{reason}: remove it to go on from the one before (there is: {before})") from None
                continue
            if not refused:
                return step, state
            others = f" and {', '.join(map(str, refused[1:]))}, damaged too," if refused[1:] else ""
            raise ValueError(f"{reason}: remove it{others} to go on from the one of step {step}, which is whole")
        if refused:
            raise ValueError(f"{reason}: there is no whole one before it: start in another directory")
        return None

    def facts(self, step: int) -> Facts:
        """Return the facts beside a checkpoint's arrays; ValueError if there is no such checkpoint."""
        if step not in (steps := self.manager.all_steps()):
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise ValueError(f"{self.directory}: there is no checkpoint of step {step}: give some of those ({there})")
        with _refusing_damage(self.directory / str(step)):
            facts = self.manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
            return typed(facts, Facts, "facts")

    def read(self, step: int, like):
        """Return a checkpoint's state, which is `like` and has the digests that it was saved with; else ValueError."""
        where, wanted, facts = self.directory / str(step), _flat(like), self.facts(step)
        identity, arrays, saved_at = facts["identity"], facts["arrays"], facts["step"]
        refuse_another_run(where, identity, as_of(identity, self.identity))
        if saved_at != step:
            raise Refused(f"{where}: is the checkpoint of step {saved_at} under another name")
        for name in sorted(set(arrays) | set(wanted)):
            there, here = arrays.get(name), wanted.get(name)
            there = there and f"{there['dtype']}{there['shape']}"
            here = None if here is None else f"{here.dtype}{list(here.shape)}"
            if there != here:
                raise ValueError(f"{where}: is of another model, {name} is {there} there and {here} here")
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        with _refusing_damage(where):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            flat = self.manager.restore(step, args=args)["state"]
        for name, found in _described(flat).items():
            if found != arrays[name]:
                raise Refused(f"{where}: {name} is damaged, its digest differs from the stored one")
        return _unflat(flat, like)

    @contextlib.contextmanager
    def _failing_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _cause(error)
            if not isinstance(reason, (OSError, ValueError, RuntimeError)):
                raise
            step = self.latest_whole()
            whole = "there is none yet" if step is None else f"the one of step {step} is whole"
            failure = OSError(f"{self.directory}: a checkpoint was not written ({_shortened(reason)}): {whole}")
            failure.errno = getattr(reason, "errno", None)  # by which the exit status is chosen
            raise failure from None


@contextlib.contextmanager
def _refusing_damage(where: Path) -> Iterator[None]:
    """Refused, in one line, for what damaged files end in; what else fails says nothing of the checkpoint."""
    try:
        yield
    except Exception as error:  # Orbax raises many kinds, with pages of traces
        reason = _cause(error)
        if not isinstance(reason, DAMAGE):
            raise reason from None
        if NOT_DAMAGE.search(str(reason)):
            raise OSError(f"{where}: was not read ({_shortened(reason)}): start again") from None
        raise Refused(f"{where}: damaged ({_shortened(reason)})") from None


def _cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one: Orbax raises a bare Exception from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _shortened(error: BaseException) -> str:
    """One line; the beginning of a long one says what was done, its end what is wrong."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 250 else f"{line[:100]} ... {line[-140:]}"
