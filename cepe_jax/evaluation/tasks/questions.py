"""Questions of tasks and what is known beside them: one JSON object a line, in `.jsonl` or `.jsonl.gz` files."""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cepe_jax.data.sources import BYTE_ORDER_MARK

SUFFIXES = ".jsonl", ".jsonl.gz"


@dataclass(frozen=True)
class Demonstration:
    """A question with its answer, which a prompt shows before the question that it asks."""

    question: str
    answer: str
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One question. Where there are choices, `answers` are the right ones among them."""

    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()  # the best first
    scores: tuple[float, ...] | None = None  # of the contexts, the higher the better
    demonstrations: tuple[Demonstration, ...] = ()
    depths: tuple[float, ...] = ()  # where the needles of a synthetic text stand, 0 its beginning, 1 its end


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_full_texts(value) -> bool:
    return _is_texts(value) and bool(value) and all(text.strip() for text in value)


# Of each field: whether a value will do, and what will.
FIELDS: dict[str, tuple[Callable, str]] = {
    "id": (lambda value: _is_text(value) or (isinstance(value, int) and not isinstance(value, bool)), "a text"),
    "question": (_is_text, "a text"),
    "answers": (_is_full_texts, "a list of one text or more, none of them empty"),
    "choices": (_is_full_texts, "a list of texts, none of them empty"),
    "contexts": (_is_texts, "a list of texts, the best first"),
    "scores": (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"),
    "demonstrations": (lambda value: isinstance(value, list), "a list of objects"),
}
DEMONSTRATION_FIELDS = {
    "question": FIELDS["question"],
    "answer": (lambda value: _is_text(value) and bool(value.strip()), "a text that is not empty"),
    "contexts": FIELDS["contexts"],
}


def _check(item, fields: dict[str, tuple[Callable, str]], required: tuple[str, ...], inside: str = "") -> None:
    """ValueError unless `item` is an object with the required fields, these fields alone, and of their types."""
    if not isinstance(item, dict):
        raise ValueError(f"{inside or 'it'} is {_shown(item)}: give an object with {', '.join(required)}")
    place = f"{inside}." if inside else ""
    for name in required:
        if name not in item:
            raise ValueError(f"{place}{name} is missing: give {fields[name][1]}")
    for name, value in item.items():
        if name not in fields:
            raise ValueError(f"unknown field {place}{name}: the fields are {', '.join(fields)}")
        fits, wanted = fields[name]
        if not fits(value):
            raise ValueError(f"{place}{name} is {_shown(value)}: give {wanted}")


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def parse(fields: dict, number: int) -> Question:
    """The record of a line; without an `id` it is called by the line's number. ValueError names the field at fault."""
    _check(fields, FIELDS, ("question", "answers"))
    texts = {name: tuple(fields.get(name, ())) for name in ("answers", "choices", "contexts")}
    strangers = [answer for answer in texts["answers"] if texts["choices"] and answer not in texts["choices"]]
    if strangers:
        raise ValueError(f"answers has {_shown(strangers[0])}, which is not among choices: give the right ones of them")
    if len(set(texts["choices"])) < len(texts["choices"]):
        raise ValueError(f"choices are {_shown(fields['choices'])}: give different ones")
    scores = tuple(map(float, fields["scores"])) if "scores" in fields else None
    if scores is not None and len(scores) != len(texts["contexts"]):
        raise ValueError(f"scores has {len(scores)} numbers for {len(texts['contexts'])} contexts: give one for each")
    demonstrations = []
    for place, item in enumerate(fields.get("demonstrations", ())):
        _check(item, DEMONSTRATION_FIELDS, ("question", "answer"), f"demonstrations[{place}]")
        contexts = tuple(item.get("contexts", ()))
        demonstrations.append(Demonstration(item["question"], item["answer"], contexts))
    name = str(fields.get("id", number))
    return Question(name, fields["question"], scores=scores, demonstrations=tuple(demonstrations), **texts)


def lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(number, what it says) of each line that is not blank; ValueError for what is no JSON, or a file cut short."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: give a file called {' or '.join(SUFFIXES)}")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, json.loads(line.decode().removeprefix(BYTE_ORDER_MARK))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short after line {number} ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line: write it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not JSON ({error}): give an object a line") from None


def parsed(
    place: Path, numbered: Iterable[tuple[int, dict]], mapping: Callable[[dict], dict] = lambda line: line
) -> Iterator[Question]:
    """The records of the lines of `place`. `mapping` gives a line's fields where it has another layout.

    ValueError names place, line and field of the first fault: one missing, unknown or of another type, no answers,
    scores that are not one for each context, an `id` that another line has.
    """
    seen: dict[str, int] = {}
    for number, line in numbered:
        try:
            record = parse(mapping(line), number)
            if record.id in seen:
                raise ValueError(f"id {record.id} is that of line {seen[record.id]} too: give each its own")
        except ValueError as error:
            raise ValueError(f"{place}:{number}: {error}") from None
        seen[record.id] = number
        yield record
    if not seen:
        raise ValueError(f"{place}: has no records: give one a line")
