"""Settings: a frozen dataclass from a YAML file and the command line."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import draccus
import msgspec
import yaml
from etils import epath

from cepe_jax.directories import is_remote, place
from cepe_jax.parsing import in_words, number, shortened

Config = TypeVar("Config")
# A setting of this type may be in a bucket. pathlib's would make gs:/ of gs://.
draccus.decode.register(epath.Path, lambda text, _: place(text))
INT, FLOAT, MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "merge"))


class _Settings(yaml.SafeLoader):
    """YAML in which a setting is written once, where it stands, and a number as a number.

    PyYAML takes the last of repeated keys silently, reads 010 as 8 and 1:30 as 90, and expands aliases without a bound.
    """

    yaml_implicit_resolvers = {  # of the first character: what a word is; numbers are added below
        first: [(tag, words) for tag, words in resolvers if tag not in (INT, FLOAT, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            name = shortened(event.anchor, quoted=False)
            raise ValueError(f"line {event.start_mark.line + 1}: *{name} is an alias: write out what it stands for")
        return super().compose_node(parent, index)

    def construct_number(self, node) -> float | int:
        return number(self.construct_scalar(node).replace("_", ""))

    def construct_mapping(self, node, deep=False):
        lines: dict = {}
        for key_node, _ in node.value:
            key = _as_name(self.construct_object(key_node, deep=True))
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"line {line}: {_shown(key)} is no name of a setting")
            if key in lines:
                name = shortened(key, quoted=False)
                raise ValueError(f"line {line}: {name} is given twice, first on line {lines[key]}")
            lines[key] = line
        return {_as_name(key): value for key, value in super().construct_mapping(node, deep).items()}


def _as_name(key):
    """Return a whole number as text, as it may be the name of a value, and anything else as it is."""
    return str(key) if type(key) is int else key


_Settings.add_implicit_resolver(INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
FRACTION = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")
_Settings.add_implicit_resolver(FLOAT, FRACTION, list("-+.0123456789"))
_Settings.add_constructor(INT, _Settings.construct_number)
_Settings.add_constructor(FLOAT, _Settings.construct_number)


def _from_yaml(text: str, where: str):
    """Return the value of a text in YAML."""
    try:
        return yaml.load(text, _Settings)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for settings") from None
    except yaml.MarkedYAMLError as error:
        problem = shortened(error.problem, quoted=False)
        raise ValueError(f"{where}: line {error.problem_mark.line + 1}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    except (KeyError, AttributeError) as error:  # of PyYAML, for `!!bool x` and `!!timestamp x`
        raise ValueError(f"{where}: {error} does not fit its tag: leave the tag out") from None


def read_yaml(path: Path) -> dict:
    """Return the mapping in a YAML file, {} if the file is empty."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = _from_yaml(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: write it as UTF-8") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is {type(values).__name__}, not a mapping of settings")
    return values


def _set(values: dict, dotted: str, value) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{dotted}: {group} is one value, not a group of settings")
    values[last] = value


def decode(config_class: type[Config], values: dict) -> Config:
    """Return `values` as settings of this class.

    ValueError names a setting that has no value or one of the wrong type, or an unknown setting and the nearest name.
    """
    _check(config_class, values, config_class, "")
    return _decode(config_class, values)


def _decode(kind, value):
    try:
        return draccus.decode(kind, value)
    except Exception as error:  # draccus wraps what a dataclass raises in its own kinds
        while isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise ValueError(str(error)) from None


