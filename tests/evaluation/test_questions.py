"""Files of records: what is read is what stands there, and each fault is one line that says where and what to do."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.refusals import one_line

from cepe_jax.evaluation.tasks.questions import Demonstration, Question, lines, parsed

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


def read(path: Path) -> Iterator[Question]:
    return parsed(path, lines(path))


def written(path: Path, *lines) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_read(tmp_path, name):
    shown = Demonstration("Q", "A", ("c",)), Demonstration("R", "B")
    full = Question("7", "Who?", ("B",), ("A", "B"), ("one", "two"), (2.0, 0.5), shown)
    assert list(read(written(tmp_path / name, FULL, " ", LEAST))) == [full, Question("3", "", ("x",))]


FAULTS = [
    ({"question": "Q"}, "answers is missing: .*list"),
    ({"answers": ["A"]}, "question is missing: .*text"),
    (FULL | {"answers": []}, r"answers is \[\]: .*list"),
    (FULL | {"answers": "A"}, 'answers is "A": .*list'),
    (FULL | {"answers": [""]}, "answers is .*empty"),
    (FULL | {"answers": ["C"]}, 'answers has "C", .*choices'),
    (FULL | {"choices": ["B", "B"]}, "choices are .*different"),
    (FULL | {"question": 3}, "question is 3: .*text"),
    (FULL | {"id": True}, "id is true: .*text"),
    (FULL | {"scores": [1]}, "scores has 1 .* 2 contexts"),
    (FULL | {"scores": [1, "2"]}, "scores is .*numbers"),
    (FULL | {"scores": [1, float("nan")]}, "scores is .*numbers"),
    (FULL | {"context": []}, "unknown field context: .*id, question"),
    (FULL | {"contexts": [["a"]]}, "contexts is .*list"),
    (FULL | {"demonstrations": {}}, "demonstrations is {}: .*list"),
    (FULL | {"demonstrations": ["a"]}, r'demonstrations\[0\] is "a": .*question, answer'),
    (FULL | {"demonstrations": [{"question": "Q"}]}, r"demonstrations\[0\].answer is missing"),
    (FULL | {"demonstrations": [{"question": "Q", "answer": " "}]}, r"demonstrations\[0\].answer is .*not empty"),
    (
        FULL | {"demonstrations": [{"question": "Q", "answers": []}]},
        r"unknown field demonstrations\[0\].answers|answer is",
    ),
    ([1], r"it is \[1\]: .*question, answers"),
    ("{", "not JSON"),
    (FULL | {"contexts": ["x" * 999, 1]}, r'contexts is \["x{50,58}\.\.\.: give'),
    (LEAST | {"id": "1"}, "id 1 .*line 1 "),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_faults(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", LEAST, line)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{message}") as raised:
        list(read(path))
    one_line(raised)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl: .*no records"):
        list(read(written(tmp_path / "a.jsonl", " ")))
    with pytest.raises(ValueError, match=r"a.csv: .* .jsonl or .jsonl.gz"):
        list(read(written(tmp_path / "a.csv", LEAST)))
    path = written(tmp_path / "a.jsonl.gz", *[LEAST] * 50)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.jsonl.gz: damaged"):
        list(read(path))
    (tmp_path / "b.jsonl").write_bytes(json.dumps(LEAST).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="b.jsonl:2: not UTF-8 at byte 14"):
        list(read(tmp_path / "b.jsonl"))
