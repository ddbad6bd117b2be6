"""The exit statuses of scripts, and errors of one line."""

import errno
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cepe_jax.progress import show_notices

# Numbers of sysexits.h where it has one; scripts/launch_tpu.sh goes by them.
REFUSED = 1  # one line says what is wrong: the same command would be refused again
FAULT = 70  # a bug, or the fault of a device, a disk or a bucket: the same command may succeed
STOPPED = 75  # the run was asked to stop before its end, and is saved: the same command continues it
# What to do about what a file system refuses.
MENDS = {
    FileNotFoundError: "no such file or directory: look at its name",
    FileExistsError: "is there already, and no directory: give another name",
    IsADirectoryError: "is a directory: give a file",
    NotADirectoryError: "is no directory, or lies below a file: give another place",
    PermissionError: "permission denied: give a place that you may read and write",
}
# Errors of a file system that would come again with the same command, whatever room there is.
REFUSALS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
LONGEST = 800  # characters of a message: a value in it may have any length
# The beginning of messages of JAX's runtime, some of which come as a ValueError.
RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


def run(main: Callable[[], None]) -> None:
    """Run `main`. Bad input ends the process with one line on stderr and status 1, a fault with status 70.

    Bad input is a ValueError or a place that the file system refuses. Its other errors (a full disk) are one line too.
    Any other exception keeps its traceback.
    """
    show_notices()
    program = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)  # ends this process without a word, as `| head` ends others
        print(f"{program}: {in_one_line(error)}", file=sys.stderr)
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted")
    except Exception as error:
        traceback.print_exc()
        sys.exit(status_of(error))


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that `error` ends."""
    if isinstance(error, OSError):
        return REFUSED if isinstance(error, tuple(MENDS)) or error.errno in REFUSALS else FAULT
    refused = isinstance(error, ValueError) and not RUNTIME.match(str(error))
    return REFUSED if refused or isinstance(error, KeyboardInterrupt) else FAULT


def _reader_is_gone() -> bool:
    """Return whether nothing reads this process' output any more."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def in_one_line(error: BaseException) -> str:
    """Return the error's message in one line; where a file system has refused a place, this and what to do about it."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        place = error.filename if error.filename2 is None else error.filename2  # where something is renamed to
        message = f"{place}: {MENDS.get(type(error), error.strerror)}"
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"
