"""What all scripts share: configuration from a file and the command line, and errors of one line."""

import dataclasses
import difflib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import draccus
import yaml
from etils import epath

from cepe_jax.directories import in_one_line, is_remote
from cepe_jax.progress import show_notices

Config = TypeVar("Config")
# A setting of this type may be in a bucket. pathlib's would make gs:/ of gs://.
draccus.decode.register(epath.Path, lambda text, _: epath.Path(text) if is_remote(text) else Path(text))

# What a script ends with, after sysexits.h; scripts/launch_tpu.sh goes by it.
REFUSED = 1  # one line says what is wrong: the same command would be refused again
FAULT = 70  # a bug, or the fault of a device, a disk or a bucket: the same command may succeed
STOPPED = 75  # a run that was asked to stop before its end, and is saved: the same command goes on
# How the messages of JAX's runtime begin, also where they come as a ValueError.
RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key is an error; PyYAML takes the last one silently."""

    def construct_mapping(self, node, deep=False):
        lines: dict = {}
        for key_node, _ in node.value:
            merges = key_node.tag == "tag:yaml.org,2002:merge"  # <<, another mapping's settings under these
            key = key_node.value if merges else self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"line {line}: {key!r} is no name of a setting")
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
    """`values` as a configuration; ValueError names a setting of the wrong type, or an unknown one and the nearest."""
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
    """ValueError where `values` are not of this class; draccus takes text for a list of letters, and names little."""
    for name, value in values.items():
        setting = f"{group}{name}"
        if name not in config_class.__dataclass_fields__:
            near = difflib.get_close_matches(name, _field_names(root), 1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else f" in {config_class.__name__}"
            raise ValueError(f"unknown setting {setting}{hint}")
        kind = config_class.__dataclass_fields__[name].type
        if value is None and type(None) not in typing.get_args(kind):
            raise ValueError(f"{setting} has no value: give one, or leave it out")
        # Of a group that may be left out, and of groups that the user names, the group.
        group_class = _group_class(kind)
        if group_class is not None and value is not None:
            groups = {setting: value}
            if _by_name(kind) and isinstance(value, dict):
                groups = {f"{setting}.{key}": one for key, one in value.items()}
            for name, one in groups.items():
                if not isinstance(one, dict):
                    raise ValueError(f"{name} is {one!r}: it is a group of settings, give them by name")
                _check(group_class, one, root, f"{name}.")
        elif typing.get_origin(kind) is tuple and not _is_list(value):
            raise ValueError(f"{setting} is {value!r}: give a list, [a, b]")
        elif typing.get_origin(kind) is dict and not isinstance(value, dict):
            raise ValueError(f"{setting} is {value!r}: give names and their values, {{a: 1}}")
        elif _is_text(kind):
            if not isinstance(value, str | None):
                raise ValueError(f"{setting} is {value!r}: give text, in YAML in quotes")
            if kind is not epath.Path and is_remote(value):
                raise ValueError(f"{setting} is {value}: mount the bucket (gcsfuse) and give the directory it is at")
        else:
            try:
                _decode(kind, value)
            except ValueError as error:
                raise ValueError(f"{setting} is {value!r}: {error}") from None


def _kind(config_class, dotted: str):
    """The type of the setting; None where there is none."""
    for name in dotted.split("."):
        if _by_name(config_class):
            config_class = typing.get_args(config_class)[1]
            continue
        field = getattr(_group_class(config_class), "__dataclass_fields__", {}).get(name)
        config_class = field and field.type
    return config_class


def _group_class(kind):
    """The dataclass of a group of settings, or of what may be one; None for what is no group."""
    return next(filter(dataclasses.is_dataclass, (kind, *typing.get_args(kind))), None)


def _by_name(kind) -> bool:
    """Whether the user names what is in it."""
    return typing.get_origin(kind) is dict


def _with_underscores(config_class, dotted: str) -> str:
    """The name with underscores for hyphens, but where the user gave it: a dataset may have hyphens of its own."""
    names = []
    for name in dotted.split("."):
        names.append(name if _by_name(config_class) else name.replace("-", "_"))
        config_class = _kind(config_class, names[-1])
    return ".".join(names)


def _is_list(value) -> bool:
    """Whether it is a list of single values, as all lists among settings are."""
    return isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)


def _is_text(kind) -> bool:
    return kind in (str, str | None, Path, Path | None, epath.Path)


def _from_text(kind, name: str, text: str | None):
    """The value of a setting on the command line: text as it stands where the setting is text, else YAML.

    A name alone says true, of what is true or false.
    """
    if text is None:
        if kind not in (bool, None):  # what is no setting is named as such later
            raise ValueError(f"--{name}: write settings as --setting=value")
        return True
    if _is_text(kind):
        return text
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--{name}={text}: {error}") from None


def _values(config_class, arguments: list[tuple[str, str | None]]) -> list[tuple[str, object]]:
    """(setting, value) of each argument. A list comes as `[a, b]`, or item by item: each adds to what came before."""
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
    for field in getattr(config_class, "__dataclass_fields__", {}).values():
        names |= {field.name}.union(*map(_field_names, (field.type, *typing.get_args(field.type))))
    return names


def parse(config_class: type[Config], complete: Callable[[dict], dict] = lambda values: values) -> Config:
    """The configuration on the command line: `--config FILE`, then `--group.setting=value`, the last one winning.

    Names may have hyphens for underscores; `--setting` alone is true; a list may come item by item. `complete` may
    add to what was given.
    """
    values, overrides = {}, []
    for name, text in _arguments(config_class):
        if name == "config":
            values = read_yaml(Path(_from_text(Path, name, text)))
        else:
            overrides.append((name, text))
    for name, value in _values(config_class, overrides):
        _set(values, name, value)
    return decode(config_class, complete(values))


def take(config_class: type[Config]) -> Config:
    """The configuration whose settings are on the command line among another's; those are left there, for `parse`."""
    mine, left = [], []
    for name, text in _arguments(config_class):
        if name in config_class.__dataclass_fields__:
            mine.append((name, text))
        else:
            left.append(f"--{name}" if text is None else f"--{name}={text}")
    sys.argv[1:] = left
    return decode(config_class, dict(_values(config_class, mine)))


