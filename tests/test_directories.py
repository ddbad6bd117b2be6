"""Files that are whole or absent, and settings as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cepe_jax.directories import staged, write_json, write_text
from cepe_jax.identity import as_json, as_of, refuse_another_run


def test_a_file_is_whole_or_what_it_was(tmp_path):
    write_text(tmp_path / "page.md", "é\n")
    assert (tmp_path / "page.md").read_bytes() == "é\n".encode()

    def breaks_off():
        with staged(tmp_path / "page.md") as place:
            place.write_text("half of")
            raise KeyError

    with pytest.raises(KeyError):
        breaks_off()
    with pytest.raises(TypeError):
        write_json(tmp_path / "page.md", {"key": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert (tmp_path / "page.md").read_text("utf-8") == "é\n"


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    place: Path = Path("a/b")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 0.5


def test_settings_as_json():
    assert as_json(Outer()) == {"inner": {"sizes": [1, 2], "place": "a/b"}, "rate": 0.5}
    assert as_json([{"key": Inner()}]) == [{"key": {"sizes": [1, 2], "place": "a/b"}}]


def test_another_run_is_refused_by_its_first_setting():
    stored = as_json(Outer())
    with pytest.raises(ValueError, match=r"out: .*rate is 0\.5 there and 0\.25 here"):
        refuse_another_run(Path("out"), stored, as_json(Outer(rate=0.25)))
    newer = stored | {"inner": stored["inner"] | {"added": 3}, "added": 4}
    refuse_another_run(Path("out"), stored, as_of(stored, newer))
    with pytest.raises(ValueError, match="added is null there and 4 here"):
        refuse_another_run(Path("out"), stored, newer)
    assert json.loads(json.dumps(stored)) == stored
