"""Datasets by Apache Beam, which has an environment of its own: the same bytes as by processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import buckets
from support.tokenizers import byte_level

from cepe_jax.data.beam import run_on_beam
from cepe_jax.data.builder import Builder

pytest.importorskip("apache_beam")
ROOT = Path(__file__).parents[2]
OTHER = ROOT / ".venv" / "bin" / "python"  # where Beam is not
BEAM = "--runner=FnApiRunner", "--workers=2"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A bucket with raw documents in several units; beside it a tokenizer, and the dataset by one process."""
    home = tmp_path_factory.mktemp("beam")
    rng = np.random.default_rng(0)
    for number in range(12):
        path = home / "bucket" / "raw" / f"{number % 2}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choice(["ab", "é", "cde", "\n"], 400)))
    byte_level(home / "tokenizer.json")
    prepare(home, home / "bucket" / "raw", home / "one", "--workers=1")
    return home


def command(home: Path, source: Path | str, out: Path | str, *more: str, python: Path | str = sys.executable) -> list:
    options = "--test_fraction=0.3", "--unit_bytes=2500", '--patterns=["**/*.txt"]', *more
    places = f"--input={source}", f"--out={out}", f"--tokenizer={home / 'tokenizer.json'}"
    return [str(python), str(ROOT / "scripts" / "prepare_data.py"), "documents", *places, *options]


def variables(home: Path) -> dict[str, str]:
    scratch = home / "site"
    return os.environ | {"JAX_PLATFORMS": "cpu"} | buckets.variables_for_processes(scratch, home)


def prepare(home: Path, source: Path | str, out: Path | str, *more: str, **options) -> str:
    """Run the script and return what it wrote to stderr, if it ended with an error."""
    run = subprocess.run(
        command(home, source, out, *more, **options), env=variables(home), capture_output=True, text=True
    )
    return run.stderr if run.returncode else ""


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a dataset by name, except the marks of its units and the tokenizer's time of writing."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_bytes_of_one_process(home):
    assert prepare(home, home / "bucket" / "raw", home / "two", "--workers=2") == ""
    assert prepare(home, home / "bucket" / "raw", home / "beam", *BEAM) == ""
    assert len(contents(home / "one")) > 20
    assert contents(home / "one") == contents(home / "two") == contents(home / "beam")


@pytest.mark.skipif(not OTHER.exists(), reason="no .venv: run scripts/test.sh first")
def test_bytes_of_the_environment_without_beam(home):
    assert prepare(home, home / "bucket" / "raw", home / "other", "--workers=1", python=OTHER) == ""
    assert contents(home / "one") == contents(home / "other")


def test_bytes_in_a_bucket(home):
    assert prepare(home, "gs://bucket/raw", "gs://bucket/documents", *BEAM) == ""
    assert contents(home / "one") == contents(home / "bucket" / "documents")


def test_error_of_a_unit_is_one_line(home):
    """Its worker's, not Beam's, which has the whole stack."""
    (home / "bad").mkdir()
    for number in range(3):
        (home / "bad" / f"{number}.txt.gz").write_bytes(b"no gzip" if number == 1 else b"")
    said = prepare(home, home / "bad", home / "refused", '--patterns=["**/*.gz"]', *BEAM)
    assert said.splitlines()[-1].startswith("prepare_data.py: ")
    assert ".txt.gz" in said.splitlines()[-1]
    assert not (home / "refused" / "dataset.json").exists()


@pytest.mark.parametrize("runner", ["Nothing", "apache_beam.nothing.Runner", "DataflowRunner"])
def test_runner_that_is_not_there(home, runner):
    said = prepare(home, home / "bucket" / "raw", home / "none", f"--runner={runner}")
    assert "Traceback" not in said
    assert runner in said.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--direct_num_workers=many", "--runner=DirectRunner"])
def test_bad_flag_of_beam(home, flag):
    said = prepare(home, home / "bucket" / "raw", home / "none", "--runner=FnApiRunner", f'--beam=["{flag}"]')
    assert "Traceback" not in said
    assert flag in said.splitlines()[-1]


def test_full_disk_is_no_traceback(home, tmp_path):
    """An OSError of a unit stays one, which a script prints in a line."""
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left"):
        list(run_on_beam(Builder(tmp_path / "out", {}), [("a",)], [0], full, ["--runner=FnApiRunner"]))


def full(number: int, unit: tuple) -> None:
    raise OSError(28, "No space left on device")


def test_killed_job_goes_on(home):
    """Finished units stay as they are, and its processes end with it."""
    out = home / "killed"
    job = subprocess.Popen(
        command(home, home / "bucket" / "raw", out, *BEAM), env=variables(home), stderr=subprocess.DEVNULL
    )
    while not list(out.glob("units/0*.json")):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("units/0*.json")}
    assert prepare(home, home / "bucket" / "raw", out, "--workers=1") == ""
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert contents(home / "one") == contents(out)
