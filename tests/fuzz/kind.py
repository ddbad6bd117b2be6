"""The kinds of input that are spoiled: how each is made, spoiled and read, and what makes an accepted result right.

An accepted result must be what the sound input gives or, where a value was changed, exactly the file's value in its
declared type. Bytes without a checksum may change: then the result must be what an independent reading says.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cepe_jax.model.rope import inverse_frequencies
from fuzz.mutations import (
    Rng,
    change_bytes,
    change_json,
)

SHARD = "model-00001-of-00001.safetensors"
KINDS: dict[str, "Kind"] = {}


@dataclass(frozen=True)
class Kind:
    """A kind of input. `make` fills a directory, and `spoil` changes it: one of the words it returns names the change.

    `act` reads it as the scripts do. `wrong` says what is wrong with a result, given the directory, the result and what
    the sound directory gives.
    """

    make: Callable[[Path], None]
    spoil: Callable[[Path, Rng], list[str]]
    act: Callable[[Path], Any]
    wrong: Callable[[Path, Any, Any], str]
    needs: tuple[str, ...] = ()  # packages


def spoil_bytes(path: Path, rng: Rng) -> list[str]:
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    return []


def spoil_json(path: Path, rng: Rng, share: float = 0.15) -> list[str]:
    """Change the content of a JSON file or, in this share of cases, its bytes."""
    if rng.random() < share:
        return spoil_bytes(path, rng)
    text, words = change_json(path.read_text(), rng)
    path.write_text(text)
    return [word for word in words if not word.isdecimal()]


def same(place: Path, result: Any, whole: Any) -> str:
    """Return "" for what the sound directory gives."""
    return "" if result == whole else "not what the sound one gives"


# Types that are declared


def mistyped(value: Any, kind: Any) -> bool:
    """Return True unless the value has the declared type: no bool for a number, no number that is not finite."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()  # a task is of its family's class
        return not fields or any(mistyped(getattr(value, field.name), field.type) for field in fields)
    if origin is typing.Annotated:
        return mistyped(value, inner[0])
    if origin in (types.UnionType, typing.Union):
        return all(mistyped(value, one) for one in inner)
    if origin is typing.Literal:
        return value not in inner or isinstance(value, bool)
    if origin is tuple:
        return not isinstance(value, tuple) or any(mistyped(one, inner[0]) for one in value)
    if origin is dict:
        return not isinstance(value, dict) or any(mistyped(one, inner[1]) for one in value.values())
    if kind in (int, bool, str, type(None), None):
        return type(value) is not (type(None) if kind is None else kind)
    if kind is float:
        return type(value) not in (int, float) or not math.isfinite(value)
    return isinstance(kind, type) and not isinstance(value, kind if issubclass(kind, Path) else Path)


def wrong_config(config: Any) -> str:
    """Return what is wrong with a model's config: a type, or rotary frequencies that are no numbers."""
    if mistyped(config, type(config)):
        return f"a value of another type: {config}"
    for part in (config.decoder, config.encoder):
        numbers = [*inverse_frequencies(part.rope, part.head_dim)[0], inverse_frequencies(part.rope, part.head_dim)[1]]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            return f"frequencies are no numbers above 0: {part.rope}"
    return ""


def differing(written: Any, value: Any) -> bool:
    """Return True unless each number and text of the JSON stands in the value too, and nothing is taken for another."""
    if isinstance(written, dict):
        return not isinstance(value, dict) or any(k not in value or differing(v, value[k]) for k, v in written.items())
    if isinstance(written, list):
        return not isinstance(value, list | tuple) or list(map(repr, written)) != list(map(repr, value))
    return isinstance(written, bool) != isinstance(value, bool) or written != value
