"""Work that is divided into units, done by processes of this job and by other jobs, and not done twice."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial, wraps
from queue import Empty

from etils import epath

from cepe_jax.data.beam import run_on_beam
from cepe_jax.data.builder import Builder
from cepe_jax.directories import check_reachable, one_writer_in
from cepe_jax.progress import track

log = logging.getLogger(__name__)

# Work on one unit: yields (progress in the unit's size, tokens) as it goes, and returns the facts of its mark.
Work = Generator[tuple[float, int], None, dict]


@dataclass(frozen=True)
class JobConfig:
    """The shares of a job's work."""

    shard: str = "0/1"  # i/n: this job does every n-th unit, from unit i on; n jobs with i = 0 ... n - 1 do all
    workers: int = 0  # processes; 0 = one per core
    runner: str = "local"  # "local": processes of this machine; or a runner of Apache Beam, such as DataflowRunner
    beam: tuple[str, ...] = ()  # flags of Beam's, such as --project=NAME

    def __post_init__(self):
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"shard is {self.shard!r}: give i/n with 0 <= i < n, such as 0/4")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give a number of processes, or 0 for one per core")
        if self.beam and self.runner == "local":
            raise ValueError(f"beam is {' '.join(self.beam)}, and the runner is local: give a --runner of Beam's")
        if any(flag.partition("=")[0] == "--runner" for flag in self.beam):
            raise ValueError(f"beam is {' '.join(self.beam)}: give the runner as --runner alone")

    def identity(self, *places: str) -> dict:
        """The settings that make the result what it is: all but these `places` and how the work is shared."""
        shared = {field.name for field in fields(JobConfig)}
        return {name: value for name, value in vars(self).items() if name not in shared | set(places)}


def one_job(command: Callable[[JobConfig], None]) -> Callable[[JobConfig], None]:
    """Return `command`, which writes in `config.out`, as the one job that runs `config.shard` there."""

    @wraps(command)
    def alone(config: JobConfig) -> None:
        for value in vars(config).values():
            if isinstance(value, epath.Path):
                check_reachable(value)
        with one_writer_in(config.out, config.shard.replace("/", "-of-")):
            command(config)

    return alone


def run_units(
    builder: Builder,
    units: Sequence[tuple],
    sizes: Sequence[float],
    work: Callable[..., Work],
    job: JobConfig,
    what: str,
) -> list[dict] | None:
    """Does this job's units that have no mark, as `work(number, *unit)`, and marks them.

    A unit is a tuple of picklable values and is its own key. Returns the marks of all units, or None when other jobs
    have not finished theirs.
    """
    first, every = map(int, job.shard.split("/"))
    open_units = [n for n in range(first, len(units), every) if builder.marked(n, units[n]) is None]
    workers = min(job.workers or cores(), len(open_units))
    if open_units:
        if job.runner != "local":
            run = partial(_on_beam, sizes=sizes, job=job)
        else:
            run = partial(_in_processes, workers=workers) if workers > 1 else _here
        begun, tokens = time.monotonic(), 0

        def sizes_of_progress() -> Iterator[float]:
            nonlocal tokens
            for size, new_tokens in run(builder, units, open_units, work):
                tokens += new_tokens
                yield size

        def status() -> str:
            rate = tokens / max(time.monotonic() - begun, 1e-9)
            return f"{tokens:,} tokens, {rate:,.0f} a second" if tokens else ""  # Beam tells of whole units alone

        total = sum(sizes[n] for n in open_units)
        for _ in track(sizes_of_progress(), what, total, status, amount=lambda size: size):
            pass
    marks = [builder.marked(n, unit) for n, unit in enumerate(units)]
    if None in marks:
        log.info("%s: %d of %d units are left to other jobs", builder.out, marks.count(None), len(units))
        return None
    return marks


def cores() -> int:
    """Cores that this process may run on; a scheduler gives a job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _do(builder: Builder, number: int, unit: tuple, work: Callable[..., Work]) -> Iterator[tuple[float, int]]:
    facts = yield from work(number, *unit)
    builder.mark(number, unit, facts)


def _here(builder, units, open_units, work) -> Iterator[tuple[float, int]]:
    for number in open_units:
        yield from _do(builder, number, units[number], work)


def _on_beam(builder, units, open_units, work, sizes, job) -> Iterator[tuple[float, int]]:
    # How runners on this machine share the work; others take no notice.
    here = f"--direct_num_workers={job.workers}", "--direct_running_mode=multi_processing"
    flags = f"--runner={job.runner}", *here, *job.beam
    for number in run_on_beam(builder, units, open_units, partial(_do_all, builder, work), flags):
        yield sizes[number], 0


def _do_all(builder: Builder, work: Callable[..., Work], number: int, unit: tuple) -> None:
    for _ in _do(builder, number, unit, work):
        pass


def _in_processes(builder, units, open_units, work, workers) -> Iterator[tuple[float, int]]:
    context = multiprocessing.get_context("spawn")  # jax and its threads do not survive a fork
    queue, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, context, _remember, (queue, stop)) as pool:
        try:
            pending = {pool.submit(_send, builder, n, units[n], work) for n in open_units}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                yield from _received(queue)
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, perhaps for want of memory: run it again with fewer --workers; "
                "finished units stay"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        time.sleep(0.1)  # what the last worker sent
        yield from _received(queue)


def _received(queue) -> Iterator[tuple[float, int]]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def _remember(queue, stop) -> None:
    """Runs in a worker, first."""
    global _progress, _stop
    _progress, _stop = queue, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and tells
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when its parent does: without it the workers of a job that was killed wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _send(builder: Builder, number: int, unit: tuple, work: Callable[..., Work]) -> None:
    """Runs in a worker: does the unit, and sends its progress twice a second."""
    size, tokens, last = 0.0, 0, time.monotonic()
    for more, new_tokens in _do(builder, number, unit, work):
        size, tokens = size + more, tokens + new_tokens
        if _stop.is_set():
            return
        if time.monotonic() - last > 0.5:
            _progress.put((size, tokens))
            size, tokens, last = 0.0, 0, time.monotonic()
    _progress.put((size, tokens))
