"""Directories that are whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
