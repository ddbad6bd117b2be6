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
    ({"question": "Q"}, "missing required field answers"),
    ({"answers": ["A"]}, "missing required field question"),
    (FULL | {"answers": []}, "answers is a list of 0"),
    (FULL | {"answers": "A"}, "answers is 'A'"),
    (FULL | {"answers": [""]}, r"answers\[0\] is ''"),
    (FULL | {"answers": ["C"]}, "answers has 'C', .*choices"),
    (FULL | {"choices": ["B", "B"]}, "choices has .*twice"),
    (FULL | {"question": 3}, "question is 3"),
    (FULL | {"id": True}, "id is True"),
    (FULL | {"scores": [1]}, "scores has 1 .* 2 contexts"),
    (FULL | {"scores": [1, "2"]}, r"scores\[1\] is '2'"),
    (FULL | {"scores": [1, float("nan")]}, "NaN is no number"),
    (json.dumps(LEAST).replace("}", ', "scores": [1%s]}' % ("0" * 400)), "1000.* is no number"),
    (FULL | {"context": []}, "unknown key context"),
    (FULL | {"contexts": [["a"]]}, r"contexts\[0\] is a list of 1"),
    (FULL | {"demonstrations": {}}, "demonstrations is an object of 0"),
    (FULL | {"demonstrations": ["a"]}, r"demonstrations\[0\] is 'a'"),
    (FULL | {"demonstrations": [{"question": "Q"}]}, r"demonstrations\[0\] .*missing required field answer"),
    (FULL | {"demonstrations": [{"question": "Q", "answer": " "}]}, r"demonstrations\[0\].answer is ' '"),
    (FULL | {"demonstrations": [{"question": "Q", "answer": []}]}, r"demonstrations\[0\].answer is a list of 0"),
    ([1], "a list of 1"),
    ("{", "not JSON"),
    ('{"question": "", "question": "", "answers": ["x"]}', "'question' stands twice"),
    ("[" * 100_000, "nested"),
    (FULL | {"contexts": ["x" * 999, 1]}, r"contexts\[1\] is 1"),
    (FULL | {"question": ["x" * 999]}, "question is a list of 1"),
    (LEAST | {"id": "1"}, "id 1 .*line 1 "),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_faults(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", LEAST, line)
    with pytest.raises(ValueError, match=f"a.jsonl:2:? .*{message}") as raised:
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
