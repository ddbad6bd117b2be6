"""Questions of tasks and what is known beside them: one JSON object a line, in `.jsonl` or `.jsonl.gz` files."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from cepe_jax.data.sources import BYTE_ORDER_MARK, LONGEST, TOO_LONG, open_unpacked
from cepe_jax.parsing import parse_json, shortened, typed

SUFFIXES = ".jsonl", ".jsonl.gz"
NotEmpty = Annotated[str, Meta(pattern=r"\S")]


@dataclass(frozen=True)
class Demonstration:
    """A question with its answer, which a prompt shows before the question that it asks."""

    question: str
    answer: NotEmpty
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
    sources: tuple[str, ...] = ()  # of contexts that were retrieved, as NAME@FIRST TOKEN
    recall: float | None = None  # 1 if an answer stands in one of them, 0 if not; None: nothing was retrieved


@dataclass(frozen=True)
class Record:
    """The fields of a line; `id` and what has a default may be left out."""

    question: str
    answers: Annotated[tuple[NotEmpty, ...], Meta(min_length=1)]
    id: str | int | None = None
    choices: tuple[NotEmpty, ...] = ()
    contexts: tuple[str, ...] = ()  # the best first
    scores: tuple[float, ...] | None = None
    demonstrations: tuple[Demonstration, ...] = ()


FIELDS = f"the fields are {', '.join(Record.__dataclass_fields__)}"


def parse(fields: dict, where: str, number: int) -> Question:
    """Return the record of a line; without an `id` it is called by the line's number.

    ValueError names `where` the line stands, and the field at fault.
    """
    record = typed(fields, Record, where, FIELDS)
    strangers = [answer for answer in record.answers if record.choices and answer not in record.choices]
    if strangers:
        raise ValueError(
            f"{where}: answers has {shortened(strangers[0])}, which is not among choices: give some of them"
        )
    if len(set(record.choices)) < len(record.choices):
        raise ValueError(f"{where}: choices has a text twice: give different ones")
    if record.scores is not None and len(record.scores) != len(record.contexts):
        numbers = f"{len(record.scores)} numbers for {len(record.contexts)} contexts"
        raise ValueError(f"{where}: scores has {numbers}: give one for each")
    name = str(number if record.id is None else record.id)
    return Question(**(vars(record) | {"id": name}))


def lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (number, object) of each line that is not blank; ValueError for another line, or a file cut short."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: give a file called {' or '.join(SUFFIXES)}")
    number = 0
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
                if len(line) > LONGEST:
                    raise ValueError(f"{path}:{number}: {TOO_LONG}")
                if not line.isspace():
                    text = line.decode().removeprefix(BYTE_ORDER_MARK)
                    yield number, parse_json(text, f"{path}:{number}", mend="give an object a line")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short after line {number} ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line: write it as UTF-8") from None


def parsed(
    place: Path, numbered: Iterable[tuple[int, dict]], mapping: Callable[[dict], dict] = lambda line: line
) -> Iterator[Question]:
    """The records of the lines of `place`. `mapping` gives a line's fields where it has another layout.

    ValueError names place, line and field of the first fault: one missing, unknown or of another type, no answers,
    scores that are not one for each context, an `id` that another line has.
    """
    seen: dict[str, int] = {}
    for number, line in numbered:
        where = f"{place}:{number}"
        try:
            fields = mapping(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        record = parse(fields, where, number)
        if record.id in seen:
            name = shortened(record.id, quoted=False)
            raise ValueError(f"{where}: id {name} is that of line {seen[record.id]} too: give each its own")
        seen[record.id] = number
        yield record
    if not seen:
        raise ValueError(f"{place}: has no records: give one a line")
