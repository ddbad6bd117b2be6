"""Directories and files with one writer, whole or absent, in a file system or a bucket (gs://)."""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import fsspec
from etils import epath

from cepe_jax.locks import held

Place = Path | epath.Path  # in a file system, or anywhere
STAGED = ".part"  # the end of names under which files are written
LOCK = ".lock"


@contextmanager
def one_writer_in(directory: Place, job: str = "") -> Iterator[None]:
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


def write_text(path: Place, text: str) -> None:
    """Write a file that is whole or, if it cannot be written, what it was before."""
    if is_remote(path):
        path.write_text(text)
        return
    with staged(path) as place:
        place.write_text(text, encoding="utf-8")


def write_bytes(path: Place, content: bytes) -> None:
    """Write a file as `write_text` does."""
    if is_remote(path):
        path.write_bytes(content)
        return
    with staged(path) as place:
        place.write_bytes(content)


def write_json(path: Place, value) -> None:
    """Write a value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def place(text: str | Place) -> "Place":
    """Return the path, which pathlib would take the second slash of gs:// from."""
    return epath.Path(text) if is_remote(text) else Path(text)


def is_remote(path: Place | str) -> bool:
    """Return true for a place in a bucket: objects are written whole, and directories have no rename."""
    return str(path).startswith("gs://")


def check_reachable(path: Place) -> None:
    """Raise ValueError if the path is in a bucket, and the library that reads and writes there is not installed."""
    if is_remote(path):
        try:
            fsspec.get_filesystem_class("gs")
        except ImportError:
            raise ValueError(f"{path} is in a bucket: pip install gcsfs to read and write there") from None


def size_of(path: Place) -> int:
    """Return the bytes of the file."""
    return epath.Path(path).stat().length


def local_directory(digest: str) -> Path:
    """Return the directory on this machine for copies of files in buckets that have this digest.

    It is where temporary files are (TMPDIR), and stays there for the processes that need it next.
    """
    home = Path(tempfile.gettempdir()) / f"cepe_jax-{os.getuid()}"
    home.mkdir(0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():  # its files are read as if they were the bucket's
        raise ValueError(f"{home} belongs to another user: set TMPDIR to a directory of your own")
    (home / digest).mkdir(exist_ok=True)
    return home / digest


def copy_once(source: epath.Path, target: Path) -> None:
    """Copy a file of a bucket to `target` unless it is there, whole, by whichever process copied it."""
    if not target.exists():
        with staged(target) as place:
            source.copy(place)


def beside(path: Place, other: str) -> Place:
    """Return the place `other`, an address or relative to `path`."""
    if is_remote(other) or not is_remote(path):
        return place(other) if is_remote(other) else path / other
    scheme, _, rest = str(path).partition("://")
    return epath.Path(f"{scheme}://{os.path.normpath(os.path.join(rest, other))}")


def relative_to(path: Place, start: Place) -> str:
    """Return `path` as `beside(start, ...)` takes it: relative unless only one of both is in a bucket."""
    if is_remote(path) != is_remote(start):
        return str(path if is_remote(path) else path.resolve())
    return os.path.relpath(*(one if is_remote(one) else one.resolve() for one in (path, start)))


def download_hint(path: Place | str) -> str:
    """Return ": hf download ..." for a place that is not there and looks like a name of Hugging Face's, else ""."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or Path(path).parent.exists():
        return ""
    return f": hf download {path} --local-dir {Path(path).name}, then give {Path(path).name}"


@contextmanager
def new_directory(path: Place | str) -> Iterator[Path]:
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
