"""JSON of somebody else's: what is not of the declared type is refused by file, field and value."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from cepe_jax.parsing import parse_json, read_json, shortened


@dataclass(frozen=True)
class Inner:
    theta: float = 1.0
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"theta is {self.theta}: give a number above 0")


@dataclass(frozen=True)
class Outer:
    size: Annotated[int, Meta(ge=1)]
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def test_a_whole_file(tmp_path):
    (tmp_path / "a.json").write_text('{"size": 3, "inner": {"theta": 2}, "names": ["x"]}')
    assert read_json(tmp_path / "a.json", Outer) == Outer(3, Inner(2.0), ("x",))
    assert read_json(tmp_path / "a.json")["inner"] == {"theta": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"x\.json is not JSON .*line 1 column 2"),
        ("[1]", r"x\.json: holds a list of 1: expected object"),
        ("3", r"x\.json: holds 3: expected object"),
        ('{"size": 1, "size": 2}', "'size' stands twice"),
        ('{"size": NaN}', "NaN is no number"),
        ('{"size": 1, "inner": {"theta": -Infinity}}', "-Infinity is no number"),
        ('{"size": 1, "inner": {"theta": 1e999}}', "1e999 is no number"),
        ('{"size": 1%s}' % ("0" * 5000), r"10{49}\.\.\. \(5,001 characters\) is no number"),
        ('{"size": 9223372036854775808}', r"size is 9\.2\d+e\+18: expected int"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "missing required field size"),
        ('{"size": true}', "size is True: expected int, got bool"),
        ('{"size": "3"}', "size is '3': expected int"),
        ('{"size": 0}', "size is 0: expected int >= 1"),
        ('{"size": 1, "inner": 5}', "inner is 5: expected object"),
        ('{"size": 1, "inner": {"theta": {}}}', "inner.theta is an object of 0: expected float"),
        ('{"size": 1, "inner": {"kind": "c"}}', "inner.kind is 'c'"),
        ('{"size": 1, "inner": {"theta": 0}}', "inner is an object of 1: theta is 0.0: give a number above 0"),
        ('{"size": 1, "names": ["x", 3]}', r"names\[1\] is 3: expected str"),
        ('{"size": 1, "names": "x"}', "names is 'x': expected array"),
        ('{"size": 1, "inner": {"thetta": 3}}', "unknown key inner.thetta"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_json(text, "x.json", Outer, "fetch it again")
    assert str(refused.value).startswith("x.json")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"size": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json .*UTF-8 at byte 10"):
        read_json(tmp_path / "a.json")


def test_long_values_are_shortened():
    assert shortened("x" * 1000) == f"'{'x' * 49}... (1,002 characters)"
    assert shortened(list(range(10**6))) == "a list of 1000000"


def test_half_a_character():
    with pytest.raises(ValueError, match=r"x\.json is not JSON .*surrogates"):
        parse_json(r'{"names": ["\ud83d"]}', "x.json")
    assert parse_json(r'{"names": ["\ud83d\ude00"]}', "x.json")["names"] == ["😀"]
