"""Who holds a lock, and when another process takes it over."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.refusals import one_line

from cepe_jax import locks
from cepe_jax.exits import FAULT
from cepe_jax.locks import held

KILLED = """
import os, signal, sys
from pathlib import Path
from cepe_jax.locks import held
with held(Path(sys.argv[1]), Path("place")):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / ".lock"


def write_owner(lock: Path, host: str) -> None:
    """Write the lock of a process on another host."""
    lock.write_text(f"filelock/2\npid=77\nhost={host}\nmode=lease\ntoken=abc\nduration={locks.LEASE!r}\n")


def test_the_second_is_refused_and_the_owner_named(lock):
    with held(lock, Path("place")):
        with pytest.raises(ValueError, match=f"^place .* process {os.getpid()} on .*, alive at ") as error:
            held(lock, Path("place")).__enter__()
        one_line(error)
    assert not lock.exists()
    with held(lock, Path("place")):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(lock):
    """At once: its process id is gone from this host."""
    environment = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, lock], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert lock.exists()
    with held(lock, Path("place")):
        pass
    assert not lock.exists()


def test_another_host_that_gives_signs_of_life_is_not(lock, monkeypatch):
    """The refusal comes with the first sign."""
    monkeypatch.setattr(locks, "BEAT", 0.3)
    write_owner(lock, "elsewhere")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(lock)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(ValueError, match="process 77 on elsewhere, alive at"):
            held(lock, Path("place")).__enter__()
    finally:
        done.set()
        heart.join()


def test_another_host_without_signs_of_life_is_dead(lock, monkeypatch, caplog):
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "LEASE", 0.5)
    write_owner(lock, "elsewhere")
    with caplog.at_level("INFO"), held(lock, Path("place")):
        assert "host=elsewhere" not in lock.read_text()
    assert "process 77 on elsewhere" in caplog.text


def test_a_process_that_loses_its_lock_ends(lock, monkeypatch, capfd):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    ended, statuses = threading.Event(), []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(locks.os, "_exit", end)
    with held(lock, Path("place")):
        lock.unlink()
        assert ended.wait(60)
    assert statuses == [FAULT]
    assert "start again" in capfd.readouterr().err
