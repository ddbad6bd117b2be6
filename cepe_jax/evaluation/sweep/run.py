"""Running a grid: a process for each model on each set of data, and what goes wrong stays in its cell."""

import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from cepe_jax import progress
from cepe_jax.data.units import end_with_parent
from cepe_jax.devices import forget_peak_memory, on_devices, peak_memory
from cepe_jax.directories import download_hint, one_writer_in, write_json
from cepe_jax.evaluation.readers.language_model import LanguageModel
from cepe_jax.evaluation.readers.models import ModelConfig, check_model, load_model
from cepe_jax.evaluation.sweep import cells as store
from cepe_jax.evaluation.sweep.cells import Cell, CellFacts, Missing
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.exits import in_one_line
from cepe_jax.identity import as_json
from cepe_jax.parsing import read_json


@dataclass(frozen=True)
class Event:
    """A report of a process on its work. In the last one, that it ended, `message` says how."""

    kind: Literal["loaded", "begun", "record", "done", "failed", "ended"]
    cell: str = ""  # its name
    message: str = ""  # of a failure
    trace: str = ""


def run_sweep(config: SweepConfig) -> None:
    """Run every cell that has no result, and write the report; ValueError if cells failed.

    The same command continues after a stop. ValueError, before anything is run, if a cell was finished with other
    settings, weights or data, if the report would lose a model or data that are there, if no cell has everything that
    it needs, or if another command runs in `config.out`.
    """
    with one_writer_in(config.out):
        (config.out / "cells").mkdir(exist_ok=True)
        groups = _unfinished(config)
        _run(config, groups, _lacking(groups))


def _unfinished(config: SweepConfig) -> list[list[Cell]]:
    """Return the cells without a result, of each model on each data."""
    before, now = config.out / "sweep.json", as_json(config)
    stored = read_json(before) if before.exists() else {}
    sections = {name: section for name, section in stored.items() if isinstance(section, dict)}
    if lost := [
        f"{name}.{one}" for name, section in sections.items() for one in section if one not in now.get(name, ())
    ]:
        raise ValueError(
            f"{config.out} has {', '.join(lost)}, which this command lacks, and its report would lose them: name them "
            f"too, or use another --out"
        )
    digests = {name: store.data_at(evaluation, config.out) for name, evaluation in config.evaluations.items()}
    unfinished = [
        [cell for cell in group if not _finished(config, cell, digests[cell.data])] for group in config.cells()
    ]
    return [group for group in unfinished if group]


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
    """Return what of the cell's data is not there, or empty, and why this model cannot be asked about it."""
    faults = []
    for path, source in cell.evaluation.places().items():
        mend = f": put there {source}" if source else ""
        if not path.exists():
            faults.append(f"{path}: no such file or directory{mend}")
        elif path.is_file() and not path.stat().st_size:
            faults.append(f"{path} is empty{mend}")
    refusal = cell.evaluation.refusal(cell.model_config.reads)
    return [*faults, refusal] if refusal else faults


def _run(config: SweepConfig, groups: list[list[Cell]], lacking: list[str]) -> None:
    """Run the cells of groups that lack nothing, and write the report. ValueError where some failed."""
    write_json(config.out / "sweep.json", as_json(config))
    for cell in (cell for group in groups for cell in group):
        cell.path(config.out, "failed").unlink(missing_ok=True)
    failures: dict[str, str] = {}
    where = ""

    def events() -> Iterator[Event]:
        nonlocal where
        for group, reason in zip(groups, lacking, strict=True):
            records = 0
            run = partial(_in_process, config)
            for event in _refused(config, group, reason) if reason else run_group(config, group, run):
                records = records + 1 if event.kind == "record" else 0
                where = f"{event.cell}, {records} records" if records else event.cell
                if event.kind == "failed":
                    failures[event.cell] = event.message
                    print(f"{event.cell} failed: {event.message}", file=sys.stderr, flush=True)
                yield event

    total = sum(map(len, groups))
    over = progress.track(events(), "evaluate, cells", total, lambda: where, lambda e: e.kind in ("done", "failed"))
    for _ in over if total else ():
        pass
    print(report(ReportConfig(out=config.out)))
    if failures:
        first, message = next(iter(failures.items()))
        raise ValueError(
            f"{len(failures)} of {total} cells failed, first {first}: {message}; {config.out}/report.md lists "
            f"them, and the same command runs them again"
        )