def _check(config_class, values: dict, root, group: str) -> None:
    """Raise ValueError if `values` do not fit the class. draccus takes text for a list of letters, and names little."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}  # without those of the class
    for name, value in values.items():
        setting = f"{group}{name}"
        if name not in kinds:
            near = difflib.get_close_matches(name, _field_names(root), 1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else f" in {config_class.__name__}"
            raise ValueError(f"unknown setting {shortened(setting, quoted=False)}{hint}")
        kind = kinds[name]
        if value is None and type(None) not in typing.get_args(kind):
            raise ValueError(f"{setting} has no value: give one, or leave it out")
        group_class = group_class_of(kind)
        if group_class is not None and value is not None:
            groups = {setting: value}
            if is_by_name(kind) and isinstance(value, dict):
                groups = {f"{setting}.{key}": one for key, one in value.items()}
            for name, one in groups.items():
                if not isinstance(one, dict):
                    raise ValueError(f"{name} is {_shown(one)}: it is a group of settings, give them by name")
                _check(group_class, one, root, f"{name}.")
        elif typing.get_origin(kind) is tuple and not _is_list(value):
            raise ValueError(f"{setting} is {_shown(value)}: give a list, [a, b]")
        elif typing.get_origin(kind) is dict:
            _check_mapping(setting, typing.get_args(kind), value)
        elif _is_text(kind):
            if not isinstance(value, str | None):
                raise ValueError(f"{setting} is {_shown(value)}: give text, in YAML in quotes")
            if value == "" and kind not in (str, str | None):
                raise ValueError(f"{setting} is empty: give a path")
            if value and not _can_be_passed(value):
                raise ValueError(f"{setting} is {_shown(value)}: no file name or text may hold one of its characters")
            if kind is not epath.Path and is_remote(value):
                raise ValueError(f"{setting} is {value}: mount the bucket (gcsfuse) and give the directory it is at")
        else:
            _check_single(setting, value, kind)
    if missing := [f"--{name}" for name in _missing(config_class, values, group)]:
        raise ValueError(f"{', '.join(missing)}: required, here or in the --config file; see --help")


def _check_single(setting: str, value, kind) -> None:
    """Raise ValueError unless the value is of this type. draccus takes true and "010" for numbers."""
    try:
        msgspec.convert(value, kind, strict=True, dec_hook=_path)
    except msgspec.ValidationError as error:
        literals = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is typing.Literal]
        choices = ", ".join(str(choice) for one in literals for choice in typing.get_args(one))
        mend = f"choose one of {choices}" if choices else in_words(str(error).partition(" - at ")[0])
        raise ValueError(f"{setting} is {_shown(value)}: {mend}") from None


def _path(kind: type, value):
    """Return a path in a list of them; msgspec knows no paths."""
    if not isinstance(value, str):
        raise ValueError("give text, in YAML in quotes")
    return kind(value)


def _shown(value) -> str:
    """Return the value in a message: a long one by its beginning."""
    return shortened(repr(value), quoted=False)


def _check_mapping(setting: str, kinds: tuple[type, type], value) -> None:
    """Raise ValueError unless `value` maps names, or whole numbers, to values that can be numbers if they should."""
    if not isinstance(value, dict):
        raise ValueError(f"{setting} is {_shown(value)}: give names and their values, {{a: 1}}")
    for key, one in value.items():
        name = f"{setting}.{shortened(key, quoted=False)}"
        if kinds[0] is int and not re.fullmatch("[0-9]{1,18}", key):
            raise ValueError(f"{name}: give a whole number in place of the name")
        if kinds[1] is float:
            try:
                float(one)
            except (TypeError, ValueError):
                raise ValueError(f"{name} is {_shown(one)}: give a number") from None


def _missing(config_class, values: dict, group: str) -> Iterator[str]:
    """Yield the settings without a default that `values` lack; groups in `values` are checked by themselves."""
    for field in dataclasses.fields(config_class):
        if field.name in values or not is_required(field):
            continue
        if dataclasses.is_dataclass(field.type):
            yield from _missing(field.type, {}, f"{group}{field.name}.")
        else:
            yield f"{group}{field.name}"


def is_required(field: dataclasses.Field) -> bool:
    """Return True if the field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def _kind(config_class, dotted: str):
    """Return the type of a setting, None if the class has no such setting."""
    for name in dotted.split("."):
        if is_by_name(config_class):
            config_class = typing.get_args(config_class)[1]
            continue
        field = getattr(group_class_of(config_class), "__dataclass_fields__", {}).get(name)
        config_class = field and field.type
    return config_class


