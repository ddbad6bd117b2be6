"""What all scripts share."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> None:
    """Runs `main`; bad input (ValueError, FileNotFoundError) ends it with one line on stderr and exit status 1.

    Any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
