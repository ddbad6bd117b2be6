"""Progress of anything that takes more than a few seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
_silent = False


def silence() -> None:
    """This process shows no progress from now on: of many that run as one, one speaks."""
    global _silent
    _silent = True


def track(
    iterable: Iterable[Item],
    description: str,
    total: float | None = None,
    status: Callable[[], str] = lambda: "",
    amount: Callable[[Item], float] = lambda item: 1,
) -> Iterator[Item]:
    """The items, with progress on stderr: a bar in a terminal, elsewhere a line every ten seconds and at the end.

    `total` is needed where the iterable has no length, in the same unit as `amount` of an item. `status()` is shown
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
        seconds = f"{time.monotonic() - start:.0f} s"
        print(f"{description}: {done:,.0f}{of_total}, {seconds} {status()}", file=sys.stderr, flush=True)

    for item in iterable:
        yield item
        done += amount(item)
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done != total:
            last = time.monotonic()
            line()
    line()
