"""JSON that somebody else may have written, as declared types. Anything else is refused in one line.

The errors name the file, the field and the value, and end with the mend.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
COPY = "copy it again"
LARGEST = 1 << 63  # whole numbers are below it
Seed = Annotated[int, Meta(ge=0, lt=1 << 32)]  # of a random generator


def read_json(path: Path, kind: type[T] = dict[str, Any], mend: str = COPY) -> T:
    """Return the content of the file at `path`, which exists, as `kind`; ValueError for anything else."""
    check_is_file(path, mend)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON (not UTF-8 at byte {error.start}): {mend}") from None
    return parse_json(text, str(path), kind, mend)


def check_is_file(path: Path, mend: str = COPY) -> None:
    """Raise ValueError for a device or a pipe, which may have no end."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: {mend}")


def parse_json(text: str | bytes, where: str, kind: type[T] = dict[str, Any], mend: str = COPY) -> T:
    """Return JSON text as `kind`. ValueError for repeated keys and for numbers that are not finite, too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{shortened(next(key for key in keys if keys.count(key) > 1))} stands twice")
        return values

    hooks = {"object_pairs_hook": once, "parse_int": number, "parse_float": number, "parse_constant": number}
    try:
        value = json.loads(text, **hooks)
        if "\\u" in text if isinstance(text, str) else b"\\u" in text:  # half a character may be escaped
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} is not JSON as we read it (nested too deeply): {mend}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON as we read it ({error}): {mend}") from None
    return typed(value, kind, where, mend)


def number(digits: str) -> float | int:
    """Return the number; ValueError for one that is not finite.

    A whole one that no size, id or count can be is a float: some tokenizer_config.json have 10^30 for "no limit".
    """
    value = math.inf if len(digits) > 400 else float(digits)
    if not re.search("[.eENI]", digits) and abs(value) < LARGEST:
        return int(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(digits, quoted=False)} is no number that can be meant")
    return value


def typed(value: Any, kind: type[T], where: str, mend: str = COPY) -> T:
    """Return decoded JSON as `kind`: a type, or a dataclass, which has all keys of its object."""
    try:
        result = msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        field = place.strip("`").removeprefix("$").removeprefix(".")
        held = f"{field} is {shortened(_at(value, field))}" if field else f"holds {shortened(value)}"
        raise ValueError(f"{where}: {held}: {in_words(message)}: {mend}") from None
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {type(error).__name__}: {mend}") from None
    _refuse_unknown(value, kind, where, "")
    return result


def in_words(message: str) -> str:
    """Return a message of the library's as the end of ours."""
    return message[:1].lower() + message[1:].replace("`", "")


def _refuse_unknown(value: Any, kind: Any, where: str, group: str) -> None:
    """Raise ValueError for a key that a dataclass in `kind` does not have."""
    if not (dataclasses.is_dataclass(kind) and isinstance(value, dict)):
        return
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - known.keys()):
        names = ", ".join(shortened(f"{group}{name}", quoted=False) for name in unknown[:3])
        raise ValueError(f"{where}: unknown key {names}: it may be from a newer version")
    for name, inner in value.items():
        _refuse_unknown(inner, known[name], where, f"{group}{name}.")


def _at(value: Any, field: str) -> Any:
    """Return the value at a key, or at a place such as `a.b[0]`; the whole value if a key in it has such letters."""
    if isinstance(value, dict) and field in value:
        return value[field]
    for key, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        try:
            value = value[int(number)] if number else value[key]
        except (KeyError, IndexError, TypeError):
            break
    return value


def shortened(value: Any, quoted: bool = True) -> str:
    """Return the value in a line's part: long ones by their beginning."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text):,} characters)"
