"""Running a grid: a process for each model on each set of data, and what goes wrong stays in its cell."""

import fcntl
import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from cepe_jax import progress
from cepe_jax.data.units import end_with_parent
from cepe_jax.devices import forget_peak_memory, on_devices, peak_memory
from cepe_jax.directories import download_hint, in_one_line, write_json
from cepe_jax.evaluation import cells as store
from cepe_jax.evaluation import perplexity, tasks
from cepe_jax.evaluation.cells import Cell, Missing
from cepe_jax.evaluation.grid import PerplexityRun, SweepConfig, TaskRun
from cepe_jax.evaluation.language_model import LanguageModel
from cepe_jax.evaluation.models import ModelConfig, check_model, load_model
from cepe_jax.evaluation.report import ReportConfig, report
from cepe_jax.identity import as_json
from cepe_jax.weights.files import read_json

# What a process says of its work: what happened ("loaded", "begun", "record", "done", "failed"; last, "ended"), the
# cell, and of a failure the message and the traceback.
Message = tuple[str, str, str, str]


def run_one(config: PerplexityRun | TaskRun) -> None:
    """What `run_sweep` does, for one model and one set of data."""
    run_sweep(config.sweep())


def run_sweep(config: SweepConfig) -> None:
    """Every cell that had no result has been run, and the report is in `config.out`. ValueError where cells failed.

    The same command goes on where it was stopped. ValueError, before anything is run, where a cell was finished with
    other settings, weights or data, where the report would lose a model or data that are there, where no cell has
    all that it needs, or where another command runs in `config.out`.
    """
    with _held(config.out):
        groups = _left(config)
        _run(config, groups, _lacking(groups))


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The block has the directory for itself, without what killed processes left there."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is in use by another command: wait for its end, or use another --out") from None
        for left in (out / "cells").glob(".*"):
            left.unlink()
        yield


def _left(config: SweepConfig) -> list[list[Cell]]:
    """The cells without a result, of each model on each data."""
    before, now = config.out / "sweep.json", as_json(config)
    kept = read_json(before) if before.exists() else {}
    groups = "models", "perplexity", "tasks"
    if lost := [f"{group}.{name}" for group in groups for name in kept.get(group, {}) if name not in now[group]]:
        raise ValueError(
            f"{config.out} has {', '.join(lost)}, which this command lacks, and its report would lose them: name them "
            f"too, or use another --out"
        )
    digests = {name: store.data_at(data, config.out) for name, data in (config.perplexity | config.tasks).items()}
    left = [[cell for cell in group if not _finished(config, cell, digests[cell.data])] for group in config.cells()]
    return [group for group in left if group]


def _lacking(groups: list[list[Cell]]) -> list[str]:
    """Return what each group lacks, "" if nothing. ValueError that names all of it where no group has all it needs."""
    model_faults = cache(_model_faults)
    faults = [[*model_faults(group[0].model_config), *_data_faults(group[0])] for group in groups]
    if groups and all(faults):
        raise ValueError("; ".join(dict.fromkeys(fault for of_group in faults for fault in of_group)))
    return ["; ".join(of_group) for of_group in faults]


def _model_faults(config: ModelConfig) -> list[str]:
    """Return why the model cannot be read as its config says; no weight is read."""
    places = [config.path, *([config.tokenizer] if config.tokenizer else [])]
    if absent := [path for path in places if not path.exists()]:
        return [f"{path}: no such file or directory{download_hint(path)}" for path in absent]
    try:
        check_model(config)
    except (ValueError, OSError) as error:
        return [in_one_line(error)]
    return []


def _data_faults(cell: Cell) -> list[str]:
    """Return what of the cell's data is not there, or empty."""
    data = cell.data_config
    source = f": put there {data.origin.source}" if cell.family == "tasks" and data.data else ""
    faults = []
    for path in store.places(data):
        if not path.exists():
            faults.append(f"{path}: no such file or directory{source}")
        elif path.is_file() and not path.stat().st_size:
            faults.append(f"{path} is empty{source}")
    return faults


def _run(config: SweepConfig, groups: list[list[Cell]], lacking: list[str]) -> None:
    """The cells of groups that lack nothing have been run, and the report is written. ValueError where some failed."""
    write_json(config.out / "sweep.json", as_json(config))
    for cell in (cell for group in groups for cell in group):
        cell.path(config.out, "failed").unlink(missing_ok=True)
    failures: dict[str, str] = {}
    where = ""

    def said() -> Iterator[Message]:
        nonlocal where
        for group, reason in zip(groups, lacking, strict=True):
            records = 0
            run = partial(_in_process, config)
            for message in _refused(config, group, reason) if reason else run_group(config, group, run):
                event, cell, text, trace = message
                records = records + 1 if event == "record" else 0
                where = f"{cell}, {records} records" if records else cell
                if event == "failed":
                    failures[cell] = text
                    print(f"{cell} failed: {text}", file=sys.stderr, flush=True)
                yield message

    total = sum(map(len, groups))
    over = progress.track(said(), "evaluate, cells", total, lambda: where, lambda m: m[0] in ("done", "failed"))
    for _ in over if total else ():
        pass
    print(report(ReportConfig(out=config.out)))
    if failures:
        first, message = next(iter(failures.items()))
        raise ValueError(
            f"{len(failures)} of {total} cells failed, first {first}: {message}; {config.out}/report.md lists "
            f"them, and the same command runs them again"
        )


