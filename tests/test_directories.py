"""Directories with one writer, files that are whole or absent, and settings as JSON."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from etils import epath
from support.refusals import one_line

from cepe_jax.directories import new_directory, one_writer_in, staged, staged_path, write_json, write_text
from cepe_jax.identity import as_json, as_of, refuse_another_run
from cepe_jax.inference.caches import CacheConfig


def test_a_file_is_whole_or_what_it_was(tmp_path):
    write_text(tmp_path / "page.md", "é\n")
    assert (tmp_path / "page.md").read_bytes() == "é\n".encode()

    def breaks_off():
        with staged(tmp_path / "page.md") as place:
            place.write_text("half of")
            raise KeyError

    with pytest.raises(KeyError):
        breaks_off()
    with pytest.raises(TypeError):
        write_json(tmp_path / "page.md", {"key": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert (tmp_path / "page.md").read_text("utf-8") == "é\n"


def test_a_directory_has_one_writer(tmp_path):
    """A directory in which nothing was written is not left behind."""
    out = tmp_path / "out"
    with one_writer_in(out):
        with (
            pytest.raises(ValueError, match=f"out is being written by process {os.getpid()} ") as error,
            one_writer_in(out),
        ):
            pass
        one_line(error)
        assert out.exists()
    assert not out.exists()
    with one_writer_in(out):
        write_text(out / "page", "")
    assert [path.name for path in out.iterdir()] == ["page"]


def test_jobs_share_a_directory(tmp_path):
    """What a killed job staged goes once no other job is there: a file of a running one stays."""
    (tmp_path / "units").mkdir()
    abandoned = [staged_path(tmp_path / "shard"), staged_path(tmp_path / "units" / "0.json")]
    for path in abandoned:
        path.touch()
    with one_writer_in(tmp_path, "0-of-2"):
        assert not any(path.exists() for path in abandoned)
        running = staged_path(tmp_path / "shard")
        running.touch()
        with one_writer_in(tmp_path, "1-of-2"):
            assert running.exists()
            with pytest.raises(ValueError, match="is being written by"), one_writer_in(tmp_path, "0-of-2"):
                pass
        assert running.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["units"]


def test_a_new_directory_has_one_writer(tmp_path):
    """The second is refused and leaves the first's files alone; what was left of a killed one is removed."""
    target, other = tmp_path / "model", staged_path(tmp_path / "model.v2")
    abandoned = staged_path(target)
    for path in (abandoned, other):
        path.mkdir()
    with new_directory(target) as place:
        (place / "file").write_text("whole")
        with (
            pytest.raises(ValueError, match=f"model is being written by process {os.getpid()} "),
            new_directory(target),
        ):
            pass
    assert sorted(tmp_path.iterdir()) == sorted([other, target])
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_bucket_has_no_lock():
    with one_writer_in(epath.Path("gs://bucket/out")), one_writer_in(epath.Path("gs://bucket/out")):
        pass


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    place: Path = Path("a/b")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 0.5


def test_settings_as_json():
    assert as_json(Outer()) == {"inner": {"sizes": [1, 2], "place": "a/b"}, "rate": 0.5}
    assert as_json([{"key": Inner()}]) == [{"key": {"sizes": [1, 2], "place": "a/b"}}]


def test_another_run_is_refused_by_its_first_setting():
    stored = as_json(Outer())
    with pytest.raises(ValueError, match=r"out: .*rate is 0\.5 there and 0\.25 here"):
        refuse_another_run(Path("out"), stored, as_json(Outer(rate=0.25)))
    newer = stored | {"inner": stored["inner"] | {"added": 3}, "added": 4}
    refuse_another_run(Path("out"), stored, as_of(stored, newer))
    with pytest.raises(ValueError, match="added is null there and 4 here"):
        refuse_another_run(Path("out"), stored, newer)
    assert json.loads(json.dumps(stored)) == stored


def test_a_newer_setting_that_changes_a_run_refuses_it():
    """As another RoPE base would, for a run that an earlier version began."""
    stored = {"seed": 0}
    refuse_another_run(Path("out"), stored, as_of(stored, stored | {"rope_theta": 0.0, "mix_by": "weight"}))
    for name, value in (("rope_theta", 1e6), ("mix_by", "size")):
        with pytest.raises(ValueError, match=f"{name} is null there and {re.escape(json.dumps(value))} here"):
            refuse_another_run(Path("out"), stored, as_of(stored, stored | {name: value}))


def test_settings_that_are_gone_stop_a_run_only_if_they_did_something():
    present = {"examples": {"window": 8}, "seed": 0}
    stored = {"examples": {"window": 8, "neighbours": "none"}}
    refuse_another_run(Path("out"), stored, as_of(stored, present))
    stored["examples"]["neighbours"] = "joint"
    with pytest.raises(ValueError, match="out: .*examples .*joint"):
        refuse_another_run(Path("out"), stored, as_of(stored, present))


def test_caches_as_earlier_versions_stored_them():
    """Settings without a value are those that were not there; a full cache had the sinks of a rolling one."""
    for kind, more in (("full", {}), ("rolling", {"window": 9})):
        old = {"model": {"cache": {"kind": kind, "window": None, "sinks": 4} | more}}
        new = {"model": {"cache": as_json(CacheConfig(kind, **more))}}
        refuse_another_run(Path("out"), old, new)
        dotted = {f"model.cache.{name}": value for name, value in old["model"]["cache"].items()}
        refuse_another_run(Path("out"), dotted, {f"model.cache.{n}": v for n, v in new["model"]["cache"].items()})
    eight = {f"cache.{name}": value for name, value in as_json(CacheConfig("rolling", 9, sinks=8)).items()}
    with pytest.raises(ValueError, match="cache.sinks is 4 there and 8 here"):
        refuse_another_run(Path("out"), {"cache.kind": "rolling", "cache.window": 9, "cache.sinks": 4}, eight)
