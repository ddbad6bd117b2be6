"""Work in units that notes what it does, and fails as a test wants."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

UNITS = [(name,) for name in "abcdefg"]


@dataclass(frozen=True)
class Note:
    """Work that notes its unit in a file, and ends badly at one of them while that unit's `switch` is there."""

    log: Path
    ends: str = ""  # the exception, or "kill" or "wait"
    at: str = "c"

    def __call__(self, number: int, name: str):
        with open(self.log, "a") as log:
            log.write(f"{number}{name} ")
        yield 0.5, 10
        if name == self.at and self.ends:
            if self.ends == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while self.ends == "wait":
                time.sleep(0.05)
                yield 0.0, 0
            raise {"ValueError": ValueError, "KeyError": KeyError}[self.ends](f"unit {name} is bad")
        yield 0.5, 1
        return {"upper": name.upper(), "pid": os.getpid()}