def _refused(config: SweepConfig, group: list[Cell], reason: str) -> Iterator[Message]:
    """What `run_group` says of cells that all fail for this reason."""
    for cell in group:
        store.write_failure(config.out, cell, reason, "")
        yield "failed", cell.name, reason, ""


def _finished(config: SweepConfig, cell: Cell, data: str | None) -> bool:
    """ValueError where the model or the data at the same path are others by now."""
    try:
        facts, _ = store.read(config.out, cell)
    except Missing:
        return False
    if (now := store.weights_at(cell.model_config.path)) is not None and now != facts["weights"]:
        raise ValueError(
            f"{cell.model_config.path} has other weights than when {cell.name} was measured: use another --out"
        )
    if data is not None and data != facts["data_digest"]:
        where = " or ".join(map(str, store.places(cell.data_config)))
        raise ValueError(f"{where} has changed since {cell.name} was measured: use another --out")
    return True


def run_group(
    config: SweepConfig, group: list[Cell], run: Callable[[list[Cell]], Iterator[Message]]
) -> Iterator[Message]:
    """What `run` says while it measures the cells of a model on its data; at the end each is "done" or "failed".

    Where its process dies, the cell that it was at has failed, and another process does the rest; one that dies before
    it has the model would die again.
    """
    left = {cell.name: cell for cell in group}
    while left:
        current, loaded = next(iter(left)), False
        for message in run(list(left.values())):
            event, cell, text, trace = message
            loaded |= event == "loaded"
            if event == "begun":
                current = cell
            elif event == "ended":
                break
            elif event in ("done", "failed"):
                if event == "failed":
                    store.write_failure(config.out, left[cell], text, trace)
                del left[cell]
                current = next(iter(left), "")
            yield message
        if left:
            died = f"its process ended{'' if loaded else ' while it loaded the model'}, {text}"
            for cell in [current] if loaded else list(left):
                store.write_failure(config.out, left.pop(cell), died, "")
                yield "failed", cell, died, ""


def _in_process(config: SweepConfig, group: list[Cell]) -> Iterator[Message]:
    """What `measure_group` says in a process of its own, and at the end how that ended."""
    context = multiprocessing.get_context("spawn")  # of a device's memory, this process never takes any
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(config, group, sender))
    process.start()
    sender.close()
    try:
        with suppress(EOFError, OSError):  # the end of the process, also within a message
            while True:
                yield receiver.recv()
        process.join()
        yield "ended", "", _end(process.exitcode), ""
    finally:
        process.kill()
        process.join()


def _end(code: int) -> str:
    """How a process ended."""
    return f"killed by {signal.Signals(-code).name}, perhaps for want of memory" if code < 0 else f"with status {code}"


def _worker(config: SweepConfig, group: list[Cell], sender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    progress.silence()
    measure_group(config, group, lambda *message: sender.send(message))


def measure_group(config: SweepConfig, group: list[Cell], say: Callable[[str, str, str, str], None]) -> None:
    """Measures the cells of a model on its data, one after another, and says how it goes."""
    with ExitStack() as devices:
        try:
            devices.enter_context(on_devices(config.mesh))
            model, facts = load_model(group[0].model_config), store.provenance()
        except Exception as error:
            for cell in group:
                say("failed", cell.name, *_told(error))
            return
        facts["tokenizer"] = model.tokenizer.fingerprint()
        facts["weights"] = store.weights_at(group[0].model_config.path)
        facts["data_digest"] = store.data_at(group[0].data_config, config.out)
        facts["mesh"] = as_json(config.mesh)
        if group[0].family == "tasks":
            facts["protocol"] = as_json(group[0].data_config.protocol)
        say("loaded", group[0].name, "", "")
        for cell in group:
            say("begun", cell.name, "", "")
            try:
                _measure(config, cell, model, facts, say)
            except Exception as error:
                say("failed", cell.name, *_told(error))
            else:
                say("done", cell.name, "", "")


def _told(error: Exception) -> tuple[str, str]:
    """An error in one line, and where it came from."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + in_one_line(error), traceback.format_exc()


def _measure(config: SweepConfig, cell: Cell, model: LanguageModel, facts: dict, say) -> None:
    """The cell's result is written."""
    measured: dict[str, float] = {}

    def records() -> Iterator[dict]:
        begun = time.monotonic()
        if cell.family == "perplexity":
            found = perplexity.measure(cell.data_config, cell.kind, cell.value, model)
        else:
            found = tasks.measure(cell.data_config, cell.value, model)
        for record in found:
            yield record
            say("record", cell.name, "", "")
        measured.update(seconds=time.monotonic() - begun, peak_memory=peak_memory())

    forget_peak_memory()
    store.write(config.out, cell, records(), facts, measured)
