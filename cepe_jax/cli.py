"""What all scripts share: configuration from a file and the command line, and errors of one line."""

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import draccus
import yaml

Config = TypeVar("Config")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key is an error; PyYAML takes the last one silently."""

    def construct_mapping(self, node, deep=False):
        lines: dict = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise ValueError(f"line {line}: {key} is given twice, first on line {lines[key]}")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; {} for an empty one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path}: is {type(values).__name__}, not a mapping of settings")
    return values or {}


def _set(values: dict, dotted: str, value) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{dotted}: {group} is one value, not a group of settings")
    values[last] = value


def decode(config_class: type[Config], values: dict) -> Config:
    """`values` as a configuration; ValueError names an unknown key and the nearest known one."""
    try:
        return draccus.decode(config_class, values)
    except Exception as error:  # draccus wraps what a dataclass raises in its own kinds
        while isinstance(error.__cause__, Exception):
            error = error.__cause__
        message = str(error)
        if found := re.search(r"The fields? (.*) (?:is|are) not valid for (\w+)", message):
            unknown = found[1].split(",")[0].strip("` ")
            near = difflib.get_close_matches(unknown, _field_names(config_class), 1, cutoff=0.5)
            message = f"unknown setting {unknown}" + (f": did you mean {near[0]}?" if near else f" in {found[2]}")
        raise ValueError(message) from None


def _field_names(config_class) -> set[str]:
    names = set()
    for field in getattr(config_class, "__dataclass_fields__", {}).values():
        names |= {field.name} | _field_names(field.type)
    return names


def parse(config_class: type[Config]) -> Config:
    """The configuration on the command line: `--config FILE`, then `--group.setting=value`, the last one winning."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        return draccus.parse(config_class, args=["--help"])
    values, overrides = {}, []
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not name.startswith("--") or not (equals or arguments):
            raise ValueError(f"{name}: write settings as --setting=value")
        value = value if equals else arguments.pop(0)
        if name == "--config":
            values = read_yaml(Path(value))
        else:
            overrides.append((name[2:], value))
    for name, value in overrides:
        _set(values, name, yaml.safe_load(value))
    return decode(config_class, values)


def run(main: Callable[[], None]) -> None:
    """Runs `main`; bad input ends it with one line on stderr and exit status 1.

    Bad input is a ValueError or what the file system refuses; any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
