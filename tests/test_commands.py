"""The commands of a script: which one an argument names, what is refused, and the help of each."""

import re
import sys
from dataclasses import dataclass

import pytest

from cepe_jax.commands import run_script

DOC = """Do two things.

first: Do the first thing.
    python scripts/script.py first --size=1

second: Do the second thing.
    python scripts/script.py second --steps=1
"""


@dataclass(frozen=True)
class First:
    size: int  # of the first thing


@dataclass(frozen=True)
class Second:
    steps: int = 3  # of the second thing


@pytest.fixture
def run(monkeypatch):
    """The commands that run_script calls for these arguments, each with its settings."""

    def run(*arguments: str, default: bool = False) -> list:
        called = []
        commands = {
            "first": (First, lambda settings: called.append(("first", settings))),
            "second": (Second, lambda settings: called.append(("second", settings))),
        }
        if default:
            commands[""] = commands["second"]
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        run_script(DOC, commands)
        assert sys.argv == ["script.py", *arguments]
        return called

    return run


def test_the_first_argument_names_the_command(run):
    assert run("second", "--steps=5") == [("second", Second(5))]
    assert run("first", "--size=2", default=True) == [("first", First(2))]
    assert run("--steps=5", default=True) == [("second", Second(5))]
    assert run(default=True) == [("second", Second(3))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["third"], "third: .*first, second"), ([], "no command: .*first, second"), (["first"], "--size: .*--help")],
)
def test_a_wrong_command_line_is_one_line(run, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 1
    assert re.fullmatch(f"script.py: {said}[^\n]*\n", capsys.readouterr().err)


def test_a_command_without_a_name_takes_no_word(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "first"])
    with pytest.raises(SystemExit):
        run_script("Do a thing.", {"": (Second, print)})
    assert re.match("script.py: first: .*--setting=value", capsys.readouterr().err)


def test_help_runs_nothing(run, capsys):
    """Wherever it stands."""
    assert run("--help") == run("second", "-h") == run("second", "--steps=1", "--help") == []
    assert run("--help", default=True) == []


def test_help_of_a_script_is_its_docstring(run, capsys):
    run("--help")
    shown = capsys.readouterr().out
    assert shown.startswith(DOC)
    assert "--steps  " not in shown
    run("--help", default=True)
    shown = capsys.readouterr().out
    assert shown.startswith(DOC)
    assert "--steps  " in shown


def test_help_of_a_command_is_its_own(run, capsys):
    run("first", "--help")
    shown = capsys.readouterr().out
    assert shown.startswith(DOC.split("\n\n")[1])
    assert "--size  " in shown
    assert "second" not in shown
