"""Raw documents: `.jsonl` files with a `text` in each line, other files as one document each; `.gz`, `.zst` of both."""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import fsspec
from etils import epath

from cepe_jax.directories import Place, is_remote, size_of

PACKED = ".gz", ".zst"
LONGEST = 1 << 28  # bytes of a document; a longer one is a bad one
RATIO = 1000  # a packed file of more times its own size, and of more than LONGEST, is refused
TOO_LONG = f"longer than {LONGEST >> 20} MiB: divide it"
BYTE_ORDER_MARK = "\ufeff"  # some programs begin a file with it


@dataclass(frozen=True)
class Extent:
    """The documents of a file that begin in its bytes [start, end); a compressed file is one extent."""

    path: str  # below the root
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class RawDocument:
    """One document, or the reason why there is none."""

    name: str  # the file, and for a line of it the byte at which the line begins
    domain: str
    text: str | None  # None where it cannot be read
    fault: str = ""  # file, line and what is wrong there: text that cannot be read, or is empty


def holds_lines(path: str) -> bool:
    for suffix in PACKED:
        path = path.removesuffix(suffix)
    return path.endswith(".jsonl")


def plan(
    root: Place, patterns: tuple[str, ...], exclude: tuple[str, ...], unit_bytes: int, out: Place | None = None
) -> list[list[Extent]]:
    """The files below `root` in units of about `unit_bytes` stored bytes, a function of their names and sizes alone.

    Small files share a unit; only an uncompressed `.jsonl` is divided. Files below `out` and below a folder named in
    `exclude` are left out.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory")
    for pattern in patterns:
        if Path(pattern).is_absolute():
            raise ValueError(f"pattern {pattern}: give patterns of paths below {root}, such as **/*.txt")
    sizes = _sizes(root, patterns)
    output = None if out is None or is_remote(out) != is_remote(root) else Path(os.path.relpath(out, root))
    units: list[list[Extent]] = []
    room = 0
    for relative in sorted(sizes):
        if (output and relative.is_relative_to(output)) or set(relative.parts[:-1]) & set(exclude):
            continue
        if "\n" in str(relative) or not _is_text(str(relative)):  # it becomes the document's name
            raise ValueError(f"{str(root / relative)!a}: its name is no line of UTF-8: rename it")
        size = sizes[relative]
        divided = relative.suffix == ".jsonl" and size > unit_bytes
        for start in range(0, size, unit_bytes) if divided else [0]:
            extent = Extent(str(relative), start, min(start + unit_bytes, size) if divided else size)
            if not units or room < extent.size:
                units.append([])
                room = unit_bytes
            units[-1].append(extent)
            room -= extent.size
    if not units:
        raise ValueError(f"{root}: no file matches {', '.join(patterns)}: give other patterns")
    return units


def _sizes(root: Place, patterns: tuple[str, ...]) -> dict[PurePath, int]:
    """Return the stored bytes of each file below `root` that matches a pattern, by its path below `root`."""
    if is_remote(root):
        files, top = fsspec.core.url_to_fs(str(root))
        # With their sizes, which come in one answer for many.
        listed = [files.glob(f"{glob.escape(top)}/{pattern}", detail=True) for pattern in patterns]
        infos = [info for some in listed for info in some.values() if info["type"] == "file"]
        return {PurePath(info["name"]).relative_to(top): info["size"] for info in infos}
    # Of the ways to match, this one goes into folders that are links: domains may lie on several disks.
    names = {name for p in patterns for name in glob.glob(p, root_dir=root, recursive=True, include_hidden=True)}
    return {PurePath(name): size_of(root / name) for name in names if (root / name).is_file()}


def _is_text(string: str) -> bool:
    """False for a string with half of a surrogate pair, which no encoding holds."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Unpacked(io.RawIOBase):
    """The content of a packed file, up to a limit: a few kilobytes of zeros can stand for a disk full of them."""

    def __init__(self, file, path: Place):
        self._file, self._path = file, path
        self._remaining = max(RATIO * size_of(path), LONGEST)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._remaining -= count
        if self._remaining < 0:
            raise ValueError(f"{self._path}: unpacks to more than {RATIO:,} times its size: unpack it, and look at it")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_unpacked(path: Place) -> io.BufferedReader:
    """Return the file, open to be read, and unpacked if it is packed."""
    stored = epath.Path(path).open("rb") if is_remote(path) else path
    if path.suffix == ".gz":
        file = gzip.open(stored)  # noqa: SIM115 (whoever closes the result closes it)
    elif path.suffix == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        most = {zstd.DecompressionParameter.window_log_max: 31}  # files of zstd --long too
        file = zstd.open(stored, options=most)
    else:
        return io.BufferedReader(stored) if is_remote(path) else open(path, "rb")
    return io.BufferedReader(_Unpacked(file, path), 1 << 17)