def _arguments(config_class) -> Iterator[tuple[str, str | None]]:
    """(setting, text) of each argument, None for a name alone; `--help` shows the class' settings and ends the program.

    What follows a name without `=` is its value, but for what is true or false: there another name may follow.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        draccus.parse(config_class, args=["--help"])
    while arguments:
        written, equals, text = arguments.pop(0).partition("=")
        if not written.startswith("--"):
            raise ValueError(f"{written}: write settings as --setting=value")
        name, spelled = written[2:], _with_underscores(config_class, written[2:])
        if _kind(config_class, spelled) is not None:
            name = spelled
        if equals:
            yield name, text
        elif not arguments or (_kind(config_class, name) in (bool, None) and arguments[0].startswith("--")):
            yield name, None
        else:
            yield name, arguments.pop(0)


def run(main: Callable[[], None]) -> None:
    """Runs `main`; bad input ends it with one line on stderr and exit status 1, a fault with status 70.

    Bad input is a ValueError or what the file system refuses; what else it says (a full disk) is told in one line too,
    and any other exception keeps its traceback.
    """
    show_notices()
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {in_one_line(error)}", file=sys.stderr)
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: interrupted")
    except Exception as error:
        traceback.print_exc()
        sys.exit(status_of(error))


def status_of(error: BaseException) -> int:
    """What a process that `error` ends has as its exit status."""
    refusals = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    refused = isinstance(error, ValueError) and not RUNTIME.match(str(error))
    return REFUSED if refused or isinstance(error, (*refusals, KeyboardInterrupt)) else FAULT


def run_command(commands: dict[str, tuple], default: str = "") -> None:
    """Runs the command that the first argument names, with the configurations that the others give it.

    `commands` has for each its configuration and its function; where the function takes a second configuration, whose
    settings stand among the first one's, that too and what completes it. Errors are as in `run`.
    """

    def main() -> None:
        named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
        word = sys.argv.pop(1) if named else default
        if not named and {"-h", "--help"} & set(sys.argv):
            print(f"commands: {', '.join(commands)}; --help after one of them shows its settings\n")
            if not default:
                return
        if word not in commands:
            raise ValueError(f"{word or 'no command'}: give one of {', '.join(commands)}")
        config_class, function, *second = commands[word]
        function(*([take(config_class), parse(*second)] if second else [parse(config_class)]))

    run(main)
