"""Directories and files that are whole or absent, in a file system or a bucket (gs://), and refused places."""

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

# What to do about what a file system refuses.
MENDS = {
    FileNotFoundError: "no such file or directory: look at its name",
    FileExistsError: "is there already, and no directory: give another name",
    IsADirectoryError: "is a directory: give a file",
    NotADirectoryError: "is no directory, or lies below a file: give another place",
    PermissionError: "permission denied: give a place that you may read and write",
}


def staged_path(path: Path) -> Path:
    """Where to write what is then renamed to `path`: beside it, and no other process' of any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a place for a file, which is called `path` only once the block has ended well, and else is removed."""
    place = staged_path(path)
    try:
        yield place
        place.rename(path)
    finally:
        place.unlink(missing_ok=True)


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
    """Whether this is a place in a bucket: objects are written whole, and directories have no rename."""
    return str(path).startswith("gs://")


def in_one_line(error: BaseException) -> str:
    """Return the error's message in one line; where a file system has refused a place, this and what to do about it."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        place = error.filename if error.filename2 is None else error.filename2  # where something is renamed to
        message = f"{place}: {MENDS.get(type(error), error.strerror)}"
    return " ".join(message.split())


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
