"""Directories that are whole or absent, in a file system or a bucket (gs://), and runs that go on in one."""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath


def staged_path(path: Path) -> Path:
    """Where to write what is then renamed to `path`: beside it, and no other process' of any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def is_remote(path: Path | epath.Path | str) -> bool:
    """Whether this is a place in a bucket: objects are written whole, and directories have no rename."""
    return str(path).startswith("gs://")


@contextmanager
def new_directory(path: Path | epath.Path | str) -> Iterator[Path]:
    """A directory to fill, which is called `path` only once the block has ended well. ValueError if `path` exists.

    A place in a bucket gets the files afterwards, in the order in which they were written: it is whole, and exists,
    once it has the last one, which must be config.json. Until then the directory takes room where temporary files do.
    """
    if is_remote(path):
        path = epath.Path(path)
        if (path / "config.json").exists():
            raise ValueError(f"{path} exists: remove it or give another name")
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            path.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(local).iterdir(), key=lambda file: file.stat().st_mtime_ns):
                epath.Path(file).copy(path / file.name, overwrite=True)
        return
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists: remove it or give another name")
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(path)


def refuse_another_run(where: Path, stored: dict, present: dict) -> None:
    """ValueError that names the first setting in which two runs' identities differ."""
    for key in sorted(set(stored) | set(present)):
        if stored.get(key) != present.get(key):
            differing = f"{key} is {json.dumps(stored.get(key))} there and {json.dumps(present.get(key))} here"
            raise ValueError(f"{where}: is of another run, {differing}: use another directory, or remove it")


def as_of(stored: dict, present: dict) -> dict:
    """`present` without the settings that `stored` lacks, which are newer than it; those of settings in it too."""
    return {
        key: as_of(stored[key], value) if isinstance(value, dict) and isinstance(stored[key], dict) else value
        for key, value in present.items()
        if key in stored
    }
