"""Cases of the fuzzer, each named by its kind and a seed, in a worker process that may hang, grow or die.

One case again, with all that is known of it:
    PYTHONPATH=.:tests python -m fuzz GGUF 17
As many cases of each kind as wanted, and their outcomes as a table:
    PYTHONPATH=.:tests python -m fuzz --cases=250 --first=1000 --table=outcomes.md
"""

import functools
import importlib.util
import multiprocessing
import os
import re
import shutil
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cepe_jax.exits import REFUSED, in_one_line, status_of

GOOD = "refused", "right"
BAD = "wording", "leftovers", "traceback", "silent", "hang", "memory", "crash"
CPU_SECONDS = 20  # of a case, which takes a tenth of one: a busy neighbour does not make them more
SECONDS = 300  # of a case that waits for something
GROWTH = 2 << 30  # bytes of memory that a case may take
LONGEST = 1_000  # characters of a refusal
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
LOCKS = re.compile(r"(^|\.)lock$")


class Outcome(NamedTuple):
    kind: str
    seed: int
    word: str  # one of GOOD or BAD
    detail: str = ""
    seconds: float = 0.0  # of CPU

    def __str__(self) -> str:
        return f"{self.kind} {self.seed}: {self.word}: {self.detail}".encode(errors="backslashreplace").decode()


@functools.cache
def sound(name: str, root: Path):
    """Return the place of the sound thing of a kind, and what its action makes of it."""
    from fuzz.kinds import KINDS  # in workers alone: it imports all of the package

    kind = KINDS[name]
    place = thing(kind.make, root)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        copy = Path(shutil.copytree(place, Path(folder) / "case"))
        result = kind.act(copy)
        if wrong := kind.wrong(copy, result, result):
            raise AssertionError(f"{name}: the sound thing is not right: {wrong}")
    return place, result


def thing(make, root: Path) -> Path:
    """Return a directory that `make` has filled, for all workers of `root`."""
    place = root / make.__name__
    if not place.exists():
        partial = Path(tempfile.mkdtemp(dir=root))
        make(partial)
        partial.rename(place)
    return place


def run_case(name: str, seed: int, root: Path, verbose: bool = False) -> Outcome:
    """Spoil a copy of the sound thing, act on it and judge the result."""
    from fuzz.kinds import KINDS

    kind, (place, whole) = KINDS[name], sound(name, root)
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    with tempfile.TemporaryDirectory(dir=root) as folder:
        os.chdir(folder)  # what code in a file would make is made here
        copy = Path(shutil.copytree(place, Path(folder) / "case"))
        words = [*kind.spoil(copy, rng)]
        if verbose:
            print(f"{name} {seed}: changed: {', '.join(words) or 'bytes'}")
            shutil.copytree(copy, Path(tempfile.mkdtemp(prefix=f"{name.replace(' ', '-')}-")) / "case")
        before = set(Path(folder).rglob("*"))
        words += [str(copy), *(path.name for path in before if path.is_file() and len(path.name) > 4)]
        try:
            result = kind.act(copy)
        except (ValueError, OSError) as error:
            if verbose:
                traceback.print_exc()
            left = {path.name for path in set(Path(folder).rglob("*")) - before if not LOCKS.search(path.name)}
            word, detail = ("leftovers", ", ".join(sorted(left))) if left else judge(error, words)
        except MemoryError:
            word, detail = "memory", "MemoryError"
        except Exception as error:
            if verbose:
                traceback.print_exc()
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "cepe_jax/" in frame.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            word, detail = "traceback", f"{where}: {type(error).__name__}: {shortened(str(error), 120)}"
        else:
            try:
                wrong = kind.wrong(copy, result, whole)
            except Exception as error:  # the file lacks what a right result needs
                wrong = f"accepted, and its content is not readable: {type(error).__name__}: {error}"
            wrong = "code of the file ran" if (Path(folder) / "ran").exists() else wrong
            word, detail = ("silent", shortened(wrong, 200)) if wrong else ("right", "")
        os.chdir(root)
    return Outcome(name, seed, word, detail.replace(str(copy), ""))