def text_of(line) -> str:
    """Return the `text` of a parsed line; ValueError if it has none."""
    text = line.get("text") if isinstance(line, dict) else None
    if not isinstance(text, str):
        raise ValueError("no text: give each line an object with a string `text`")
    return text


def read(
    root: Place, extent: Extent, domain_field: str, content: Callable[..., str] = text_of
) -> Iterator[RawDocument]:
    """The documents of an extent, in order. A bad line is one with a `fault`; a file that breaks off is a ValueError.

    A document is what `content` returns for a parsed line. The domain is the line's field `domain_field` (dots go into
    objects), without one the first folder below `root`.
    """
    folders = Path(extent.path).parts[:-1]
    folder = folders[0] if folders else (root if is_remote(root) else root.resolve()).name
    path = root / extent.path
    if not extent.size and path.suffix in PACKED:
        raise ValueError(f"{path}: damaged or cut short (empty): fetch it again")
    try:
        with open_unpacked(path) as file:
            if holds_lines(extent.path):
                yield from _lines(file, path, extent, domain_field, folder, content)
            else:
                whole = file.read(LONGEST + 1)
                text, fault = decoded(whole, path) if len(whole) <= LONGEST else (None, f"{path}: {TOO_LONG}")
                if content is not text_of:
                    text, fault = None, f"{path}: not .jsonl: give files with an object of JSON in each line"
                yield RawDocument(extent.path, folder, text, fault)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}): fetch it again") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # of a module that is imported only where it is needed
            raise ValueError(f"{path}: damaged or no zstd file ({error}): fetch it again") from None
        raise


def decoded(content: bytes, path: Place) -> tuple[str | None, str]:
    """The text of the whole file at `path`, None where it cannot be read, and what is wrong with it."""
    try:
        text = content.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        return None, f"{path}: not UTF-8 at byte {error.start}"
    return text, f"{path}: an empty document" if not text or text.isspace() else ""


def _lines(
    file, path: Place, extent: Extent, domain_field: str, folder: str, content: Callable[..., str]
) -> Iterator[RawDocument]:
    where, number = extent.start, 0
    if where:  # the line that is under way belongs to the extent before
        file.seek(where - 1)
        where += _skip_line(file) - 1
    first, lines_above = where, None
    whole = Path(extent.path).suffix in PACKED
    while whole or where < extent.end:
        line = file.readline(LONGEST + 1)
        if not line:
            return
        number += 1
        name, where = f"{extent.path}:{where}", where + len(line)
        if line.isspace():
            continue
        domain, text, fault = folder, None, ""
        try:
            if len(line) > LONGEST:
                where += 0 if line.endswith(b"\n") else _skip_line(file)
                raise ValueError(TOO_LONG)
            parsed = json.loads(line.decode().removeprefix(BYTE_ORDER_MARK))
            domain, text = _fields(parsed, content(parsed), domain_field, folder)
            if not text or text.isspace():
                fault = "an empty document"
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 at byte {error.start} of the line"
        except (ValueError, RecursionError) as error:
            fault = str(error)
        if fault:
            lines_above = _count_lines(path, first) if lines_above is None else lines_above
            fault = f"{path}:{lines_above + number}: {fault}"
        line = parsed = None  # they may be large, and the next one is not read yet
        yield RawDocument(name, domain, text, fault)


def _skip_line(file) -> int:
    """Read to the end of a line of any length, and return the number of its bytes."""
    count = 0
    while part := file.readline(1 << 20):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _fields(line, text: str, domain_field: str, folder: str) -> tuple[str, str]:
    """(domain, text) of a parsed line and its text; ValueError says what it lacks."""
    domain = line
    for key in domain_field.split(".") if domain_field else ():
        domain = domain.get(key) if isinstance(domain, dict) else None
    if domain_field and not (isinstance(domain, str) and domain):
        raise ValueError(f"no {domain_field}, which names the domain")
    if not _is_text(text) or (domain_field and not _is_text(domain)):
        raise ValueError("half of a surrogate pair in its text or domain")
    return (domain if domain_field else folder), text


def _count_lines(path: Place, offset: int) -> int:
    """Return how many lines end before the byte `offset`."""
    count = 0
    with epath.Path(path).open("rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            count, offset = count + block.count(b"\n"), offset - len(block)
    return count
