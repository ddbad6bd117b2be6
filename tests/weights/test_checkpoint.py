"""Checkpoints: what comes back has the bits and the place it had; what is not its run's own is refused in one line."""

import contextlib
import re
import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cepe_jax.weights.checkpoint import Checkpoints

STATE = {"a": jnp.arange(300_000, dtype=jnp.float32) / 7, "b": {"c": jnp.arange(5, dtype=jnp.bfloat16)}}


@pytest.fixture
def home(tmp_path) -> Path:
    """The directory of two checkpoints, of steps 2 and 4."""
    with contextlib.closing(Checkpoints(tmp_path, {"run": 1})) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, STATE | {"a": STATE["a"] + step})
    return tmp_path


def restore(home: Path, like=STATE):
    with contextlib.closing(Checkpoints(home, {"run": 1})) as checkpoints:
        return checkpoints.restore(like)


def refusal(home: Path, like=STATE) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        restore(home, like)
    return str(refused.value).removeprefix(f"{home}/")


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_comes_back(home):
    step, state = restore(home)
    assert step == 4
    np.testing.assert_array_equal(state["a"], STATE["a"] + 4)
    np.testing.assert_array_equal(state["b"]["c"], STATE["b"]["c"])


def test_a_reader_reads_any_step_and_leaves_what_is_being_written(home):
    """A run may be saving what is staged; one that starts there removes it. Other steps and runs are refused."""
    staged = home / "6.orbax-checkpoint-tmp"
    shutil.copytree(home / "4", staged)
    with contextlib.closing(Checkpoints(home, {"run": 1}, reader=True)) as checkpoints:
        for step in (2, 4):
            np.testing.assert_array_equal(checkpoints.read(step, STATE)["a"], STATE["a"] + step)
            assert checkpoints.facts(step)["step"] == step
        with pytest.raises(ValueError, match=r"step 3\b.*\(2, 4\)"):
            checkpoints.read(3, STATE)
    assert staged.exists()
    with (
        contextlib.closing(Checkpoints(home, {"run": 2}, reader=True)) as checkpoints,
        pytest.raises(ValueError, match="run is 1 there and 2 here"),
    ):
        checkpoints.read(2, STATE)
    assert restore(home)[0] == 4
    assert not staged.exists()


@pytest.mark.parametrize(("keep", "steps"), [({}, [3, 4]), ({"keep": 3}, [2, 3, 4]), ({"keep": None}, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path, keep, steps):
    with contextlib.closing(Checkpoints(tmp_path, {"run": 1}, **keep)) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"a": STATE["b"]["c"]})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == steps


def test_of_what_it_should_be_like_no_array_is_read(home):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
    step, state = restore(home, like)
    assert step == 4
    np.testing.assert_array_equal(state["a"], STATE["a"] + 4)
    assert state["a"].sharding == STATE["a"].sharding


def test_a_setting_that_is_newer_than_the_checkpoint_is_not_compared(tmp_path):
    """One that it has is, and one that it alone has."""

    def opened(identity):
        return contextlib.closing(Checkpoints(tmp_path, identity))

    with opened({"seed": 1, "optimizer": {"rate": 1.0}}) as checkpoints:
        checkpoints.save(2, STATE["b"])
    with opened({"seed": 1, "optimizer": {"rate": 1.0, "eps": 2.0}, "newer": 3}) as checkpoints:
        assert checkpoints.restore(STATE["b"])[0] == 2
    for present, differs in (
        (
            {"seed": 1, "optimizer": {"rate": 2.0, "eps": 2.0}},
            r'optimizer .*\{"rate": 1\.0\}.*\{"rate": 2\.0\}',
        ),
        ({"optimizer": {"rate": 1.0}}, "seed .* 1 .* null "),
    ):
        with opened(present) as checkpoints, pytest.raises(ValueError, match=differs):
            checkpoints.restore(STATE["b"])


