"""Every command, killed at seeded moments and then run to its end: what it leaves equals that of an undisturbed run.

`tests/training/test_kills.py` kills training at each phase that can be seen. Here moments are random.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.models import write_home
from training.test_kills import Home

from fuzz.harness import LOCKS
from fuzz.models import make_hf

ROOT = Path(__file__).parents[2]
KILLS, LONGEST = 10, 600  # seconds
TIMES = {"seconds", "seconds_per_step", "tokens_per_second", "peak_memory", "bytes_per_second"}
WITH_TIMES = ".md", ".png", ".pdf"  # tables and plots of speeds
SAVE = """
import sys, numpy
from cepe_jax.inference.context import ContextCache, Passage
states = numpy.arange(1 << 22, dtype=numpy.float32).reshape(-1, 16)
for _ in range(100):
    ContextCache({"dtype": "float32"}, (Passage("0", states, 4, 0),)).save(sys.argv[1])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Return a directory with what the commands read."""
    home = tmp_path_factory.mktemp("home")
    (home / "model").mkdir()
    write_home(home / "model")
    make_hf(home / "hf")
    (home / "train").mkdir()
    Home(home / "train")
    (home / "texts").mkdir()
    for number in range(400):
        letters = np.random.default_rng(number).choice(list("abcdefgh \n"), 900)
        (home / "texts" / f"{number}.txt").write_text("".join(letters))
    return home


COMMANDS = {
    "train": ["scripts/train.py", "--config={home}/train/config.yaml", "--out={out}/run"],
    "prepare_data": ["scripts/prepare_data.py", "--input={home}/texts", "--out={out}/data", "--vocab_size=290"]
    + ["--unit_bytes=20000", "--test_fraction=0.2", "--workers=1"],
    "convert": ["scripts/convert.py", "to-jax", "{home}/hf", "{out}/model"],
    "evaluate": ["scripts/evaluate.py", "perplexity", "--model.path={home}/model/model", "--data={home}/texts"]
    + ["--out={out}/report", "--window=16", "--scored=4", "--chunks=[0, 2, 3]", "--chunk_length=8", "--windows=50"],
    "contexts": ["-c", SAVE, "{out}/contexts"],
}


class Command:
    """A command whose output is below `out`, with a directory of its own for temporary files."""

    def __init__(self, words: list[str], home: Path, out: Path):
        self.out, self.temporary = out, out.with_name(f"{out.name}.tmp")
        self.words = [sys.executable, *(word.replace("{home}", str(home)).replace("{out}", str(out)) for word in words)]
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TMPDIR": str(self.temporary)}
        self.env |= {"JAX_COMPILATION_CACHE_DIR": str(home / "cache")}
        self.clear()

    def clear(self) -> None:
        for path in (self.out, self.temporary):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def start(self) -> subprocess.Popen:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.words, env=self.env, cwd=ROOT, start_new_session=True, text=True, **pipes)

    def finish(self) -> float:
        """Run it to its end, and return how many seconds that took."""
        start, process = time.monotonic(), self.start()
        _, err = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, err[-2000:]
        return time.monotonic() - start

    def kill(self, after: float, whole_group: bool) -> bool:
        """Start it, and kill it after so many seconds; return False if it has ended before."""
        process = self.start()
        try:
            _, err = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            process.communicate(timeout=LONGEST)
            return True
        assert process.returncode == 0, err[-2000:]
        return False

    def contents(self) -> dict[str, object]:
        """Return what its files hold, without times, and without what a run keeps for itself."""
        paths = [path for path in self.out.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
        names = {str(path.relative_to(self.out)): path for path in paths if not path.name.startswith("events.")}
        return {name: content(path, self.out) for name, path in names.items() if not LOCKS.search(path.name)}


def content(path: Path, out: Path) -> object:
    """Return what must be equal of a file: JSON except times and the place `out`, tensors, the bytes of other files."""
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().replace(str(out), "").splitlines()]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text().replace(str(out), "")))
    if path.suffix == ".safetensors" or path.name == "contexts":
        return {name: array.tobytes() for name, array in load_file(path).items()}
    return "" if path.suffix in WITH_TIMES else path.read_bytes()


def timeless(value: object) -> object:
    if isinstance(value, dict):
        gone = TIMES | {"sha256"} if TIMES & value.keys() else TIMES  # a digest of what holds times
        return {key: timeless(one) for key, one in value.items() if key not in gone}
    return [timeless(one) for one in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_commands_end_as_others_do(name, home, tmp_path):
    whole, killed = (Command(COMMANDS[name], home, tmp_path / which) for which in ("whole", "killed"))
    whole.finish()
    expected, length = whole.contents(), Command(COMMANDS[name], home, tmp_path / "again").finish()  # is compiled now
    rng = np.random.default_rng(len(name))
    kills = 0
    while kills < KILLS:
        if killed.contents().keys() == expected.keys():  # it was killed when all was done
            killed.clear()
        kills += killed.kill(rng.uniform(0.3, 1.0) * length, bool(kills % 2))
    if killed.contents().keys() != expected.keys():  # else it had all but ended
        killed.finish()
    assert killed.contents() == expected
    left = [path.name for path in killed.temporary.iterdir()]
    assert not left
