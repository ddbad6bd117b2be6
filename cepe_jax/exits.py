"""The exit statuses of scripts, and errors of one line."""

import errno
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cepe_jax.directories import in_one_line
from cepe_jax.progress import show_notices

# Numbers of sysexits.h where it has one; scripts/launch_tpu.sh goes by them.
REFUSED = 1  # one line says what is wrong: the same command would be refused again
FAULT = 70  # a bug, or the fault of a device, a disk or a bucket: the same command may succeed
STOPPED = 75  # the run was asked to stop before its end, and is saved: the same command continues it
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
    except (ValueError, OSError) as error:
        print(f"{program}: {in_one_line(error)}", file=sys.stderr)
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted")
    except Exception as error:
        traceback.print_exc()
        sys.exit(status_of(error))


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that `error` ends."""
    refusals = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    refused = isinstance(error, ValueError) and not RUNTIME.match(str(error))
    refused |= getattr(error, "errno", None) == errno.ENAMETOOLONG
    return REFUSED if refused or isinstance(error, (*refusals, KeyboardInterrupt)) else FAULT