def group_class_of(kind):
    """Return the dataclass in `Group`, `Group | None` and `dict[str, Group]`, None for a single setting."""
    return next(filter(dataclasses.is_dataclass, (kind, *typing.get_args(kind))), None)


def is_by_name(kind) -> bool:
    """Return True for a dict, whose keys are the user's."""
    return typing.get_origin(kind) is dict


def _with_underscores(config_class, dotted: str) -> str:
    """Return the name with underscores for hyphens, except in the user's own names, such as a dataset's."""
    names = []
    for name in dotted.split("."):
        names.append(name if is_by_name(config_class) else name.replace("-", "_"))
        config_class = _kind(config_class, names[-1])
    return ".".join(names)


def _is_list(value) -> bool:
    """Return True for a list of single values, as all lists among settings are."""
    return isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)


def _is_text(kind) -> bool:
    return kind in (str, str | None, Path, Path | None, epath.Path)


def _can_be_passed(text: str) -> bool:
    """Return False for text with a null character or half a surrogate pair, which no argument and no file name has."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _from_text(kind, name: str, text: str | None):
    """Return the value of an argument: text unchanged if the setting is text, else read as YAML; True for no text."""
    if text is None:
        if kind not in (bool, None):  # an unknown setting is named as such later
            raise ValueError(f"--{name}: write settings as --setting=value")
        return True
    if _is_text(kind):
        return text
    return _from_yaml(text, f"--{name}={shortened(text, quoted=False)}")


def _values(config_class, arguments: list[tuple[str, str | None]]) -> list[tuple[str, object]]:
    """Return (setting, value) of each argument. A list comes as `[a, b]` or item by item, which adds to it."""
    lists: dict[str, list] = {}
    values = []
    for name, text in arguments:
        kind = _kind(config_class, name)
        if typing.get_origin(kind) is tuple and text and not text.lstrip().startswith("["):
            value = [*lists.get(name, []), _from_text(typing.get_args(kind)[0], name, text)]
        else:
            value = _from_text(kind, name, text)
        if isinstance(value, list):
            lists[name] = value
        values.append((name, value))
    return values


def _field_names(config_class) -> set[str]:
    names = set()
    for field in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        names |= {field.name}.union(*map(_field_names, (field.type, *typing.get_args(field.type))))
    return names


def parse(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """Return the settings of `--config FILE` and `--group.setting=value`, the last one of a setting winning.

    Names may have hyphens for underscores. `--setting` alone is true. A list may come item by item. A class that has
    POSITIONALS, a tuple of its settings, takes their values without names in this order.
    """
    values, overrides = {}, []
    for name, text in _named(config_class, list(arguments)):
        if name == "config":
            values = read_yaml(Path(_from_text(Path, name, text)))
        else:
            overrides.append((name, text))
    for name, value in _values(config_class, overrides):
        _set(values, name, value)
    return decode(config_class, values)


def _named(config_class, arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (setting, text) of each argument, None for a name alone.

    The argument after a name without `=` is its value, except that true is left out before another name.
    """
    positionals = list(getattr(config_class, "POSITIONALS", ()))
    while arguments:
        written, equals, text = (word := arguments.pop(0)).partition("=")
        if not written.startswith("--"):
            if not positionals:
                raise ValueError(f"{written}: write settings as --setting=value")
            yield positionals.pop(0), word
            continue
        name, spelled = written[2:], _with_underscores(config_class, written[2:])
        if _kind(config_class, spelled) is not None:
            name = spelled
        if equals:
            yield name, text
        elif not arguments or (_kind(config_class, name) in (bool, None) and arguments[0].startswith("--")):
            yield name, None
        else:
            yield name, arguments.pop(0)
