"""Files of records: what is read is what stands there, and each fault is one line that says where and what to do."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cepe_jax.evaluation.records import Demonstration, Record, lines, parsed

FULL = {
    "id": 7,
    "question": "Who?",
    "answers": ["B"],
    "choices": ["A", "B"],
    "contexts": ["one", "two"],
    "scores": [2, 0.5],
    "demonstrations": [{"question": "Q", "answer": "A", "contexts": ["c"]}, {"question": "R", "answer": "B"}],
}
LEAST = {"question": "", "answers": ["x"]}


def read(path: Path) -> Iterator[Record]:
    return parsed(path, lines(path))


def written(path: Path, *lines) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_read(tmp_path, name):
    shown = Demonstration("Q", "A", ("c",)), Demonstration("R", "B")
    full = Record("7", "Who?", ("B",), ("A", "B"), ("one", "two"), (2.0, 0.5), shown)
    assert list(read(written(tmp_path / name, FULL, " ", LEAST))) == [full, Record("3", "", ("x",))]


FAULTS = [
    ({"question": "Q"}, "answers is missing: give a list of one text or more"),
    ({"answers": ["A"]}, "question is missing: give a text"),
    (FULL | {"answers": []}, r"answers is \[\]: give a list of one text or more"),
    (FULL | {"answers": "A"}, 'answers is "A": give a list'),
    (FULL | {"answers": [""]}, "answers is .*none of them empty"),
    (FULL | {"answers": ["C"]}, 'answers has "C", which is not among choices'),
    (FULL | {"choices": ["B", "B"]}, "choices are .*give different ones"),
    (FULL | {"question": 3}, "question is 3: give a text"),
    (FULL | {"id": True}, "id is true: give a text"),
    (FULL | {"scores": [1]}, "scores has 1 numbers for 2 contexts: give one for each"),
    (FULL | {"scores": [1, "2"]}, "scores is .*: give a list of numbers"),
    (FULL | {"scores": [1, float("nan")]}, "scores is .*: give a list of numbers"),
    (FULL | {"context": []}, "unknown field context: the fields are id, question"),
    (FULL | {"contexts": [["a"]]}, "contexts is .*: give a list of texts, the best first"),
    (FULL | {"demonstrations": {}}, "demonstrations is {}: give a list of objects"),
    (FULL | {"demonstrations": ["a"]}, r'demonstrations\[0\] is "a": give an object with question, answer'),
    (FULL | {"demonstrations": [{"question": "Q"}]}, r"demonstrations\[0\].answer is missing"),
    (FULL | {"demonstrations": [{"question": "Q", "answer": " "}]}, r"demonstrations\[0\].answer is .*not empty"),
    (
        FULL | {"demonstrations": [{"question": "Q", "answers": []}]},
        r"unknown field demonstrations\[0\].answers|answer is",
    ),
    ([1], r"it is \[1\]: give an object with question, answers"),
    ("{", "not JSON"),
    (FULL | {"contexts": ["x" * 999, 1]}, r'contexts is \["x{50,58}\.\.\.: give'),
    (LEAST | {"id": "1"}, "id 1 is that of line 1 too"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_faults(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", LEAST, line)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{message}") as raised:
        list(read(path))
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl: has no records"):
        list(read(written(tmp_path / "a.jsonl", " ")))
    with pytest.raises(ValueError, match=r"a.csv: give a file called .jsonl or .jsonl.gz"):
        list(read(written(tmp_path / "a.csv", LEAST)))
    path = written(tmp_path / "a.jsonl.gz", *[LEAST] * 50)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.jsonl.gz: damaged or cut short"):
        list(read(path))
    (tmp_path / "b.jsonl").write_bytes(json.dumps(LEAST).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="b.jsonl:2: not UTF-8 at byte 14"):
        list(read(tmp_path / "b.jsonl"))
