"""The help of settings, of a small class by value, and of every command that there is."""

import dataclasses
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from etils import epath
from support.scripts import FOLDER, SCRIPTS, SETTINGS

from cepe_jax.commands import command_in, help_of
from cepe_jax.help import comments, settings_help
from cepe_jax.settings import group_class_of, parse


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5  # share of all
    steps: int = 3  # steps of one


@dataclass(frozen=True)
class Parent:
    out: epath.Path  # gets all
    kind: Literal["", "one", "two"] = ""  # "": none; # is no comment's end
    sizes: tuple[int, ...] = (1, 2)  # sizes of all


@dataclass(frozen=True, kw_only=True)
class Child(Parent):
    out: Path = Path("out")  # gets some
    sizes: tuple[int, ...] = ()
    note: str | None = None  # a note; None: no note
    force: bool = False  # do it
    either: Literal["a"] | Literal["b"] = "a"  # a or b
    words: tuple[Literal["x", "y"], ...] = ("x",)  # of these
    mix: dict[str, float] = field(
        default_factory=dict  # weight of each
    )
    inner: Inner = Inner(steps=9)  # the inner one
    other: Inner | None = None  # the other one
    runs: dict[str, Inner] = field(default_factory=dict)  # runs by name


def test_comments_stand_beside_the_field_or_the_parents():
    assert comments(Child) == {
        "out": "gets some",
        "kind": '"": none; # is no comment\'s end',
        "sizes": "sizes of all",
        "note": "a note; None: no note",
        "force": "do it",
        "either": "a or b",
        "words": "of these",
        "mix": "weight of each",
        "inner": "the inner one",
        "other": "the other one",
        "runs": "runs by name",
    }


def test_each_setting_has_its_comment_type_and_default():
    """A class' own settings come first; a group has the defaults that its field gives it."""
    assert re.sub(" +", " ", settings_help(Child, 100)).splitlines()[2:] == [
        " --out gets some [path; default out]",
        " --sizes sizes of all [list of whole numbers; default []]",
        " --note a note; None: no note [text; default None]",
        " --force do it [true or false; default false]",
        " --either a or b [a | b; default a]",
        " --words of these [list of x | y; default [x]]",
        " --mix weight of each [{name: number}; default {}]",
        ' --kind "": none; # is no comment\'s end ["" | one | two; default ""]',
        "",
        "inner: the inner one",
        " --inner.rate share of all [number; default 0.5]",
        " --inner.steps steps of one [whole number; default 9]",
        "",
        "other: the other one (None unless a setting of it is given)",
        " --other.rate share of all [number; default 0.5]",
        " --other.steps steps of one [whole number; default 3]",
        "",
        "runs: runs by name",
        " --runs.NAME.rate share of all [number; default 0.5]",
        " --runs.NAME.steps steps of one [whole number; default 3]",
    ]
    assert re.search(r"--out .*\[path or gs://\.\.\.; required\]", settings_help(Parent, 100))


def leaves(config_class: type, prefix: str = "--") -> list[str]:
    """The settings as the command line names them, NAME for names that the user gives."""
    names = []
    for each in dataclasses.fields(config_class):
        group = group_class_of(each.type)
        by_name = ".NAME" * (group is not None and str(each.type).startswith("dict"))
        name = f"{prefix}{each.name}{by_name}"
        names += leaves(group, f"{name}.") if group else [name]
    return names


@pytest.mark.parametrize("width", [30, 80, 300])
@pytest.mark.parametrize("command", SETTINGS, ids=" ".join)
def test_help_shows_every_setting_once(command, width):
    page = settings_help(SETTINGS[command], width)
    names = re.findall(r"^  (--\S+)", page, re.MULTILINE)
    assert sorted(names) == sorted(["--config", *leaves(SETTINGS[command])])
    lines = [line for line in page.splitlines() if " " in line.strip()]  # a longer word is not cut
    assert max(map(len, lines)) <= min(width, 120)


def classes(config_class: type) -> set[type]:
    groups = filter(None, (group_class_of(each.type) for each in dataclasses.fields(config_class)))
    return {config_class}.union(*map(classes, groups))


ALL = sorted(set().union(*map(classes, SETTINGS.values())), key=lambda each: (each.__module__, each.__name__))


@pytest.mark.parametrize("config_class", ALL, ids=lambda each: each.__name__)
def test_every_setting_has_a_comment(config_class):
    assert {each.name for each in dataclasses.fields(config_class)} == {
        name for name, comment in comments(config_class).items() if len(comment) > 1
    }


@pytest.mark.parametrize("command", SETTINGS, ids=" ".join)
def test_help_has_a_sentence_and_two_examples(command):
    """The examples parse, each as the command that shows it. A default is shown by its name."""
    script, name = command
    commands = SCRIPTS[script].COMMANDS
    text, _, settings = help_of(SCRIPTS[script].__doc__, commands, name, 120).partition("\n\nsettings: ")
    assert "--config" in settings
    assert text.splitlines()[0].endswith(".")
    examples = re.findall(rf"python scripts/{script} (.*)", text.replace("\\\n", " "))
    assert len(examples) >= 2
    if name or len(commands) == 1:
        for example in examples:
            word, arguments = command_in(commands, shlex.split(example))
            assert commands[word][0] is SETTINGS[command]
            parse(SETTINGS[command], [*arguments])


def test_every_script_is_a_table_of_commands():
    assert all(hasattr(script, "COMMANDS") for script in SCRIPTS.values())
    assert len(SCRIPTS) == 9


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["teacher", "--help"]])
def test_help_of_the_data_commands_loads_no_jax(arguments):
    program = f"""
import runpy, sys
sys.argv = ["prepare_data.py", *{arguments}]
runpy.run_path({str(FOLDER / "prepare_data.py")!r}, run_name="__main__")
assert "cepe_jax.data.sampling" in sys.modules and "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--shard" in done.stdout
