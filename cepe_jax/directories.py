"""Directories and files with one writer, whole or absent, in a file system or a bucket (gs://)."""

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from etils import epath

from cepe_jax.locks import held

STAGED = ".part"  # the end of names under which files are written
LOCK = ".lock"


@contextmanager
def one_writer_in(directory: Path | epath.Path, job: str = "") -> Iterator[None]:
    """Write in `directory`, which is made if absent, as its one writer; ValueError if there is another.

    Jobs of different names share a directory, and each name is one writer's. What writers that are gone have staged is
    removed at both ends of the block, once no other job is there. A place in a bucket has no lock.
    """
    if is_remote(directory):
        yield
        return
    absent = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / (f".job-{job}{LOCK}" if job else f".writer{LOCK}")
    try:
        with held(lock, directory):
            _remove_staged(directory, lock)
            yield
            _remove_staged(directory, lock)
    finally:
        if absent:
            with suppress(OSError):  # it is not empty
                directory.rmdir()


def _remove_staged(directory: Path, lock: Path) -> None:
    # Listed before the locks are: a job that begins in between has its files to itself.
    abandoned = [*directory.glob(f".*{STAGED}"), *directory.glob(f"*/.*{STAGED}")]
    if all(other == lock for other in directory.glob(f".job-*{LOCK}")):
        _remove(abandoned)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_a_writers(path: Path) -> bool:
    """Return whether this is a lock or a staged file: the next writer removes it."""
    return path.name.startswith(".") and path.suffix in (STAGED, LOCK)


@contextmanager
def one_writer_of(path: Path) -> Iterator[None]:
    """Write what will be called `path`, as its one writer; ValueError if there is another.

    What writers that are gone have staged for it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_name(f".{path.name}{LOCK}"), path):
        _remove(path.parent.glob(f".{escape(path.name)}.{'?' * 32}{STAGED}"))  # not those of NAME.more
        yield


def staged_path(path: Path) -> Path:
    """Return where to write what is then renamed to `path`: beside it, and no other process' of any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{STAGED}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a place for a file, which is called `path` only once the block has ended well, and else is removed."""
    place = staged_path(path)
    try:
        yield place
        place.rename(path)
    finally:
        place.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory beside `path`, which is removed at the end of the block unless it was renamed."""
    place = staged_path(path)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_text(path: Path | epath.Path, text: str) -> None:
    """Write a file that is whole or, if it cannot be written, what it was before."""
    if is_remote(path):
        path.write_text(text)
        return
    with staged(path) as place:
        place.write_text(text, encoding="utf-8")


def write_json(path: Path | epath.Path, value) -> None:
    """Write a value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def is_remote(path: Path | epath.Path | str) -> bool:
    """Return true for a place in a bucket: objects are written whole, and directories have no rename."""
    return str(path).startswith("gs://")


def download_hint(path: Path | epath.Path | str) -> str:
    """Return ": hf download ..." for a place that is not there and looks like a name of Hugging Face's, else ""."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or Path(path).parent.exists():
        return ""
    return f": hf download {path} --local-dir {Path(path).name}, then give {Path(path).name}"


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
    with one_writer_of(path):
        if path.exists():
            raise ValueError(f"{path} exists: remove it or give another name")
        with staged_directory(path) as place:
            yield place
            place.rename(path)