def judge(error: BaseException, words: list[str]) -> tuple[str, str]:
    """Return "refused" if the message is one short line that has one of the words, else what is wrong with it."""
    message = str(error)
    shown = in_one_line(error)
    if len(shown) > LONGEST:
        return "wording", f"{len(shown):,} characters: {shortened(message, 120)}"
    if "\n" in message:
        return "wording", f"several lines: {message!r}"
    if not any(spelled(word) in spelled(shown) for word in words):
        return "wording", f"names neither the file nor the setting: {shown}"
    if status_of(error) != REFUSED:
        return "wording", f"status {status_of(error)}: {shown}"
    return "refused", shown


def spelled(text: str) -> str:
    return text.replace("_", " ").replace("-", " ")


def shortened(text: str, length: int) -> str:
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else f"{line[:length]}..."


def serve(pipe, root: Path) -> None:
    """Answer cases until the other end closes. A case without a seed prepares its kind."""
    while True:
        try:
            name, seed = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(sound(name, root) and None if seed is None else run_case(name, seed, root))
        except Exception:
            pipe.send(traceback.format_exc())


class Worker:
    """A process for cases, started again after each that it does not survive."""

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join()
        shutil.rmtree(self.root)

    def case(self, name: str, seed: int) -> Outcome:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.root), daemon=True)
            self.process.start()
            theirs.close()
        reply = self._ask(name, None) or self._ask(name, seed)
        if isinstance(reply, Outcome):
            return reply
        raise AssertionError(reply)

    def _ask(self, name: str, seed: int | None) -> Outcome | str | None:
        self.pipe.send((name, seed))
        start, (cpu, memory) = time.monotonic(), self._usage()
        while not self.pipe.poll(0.05):
            used = [now - before for now, before in zip(self._usage(), (cpu, memory), strict=True)]
            if seed is not None and used[1] > GROWTH:
                return self._end(name, seed, "memory", f"{used[1] / 2**30:.1f} GiB more", used[0])
            if seed is not None and (used[0] > CPU_SECONDS or time.monotonic() - start > SECONDS):
                return self._end(name, seed, "hang", f"{used[0]:.0f} s of CPU, {used[1] >> 20} MiB more", used[0])
        try:
            reply = self.pipe.recv()
            return reply._replace(seconds=self._usage()[0] - cpu) if isinstance(reply, Outcome) else reply
        except (EOFError, ConnectionError):
            self.process.join()
            return self._end(name, seed, "crash", f"exit code {self.process.exitcode}")

    def _end(self, name: str, seed: int, word: str, detail: str, seconds: float = 0.0) -> Outcome:
        self.process.kill()
        self.process.join()
        self.process = None
        return Outcome(name, seed, word, detail, seconds)

    def _usage(self) -> tuple[float, int]:
        """Return the process' CPU seconds and bytes of memory."""
        try:
            times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):  # it has ended
            return 0, 0
        return (int(times[11]) + int(times[12])) / TICK, int(pages) * PAGE


def missing(needs: Iterable[str]) -> list[str]:
    """Return the packages that a kind needs and that are not installed."""
    return [name for name in needs if importlib.util.find_spec(name) is None]


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes of each kind as a table in Markdown, with the CPU seconds of all its cases."""
    words, rows = [*GOOD, *BAD], {}
    for outcome in outcomes:
        for kind in (outcome.kind, "all"):
            rows.setdefault(kind, []).append(outcome)
    rows["all"] = rows.pop("all", [])
    lines = [f"| kind | tried | {' | '.join(words)} | CPU s |", "|---" * (len(words) + 3) + "|"]
    for kind, row in rows.items():
        counts = Counter(outcome.word for outcome in row)
        cells = [kind, len(row), *(counts[word] for word in words), f"{sum(outcome.seconds for outcome in row):.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
