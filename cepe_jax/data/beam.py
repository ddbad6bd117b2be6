"""Units on Apache Beam: `Create | Reshuffle | Map`, on any of its runners. The driver registers the dataset afterwards.

Units and marks are the same as for local processes, so a run of either kind can finish one of the other. Beam needs an
environment of its own (`pip install '.[beam]'`), because it holds back versions of other packages.
"""

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence

from cepe_jax.data.builder import Builder, mark_name

POLL_SECONDS = 1.0  # between two looks for marks
FAULT = re.compile(r"\b(ValueError|FileNotFoundError|OSError): (.*?)(?: \[while running|\n|$)")  # in Beam's own error


def run_on_beam(
    builder: Builder,
    units: Sequence[tuple],
    open_units: Sequence[int],
    do: Callable[..., None],
    flags: Sequence[str],
) -> Iterator[int]:
    """Call `do(number, unit)` for each of the `open_units` on a runner, and yield each number once its mark is there.

    `flags` are Beam's, `--runner` first. A ValueError or an OSError of a unit is raised as such.
    """
    pipeline, errors = _pipeline(units, open_units, do, flags), []

    def run() -> None:
        try:
            pipeline.run().wait_until_finish()
        except BaseException as error:  # is raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # some runners return from `run` only at the end
    thread.start()
    waiting = list(open_units)
    while waiting and thread.is_alive():
        thread.join(POLL_SECONDS)
        names = {path.name for path in builder.units.iterdir()}  # one request, however many units wait
        marked = [number for number in waiting if mark_name(number) in names]
        waiting = [number for number in waiting if number not in marked]
        yield from marked
    thread.join()
    if errors:
        if fault := FAULT.search(str(errors[0])):
            kinds = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError, "OSError": OSError}
            raise kinds[fault[1]](fault[2]) from errors[0]
        raise errors[0]


def _pipeline(units: Sequence[tuple], open_units: Sequence[int], do: Callable[..., None], flags: Sequence[str]):
    """Return the pipeline; ValueError if Beam or the runner is not installed, or if there is no such runner."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        mend = "pip install '.[beam]' in the checkout, in an environment of its own"
        raise ValueError(f"{flags[0]}: apache_beam is not installed: {mend}") from None
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            options = PipelineOptions(list(flags))
            options.get_all_options()  # reads the flags
        pipeline = beam.Pipeline(options=options)
    except SystemExit:  # of argparse, which has written why
        raise ValueError(f"beam is {' '.join(flags[3:])}: {usage.getvalue().splitlines()[-1]}") from None
    except (ImportError, ValueError) as error:
        raise ValueError(f"{flags[0]}: {' '.join(str(error).split())}") from None
    numbered = beam.Create([(number, units[number]) for number in open_units])
    _ = pipeline | numbered | beam.Reshuffle() | beam.MapTuple(do)
    return pipeline
