"""A real run, killed at every phase that can be seen from outside: it goes on, and in the end nothing shows it."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from support import datasets
from support.models import DECODER, ENCODER, filled

from cepe_jax.config import CrossLayers
from cepe_jax.exits import FAULT, REFUSED, STOPPED
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.weights.source import save

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 100, 5
UNFINISHED = ".orbax-checkpoint-tmp"


def saved_in(out: Path) -> list[int]:
    """Return the steps of the checkpoints that have their final name."""
    return [int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal()]


class Home:
    """A dataset, a model to start from, and runs of one configuration; all share what is compiled."""

    def __init__(self, path: Path):
        self.path = path
        tokenizer = datasets.make_tokenizer(path)
        rng = np.random.default_rng(0)
        data = datasets.write_sequences(path / "data", list(rng.integers(3, 290, (40, 17))), 16, tokenizer)
        sizes = {"vocab_size": tokenizer.vocab_size + 1}

        def make():
            decoder = Llama(dataclasses.replace(DECODER, **sizes), key=jax.random.key(0))
            encoder = Encoder(
                dataclasses.replace(ENCODER, mlm_head=False, mlp_width=2000, **sizes), key=jax.random.key(0)
            )
            cross = cross_from_self_attention(
                decoder, encoder.config, CrossLayers("last", 1), "normal", key=jax.random.key(0)
            )
            return Cepe(decoder, encoder, cross)

        save(filled(make, seed=0), path / "start", assets=data)
        config = {"stage": "cepe", "data": str(data), "cepe": str(path / "start"), "steps": STEPS, "batch_size": 4}
        config |= {"save_every": SAVE_EVERY, "log_every": 1}
        config["examples"] = {"window": 8, "num_chunks": 2, "chunk_length": 4}
        (path / "config.yaml").write_text(json.dumps(config))
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.env |= {"JAX_COMPILATION_CACHE_DIR": str(path / "cache")}
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(self, name: str) -> "Process":
        return Process(self.path / name, self.path / "config.yaml", self.env)

    def run_far_from_its_end(self, name: str) -> "Process":
        """Go on with a run, or begin it anew where few checkpoints are to come: a busy machine kills late."""
        if max(saved_in(self.path / name), default=0) > STEPS // 2:
            shutil.rmtree(self.path / name)
        return self.run(name)


class Process:
    """The run in `out`, by the script; it goes on from what is there, which must be the newest checkpoint."""

    def __init__(self, out: Path, config: Path, env: dict):
        self.out = out
        self.first = max(self.saved(), default=0)
        command = [sys.executable, "scripts/train.py", "--config", str(config), f"--out={out}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def saved(self) -> list[int]:
        return saved_in(self.out)

    def unfinished(self) -> bool:
        return any(path.name.endswith(UNFINISHED) for path in (self.out / "checkpoints").glob("*"))

    def lines(self) -> list[dict]:
        """The whole lines of metrics.jsonl, without what depends on the clock."""
        path, times = self.out / "metrics.jsonl", {"seconds_per_step", "tokens_per_second", "peak_memory"}
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{name: line[name] for name in line.keys() - times} for line in lines]

    def when(self, phase: Callable[[], bool]) -> "Process":
        """Returns as soon as the run is in this phase."""
        deadline = time.monotonic() + 200
        while not phase():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        return self

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr; checks that the run began where the one before could have left off."""
        out, err = self.process.communicate(timeout=200)
        assert (f"resumed at step {self.first} of {STEPS} from" in err) == bool(self.first)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """At once; what is lost is an interval, and the steps that were done while the next state was written."""
        self.process.kill()
        assert self.end()[0] == -signal.SIGKILL
        assert self.lines()[-1]["step"] - max(self.saved(), default=0) <= 2 * SAVE_EVERY


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(home) -> Process:
    """A run that nothing has disturbed."""
    process = home.run("whole")
    status, _, err = process.end()
    assert status == 0, err
    return process


def assert_equal(process: Process, whole: Process) -> None:
    """The same metrics at every step, and the same bits in the trained model."""
    status, _, err = process.end()
    assert status == 0, err
    assert [line["step"] for line in whole.lines()] == list(range(1, STEPS + 1))
    assert process.lines() == whole.lines()
    files = [path.name for path in (whole.out / "model").iterdir()]
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (process.out / "model" / name).read_bytes() == (whole.out / "model" / name).read_bytes(), name
    assert not list(process.out.glob(".*"))  # no lock, nothing staged


def test_a_run_that_was_killed_equals_one_that_was_not(home, whole):
    """After a line of metrics; while Orbax's directory has its temporary name; after it has its final one.

    A minute of CPU for six real runs: only a process that is killed loses what it had not written.
    """
    rng = np.random.default_rng(1)
    process = home.run("killed")
    line = int(rng.integers(8, 20))
    process.when(lambda: len(process.lines()) >= line)
    second = home.run("killed").process  # is refused, and disturbs nothing
    assert re.fullmatch(
        rf"train.py: {process.out} is being written by process {process.process.pid} on .*\n", second.communicate()[1]
    )
    assert second.returncode == REFUSED
    process.kill()

    for _ in range(5):
        process = home.run_far_from_its_end("killed")
        later = process.first + SAVE_EVERY * int(rng.integers(1, 3))
        process.when(lambda: max(process.saved(), default=0) >= later)  # noqa: B023
        process.when(process.unfinished).kill()
        if process.unfinished():  # else it was faster than we were
            break
    assert process.unfinished()

    process = home.run_far_from_its_end("killed")
    renamed = process.first + SAVE_EVERY * int(rng.integers(1, 3))
    process.when(lambda: renamed in process.saved()).kill()
    assert_equal(home.run("killed"), whole)


@pytest.mark.slow
def test_sigterm_and_a_full_disk(home, whole):
    """The first saves and says how to go on, by its status too; the second says which state is whole."""
    process = home.run("stopped")
    process.when(lambda: len(process.lines()) >= 7).process.send_signal(signal.SIGTERM)
    status, _, err = process.end()
    (step,) = [step for step in process.saved() if f"stopped after step {step} of {STEPS}" in err]
    assert (status, step) == (STOPPED, max(process.saved()))
    assert err.splitlines()[-1].startswith(f"stopped after step {step} of {STEPS}")
    assert process.lines()[-1]["step"] == step
    assert not (process.out / "model").exists()

    process = home.run("stopped")
    process.when(lambda: process.first + SAVE_EVERY <= max(process.saved()))
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (400_000, 400_000))
    status, _, err = process.end()
    newest = max(process.saved())
    assert status == FAULT
    said = f"train.py: {process.out}/checkpoints: .*not written .*File too large.* step {newest} "
    assert re.match(said, err.splitlines()[-1])
    assert "Traceback" not in err
    assert_equal(home.run("stopped"), whole)
