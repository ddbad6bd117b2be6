"""Directories that are whole or absent, and runs that go on in one."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def staged_path(path: Path) -> Path:
    """Where to write what is then renamed to `path`: beside it, and no other process' of any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which is called `path` only once the block has ended well. ValueError if `path` exists."""
    path = path.absolute()
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