def _refused(config: SweepConfig, group: list[Cell], reason: str) -> Iterator[Event]:
    """Yield the events of cells that all fail for this reason."""
    for cell in group:
        store.write_failure(config.out, cell, reason, "")
        yield Event("failed", cell.name, reason)


def _finished(config: SweepConfig, cell: Cell, data: str | None) -> bool:
    """ValueError where the model or the data at the same path are others by now."""
    try:
        facts, _ = store.read(config.out, cell)
    except Missing:
        return False
    if (now := store.weights_of(cell.model_config)) is not None and now != facts["weights"]:
        raise ValueError(
            f"{cell.model_config.path} has other weights than when {cell.name} was measured: use another --out"
        )
    if data is not None and data != facts["data_digest"]:
        where = " or ".join(map(str, cell.evaluation.places()))
        raise ValueError(f"{where} has changed since {cell.name} was measured: use another --out")
    return True


def run_group(config: SweepConfig, group: list[Cell], run: Callable[[list[Cell]], Iterator[Event]]) -> Iterator[Event]:
    """Yield the events of `run` while it measures the cells of a model on its data, each "done" or "failed" in the end.

    Where its process dies, the cell that it was at has failed, and another process does the rest; one that dies before
    it has the model would die again.
    """
    remaining = {cell.name: cell for cell in group}
    while remaining:
        current, loaded = next(iter(remaining)), False
        for event in run(list(remaining.values())):
            loaded |= event.kind == "loaded"
            if event.kind == "begun":
                current = event.cell
            elif event.kind == "ended":
                break
            elif event.kind in ("done", "failed"):
                if event.kind == "failed":
                    store.write_failure(config.out, remaining[event.cell], event.message, event.trace)
                del remaining[event.cell]
                current = next(iter(remaining), "")
            yield event
        if remaining:
            died = f"its process ended{'' if loaded else ' while it loaded the model'}, {event.message}"
            for cell in [current] if loaded else list(remaining):
                store.write_failure(config.out, remaining.pop(cell), died, "")
                yield Event("failed", cell, died)


def _in_process(config: SweepConfig, group: list[Cell]) -> Iterator[Event]:
    """Yield the events of `measure_group` in a process of its own, and at the end how that ended."""
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
        yield Event("ended", message=_end(process.exitcode))
    finally:
        process.kill()
        process.join()


def _end(code: int) -> str:
    """Return how a process ended."""
    return f"killed by {signal.Signals(-code).name}, perhaps for want of memory" if code < 0 else f"with status {code}"


def _worker(config: SweepConfig, group: list[Cell], sender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    progress.silence()
    measure_group(config, group, sender.send)


def measure_group(config: SweepConfig, group: list[Cell], say: Callable[[Event], None]) -> None:
    """Measure the cells of a model on its data, one after another, and say how it goes."""
    with ExitStack() as devices:
        try:
            devices.enter_context(on_devices(config.mesh))
            model, provenance = load_model(group[0].model_config), vars(store.provenance())
        except Exception as error:
            for cell in group:
                say(_failed(cell, error))
            return
        facts = partial(
            CellFacts,
            **provenance,
            tokenizer=model.tokenizer.fingerprint(),
            weights=store.weights_of(group[0].model_config),
            data_digest=store.data_at(group[0].evaluation, config.out),
            mesh=as_json(config.mesh),
        )
        say(Event("loaded", group[0].name))
        for cell in group:
            say(Event("begun", cell.name))
            try:
                _measure(config.out, cell, model, facts, say)
            except Exception as error:
                say(_failed(cell, error))
            else:
                say(Event("done", cell.name))


def _failed(cell: Cell, error: Exception) -> Event:
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return Event("failed", cell.name, kind + in_one_line(error), traceback.format_exc())


def _measure(
    out: Path, cell: Cell, model: LanguageModel, facts: Callable[..., CellFacts], say: Callable[[Event], None]
) -> None:
    """Write the cell's result."""

    def records() -> Iterator[dict]:
        for record in cell.evaluation.measure(cell.point, model):
            yield record
            say(Event("record", cell.name))

    forget_peak_memory()
    begun = time.monotonic()
    store.write(out, cell, records(), lambda: facts(seconds=time.monotonic() - begun, peak_memory=peak_memory()))
