"""Many processes that run as one: how they find each other, which of them writes, what ends them together."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cepe_jax import progress
from cepe_jax.exits import RUNTIME, status_of

# In the runtime's messages when another process ended: the collectives' (Gloo on CPU, NCCL on GPU), and what JAX's own
# service says to the processes that remain.
LOST = re.compile(r"gloo|nccl|heartbeat|coordination.service", re.IGNORECASE)
LOST_STATUS = 3  # exit status of a process whose peer was lost; the runtime's own abort has 134


@dataclass(frozen=True)
class DistributedConfig:
    """The way to the other processes. JAX knows by itself on a TPU pod, and where SLURM or Open MPI started it."""

    coordinator: str = ""  # host:port of process 0, for processes that JAX does not find by itself
    num_processes: int = 0  # number of processes; needed with coordinator
    process_id: int = -1  # number of this process, from 0; needed with coordinator
    start_seconds: int = 300  # seconds in which all processes must have met
    heartbeat_seconds: int = 100  # seconds of silence after which a process is lost, and the others end

    def __post_init__(self):
        given = [bool(self.coordinator), self.num_processes > 0, self.process_id >= 0]
        if any(given) and not all(given):
            raise ValueError("distributed: give coordinator, num_processes and process_id, or none of them")
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"distributed.coordinator is {self.coordinator}: give host:port of process 0")
        if given[0] and self.process_id >= self.num_processes:
            raise ValueError(
                f"distributed.process_id is {self.process_id}: {self.num_processes} processes count from 0"
            )
        for name in ("start_seconds", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"distributed.{name} is {getattr(self, name)}: give a number above 0")


@contextmanager
def connected(config: DistributedConfig, compiled: Path) -> Iterator[None]:
    """In the block this process is one of the run's, and the first of them alone prints.

    Before the block nothing may have used a device. What is compiled is kept in `compiled`, for the next start, unless
    JAX_COMPILATION_CACHE_DIR names another place. A process that fails ends at once: the others must not wait for it.
    """
    _connect(config)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    if jax.process_count() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if not is_first():
            progress.silence()
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            with peers(lambda: ": what it said last tells why"):
                yield
        except BaseException as error:
            # Python waits for this thread after it has printed the error, and not for what JAX would do at its exit,
            # which is to wait for all processes.
            threading.Timer(1.0, os._exit, (status_of(error),)).start()
            raise


def _connect(config: DistributedConfig) -> None:
    if jax.distributed.is_initialized():
        return
    explicit = [config.coordinator, config.num_processes, config.process_id] if config.coordinator else []

    def give_up() -> None:
        where, mend = "", "on a port of process 0 that is open to all: JAX_COORDINATOR_PORT names one"
        if explicit:
            where = f"at {config.coordinator} "
            mend = "each with its own process id and all with one coordinator, which is process 0"
        _leave(f"the processes did not all meet {where}within {config.start_seconds} s: start every one, {mend}")

    timer = threading.Timer(config.start_seconds, give_up)  # JAX would abort the process, with pages of traces
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=config.start_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except ValueError as error:
        if explicit or "coordinator_address should be defined" not in str(error):
            raise
        # no cluster: this process is alone
    finally:
        timer.cancel()


def _leave(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    os._exit(LOST_STATUS)


@contextmanager
def peers(where: Callable[[], str]) -> Iterator[None]:
    """End this process with one line if another process dies in the block: where, and from which step the run goes on.

    It ends here and now: whatever is left to do would wait for the lost one. Where the runtime notices first (no
    process waits in a collective that can fail, as on TPUs), it aborts this process itself.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # the last from a checkpoint that was not written
        if jax.process_count() == 1 or not tells_of_a_lost_peer(error):
            raise
        reason = " ".join(str(error).split())[:200]
        _leave(f"process {jax.process_index()}: a peer was lost{where()} ({reason})")


def tells_of_a_lost_peer(error: Exception) -> bool:
    """Return True if the runtime says by `error` that another process ended; refusals that quote its words do not."""
    if isinstance(error, OSError) and isinstance(error.__context__, Exception):
        return tells_of_a_lost_peer(error.__context__)  # of a checkpoint that was not written
    by_runtime = isinstance(error, jax.errors.JaxRuntimeError) or RUNTIME.match(str(error))
    return bool(by_runtime and LOST.search(str(error)) and "RESOURCE_EXHAUSTED" not in str(error))


def is_first() -> bool:
    """Return True if this is the process that writes what the processes share."""
    return jax.process_index() == 0


def first_says(value: bool) -> bool:
    """The first process' value, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def meet() -> None:
    """All processes are here."""
    multihost_utils.sync_global_devices("meet")