DAMAGES = {
    "a bit of an array": lambda path: flip_a_bit(largest(path / "state")),
    "an array is cut short": lambda path: largest(path / "state").write_bytes(b"0" * 1000),
    "an array is missing": lambda path: largest(path / "state").unlink(),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no facts": lambda path: shutil.rmtree(path / "facts"),
    "facts cut short": lambda path: largest(path / "facts").write_text('{"identity": {"ru'),
    "empty": lambda path: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in path.iterdir()],
    "a file of another program": lambda path: (shutil.rmtree(path), path.mkdir(), (path / "model.pt").touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_the_one_before_named(home, damage):
    DAMAGES[damage](home / "4")
    told = refusal(home)
    assert told.startswith("4: ")
    assert "damaged" in told
    assert re.search(r": remove it .* step 2\b", told)
    shutil.rmtree(home / "4")
    step, state = restore(home)
    assert step == 2
    np.testing.assert_array_equal(state["a"], STATE["a"] + 2)


def from_another(error: Exception) -> Exception:
    """A bare one, as Orbax raises it."""
    outer = Exception("Encountered error while reading array index")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (MemoryError("no room"), MemoryError, "^no room$"),
        (PermissionError(13, "Permission denied"), PermissionError, "Permission denied$"),
        (TimeoutError("no answer"), TimeoutError, "^no answer$"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), jax.errors.JaxRuntimeError, "^RESOURCE_EXHAUSTED: 9"),
        (RuntimeError("Gloo: connection closed by peer"), RuntimeError, "^Gloo"),
        (TypeError("a bug"), TypeError, "^a bug$"),
        (ValueError("UNAVAILABLE: 503"), OSError, r"/4: .*\(UNAVAILABLE: 503\)"),
        (ValueError("PERMISSION_DENIED: open"), OSError, r"/4: .*\(PERMISSION_DENIED: open\)"),
        (ValueError("DATA_LOSS: corrupt"), ValueError, r"/4: damaged \(DATA_LOSS: corrupt\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda error: error, from_another])
def test_what_is_not_damage_is_not_called_so(home, monkeypatch, error, raised, message, wrap):
    """Else it would have the user remove a good checkpoint."""

    def fail(*_, **__):
        raise wrap(error)

    with contextlib.closing(Checkpoints(home, {"run": 1})) as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "restore", fail)
        with pytest.raises(raised, match=message) as refused:
            checkpoints.restore(STATE)
    assert ("damaged" in str(refused.value)) == ("DATA_LOSS" in str(error))


def test_a_bug_is_no_failure_of_the_disk(home, monkeypatch):
    def fail(*_, **__):
        raise TypeError("a bug")

    with contextlib.closing(Checkpoints(home, {"run": 1})) as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "save", fail)
        with pytest.raises(TypeError, match="^a bug$"):
            checkpoints.save(6, STATE)


def test_all_that_are_damaged_are_named(home):
    (home / "600").mkdir()
    flip_a_bit(largest(home / "4/state"))
    assert re.search(r"remove it and 4\b.* step 2\b", refusal(home))
    flip_a_bit(largest(home / "2/state"))
    assert "no whole" in refusal(home)


def test_under_another_name(home):
    (home / "4").rename(home / "5")
    assert re.search("^5: .* step 4 .*: remove it ", refusal(home))


@pytest.mark.parametrize(
    ("like", "differs"),
    [
        (STATE | {"a": STATE["a"].astype(jnp.bfloat16)}, r"a .*float32\[300000\].*bfloat16\[300000\]"),
        (STATE | {"a": STATE["a"][:4]}, r"a .*float32\[300000\].*float32\[4\]"),
        (STATE | {"b": {}}, r"b\.c .*bfloat16\[5\].*None"),
        (STATE | {"d": STATE["a"]}, r"d .*None.*float32\[300000\]"),
    ],
)
def test_another_models_is_refused(home, like, differs):
    """A type too: Orbax would cast."""
    assert re.search(f"^4: .* {differs}", refusal(home, like))


@pytest.mark.parametrize("noticed_by", ["save", "close"])
def test_full_disk_is_one_line(home, monkeypatch, capfd, noticed_by):
    """A limit of the size of files stands for the disk. The last whole checkpoint stays, and with room the run goes on.

    Nothing else is printed: of several arrays that are written at once all fail, the last after the error is raised.
    """
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    state = {f"a{number}": STATE["a"] + number for number in range(6)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(home, {"run": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(6, state)
        with pytest.raises(OSError, match=f"^{home}: .*not written.* step 4 "):
            checkpoints.save(8, state) if noticed_by == "save" else checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert not unraisable
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in home.iterdir() if path.name.isdecimal()) == ["2", "4"]
    with contextlib.closing(Checkpoints(home, {"run": 1})) as checkpoints:
        assert checkpoints.restore(STATE)[0] == 4
        checkpoints.save(6, STATE)
    assert restore(home)[0] == 6
