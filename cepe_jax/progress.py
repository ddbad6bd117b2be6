"""Progress of anything that takes more than a few seconds, and notices; both go through `logging`."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
log = logging.getLogger(__name__)
_ours = logging.getLogger("cepe_jax")
_silent = False


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_notices() -> None:
    """Show this package's notices on stderr, as its scripts do; a program of one's own may set its own handlers."""
    if not _ours.handlers:
        _ours.addHandler(_ToStderr())
        _ours.propagate = False  # libraries give the root a handler of their own
    _ours.setLevel(logging.INFO)


def silence() -> None:
    """Show no notices and no progress from now on: of many processes that run as one, one speaks."""
    global _silent
    _silent = True
    _ours.setLevel(logging.WARNING)


def track(
    iterable: Iterable[Item],
    description: str,
    total: float | None = None,
    status: Callable[[], str] = lambda: "",
    amount: Callable[[Item], float] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items and show progress: a bar in a terminal, elsewhere a notice every ten seconds and at the end.

    `total` is needed if the iterable has no length, in the same unit as `amount` of an item. `status()` is shown
    beside the count.
    """
    if _silent:
        yield from iterable
        return
    from rich.console import Console  # here, so that what only computes imports without rich
    from rich.progress import Progress, TextColumn

    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (*Progress.get_default_columns(), TextColumn("{task.completed:,.0f} {task.fields[status]}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, status="")
            for item in iterable:
                yield item
                bar.update(task, advance=amount(item), status=status())
        return
    # rich prints only one final line into a file: a job of twenty minutes would look dead in its log.
    start = last = time.monotonic()
    done = 0.0
    of_total = "" if total is None else f" of {total:,.0f}"

    def line() -> None:
        seconds = time.monotonic() - start
        log.info("%s", f"{description}: {done:,.0f}{of_total}, {seconds:.0f} s {status()}")

    for item in iterable:
        yield item
        done += amount(item)
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done != total:
            last = time.monotonic()
            line()
    line()
