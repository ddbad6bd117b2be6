"""Work in units: done once, by any number of processes and jobs, and errors that leave what is finished."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.refusals import one_line
from support.units import UNITS, Note

from cepe_jax.data.builder import Builder
from cepe_jax.data.units import JobConfig, one_job, run_units


@pytest.fixture
def builder(tmp_path) -> Builder:
    return Builder(tmp_path / "out", {})


def run(builder: Builder, ends: str = "", **job) -> list[dict] | None:
    work = Note(builder.out / "log", ends)
    return run_units(builder, UNITS, [1] * 7, work, JobConfig(**({"workers": 1} | job)), "note")


def log(builder: Builder) -> list[str]:
    """The units that were begun since the last call, in order of name."""
    path = builder.out / "log"
    noted = sorted(path.read_text().split()) if path.exists() else []
    path.unlink(missing_ok=True)
    return noted


EVERYTHING = ["0a", "1b", "2c", "3d", "4e", "5f", "6g"]


def test_every_unit_once(builder, caplog):
    marks = run(builder)
    assert [(mark["key"], mark["upper"]) for mark in marks] == [([name], name.upper()) for name in "abcdefg"]
    assert log(builder) == EVERYTHING
    assert caplog.messages[-1].startswith("note: 7 of 7, 0 s 77 tokens, ")
    caplog.clear()
    assert run(builder) == marks
    assert log(builder) == []
    assert not caplog.messages


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_jobs_share_the_units(builder, caplog, order):
    expected = {0: ["0a", "3d", "6g"], 1: ["1b", "4e"], 2: ["2c", "5f"]}
    results = []
    for left, number in zip([*order[1:], None], order, strict=True):
        results.append(run(builder, shard=f"{number}/3"))
        assert log(builder) == expected[number]
        assert (f"{builder.out}: " in caplog.text) == (left is not None)
        caplog.clear()
    assert results[:2] == [None, None]
    assert [mark["upper"] for mark in results[2]] == list("ABCDEFG")


def test_what_is_left_is_said(builder, caplog):
    assert run(builder, shard="1/4") is None
    assert re.match(f"{builder.out}: 5 of 7 units", caplog.messages[-1])


def test_a_unit_of_other_input_is_done_again(builder):
    run(builder)
    log(builder)
    units = [*UNITS[:2], ("C",), *UNITS[3:]]
    marks = run_units(builder, units, [1] * 7, Note(builder.out / "log"), JobConfig(workers=1), "note")
    assert log(builder) == ["2C"]
    assert marks[2]["key"] == ["C"]


@pytest.mark.parametrize("ends", ["ValueError", "KeyError"])
def test_an_error_leaves_what_is_finished(builder, ends):
    with pytest.raises((ValueError, KeyError), match="unit c is bad") as error:
        run(builder, ends)
    assert type(error.value).__name__ == ends
    assert log(builder) == ["0a", "1b", "2c"]
    assert len(run(builder)) == 7
    assert log(builder) == ["2c", "3d", "4e", "5f", "6g"]


def test_processes(builder, caplog):
    """An error in one, the death of one, and then they finish: by two processes, each unit once."""
    with pytest.raises(ValueError, match="^unit c is bad$"):
        run(builder, "ValueError", workers=2)
    assert {"0a", "1b", "2c"} <= set(log(builder))
    finished = {f"{n}{name}" for n, (name,) in enumerate(UNITS) if builder.marked(n, (name,))}
    assert {"0a", "1b"} & finished  # one of them, before its process went on to c
    assert "2c" not in finished

    (builder.units / "00006.json").unlink(missing_ok=True)  # two are left for two processes
    with pytest.raises(ValueError, match="killed.*--workers") as error:
        run(builder, "kill", workers=2)
    one_line(error)
    assert not finished - {"6g"} & set(log(builder))
    assert builder.marked(2, UNITS[2]) is None

    for number in (2, 4, 5):
        (builder.units / f"{number:05}.json").unlink(missing_ok=True)
    before = {f"{n}{name}" for n, (name,) in enumerate(UNITS) if builder.marked(n, (name,))}
    marks = run(builder, workers=2)
    assert [mark["upper"] for mark in marks] == list("ABCDEFG")
    again = set(EVERYTHING) - before
    assert set(log(builder)) == again
    said = caplog.messages[-1]
    assert said.startswith(f"note: {len(again)} of {len(again)}, ")
    assert f" s {len(again) * 11} tokens, " in said
    assert os.getpid() not in {mark["pid"] for mark in marks}


PROGRAM = """
import signal
import sys
from pathlib import Path
from support.units import UNITS, Note
from cepe_jax.exits import run
from cepe_jax.data.builder import Builder
from cepe_jax.data.units import JobConfig, run_units
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    out = Path(sys.argv[1])
    work, job = Note(out / "log", "wait", "a"), JobConfig(workers=2)
    run(lambda: run_units(Builder(out, {}), UNITS[:2], [1] * 2, work, job, "note"))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_no_process_is_left(tmp_path, end):
    """Ctrl-C, which all processes hear, is one line; and workers end with a parent that could not tell them."""
    script = tmp_path / "job.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    command = [sys.executable, script, tmp_path / "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as job:
        until = time.monotonic() + 20
        while not (tmp_path / "out" / "units" / "00001.json").exists():  # b is done, and a waits
            assert time.monotonic() < until
            time.sleep(0.02)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(children) >= 2
        if end == "interrupt":
            os.killpg(job.pid, signal.SIGINT)
            assert job.communicate(timeout=20) == ("", "job.py: interrupted\n")
            assert job.returncode == 1
        else:
            job.kill()
        while any(alive(int(child)) for child in children):
            assert time.monotonic() < until
            time.sleep(0.02)
    assert not (tmp_path / "out" / "units" / "00000.json").exists()


@dataclass(frozen=True)
class Job(JobConfig):
    out: Path = Path()


def test_jobs_of_other_shards_work_at_once(tmp_path):
    """The same job a second time does not."""
    begun = []

    @one_job
    def begin(job: Job) -> None:
        begun.append(job.shard)
        if job.shard == "0/2":
            begin(Job("1/2", out=tmp_path))
            with pytest.raises(ValueError, match=f"{tmp_path} is being written by process {os.getpid()} "):
                begin(job)

    begin(Job("0/2", out=tmp_path))
    begin(Job("0/2", out=tmp_path))
    assert begun == ["0/2", "1/2"] * 2


@pytest.mark.parametrize("shard", ["", "3", "1/1", "2/1", "-1/2", "0/0", "a/b", "1/2/3", "0 /2", "0/", "/2", "0.5/2"])
def test_wrong_shards(shard):
    with pytest.raises(ValueError, match="i/n .*0 <= i < n") as error:
        JobConfig(shard=shard)
    assert repr(shard) in str(error.value)


def test_wrong_workers():
    with pytest.raises(ValueError, match="workers is -1"):
        JobConfig(workers=-1)
