"""The commands of a script: functions, each with the dataclass of its settings."""

import shutil
import sys
from collections.abc import Callable

from cepe_jax.exits import run
from cepe_jax.help import settings_help, wrap
from cepe_jax.settings import parse

Command = tuple[type, Callable]  # settings, and the function that gets them
HELP = {"-h", "--help"}


def run_script(doc: str, commands: dict[str, Command]) -> None:
    """Run the command that the first argument names, `""` if it names none, with the settings after it.

    `doc` is the script's docstring and its help: a paragraph for each named command, `name: ...`, with examples.
    """
    run(lambda: _call(doc, commands, sys.argv[1:]))


def _call(doc: str, commands: dict[str, Command], arguments: list[str]) -> None:
    """Run the command in `arguments`, or print its help."""
    name, rest = command_in(commands, arguments)
    if HELP & set(rest):
        print(help_of(doc, commands, name, shutil.get_terminal_size().columns))
    elif name not in commands:
        raise ValueError(f"no command: give one of {', '.join(commands)}; see --help")
    else:
        settings, function = commands[name]
        function(parse(settings, rest))


def command_in(commands: dict[str, Command], arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command's name and the arguments after it; ValueError for a name that is not in `commands`."""
    names = [name for name in commands if name]
    if not names or not arguments or arguments[0].startswith("-"):
        return "", arguments
    if arguments[0] not in names:
        raise ValueError(f"{arguments[0]}: no such command: give one of {', '.join(names)}")
    return arguments[0], arguments[1:]


def help_of(doc: str, commands: dict[str, Command], name: str, width: int) -> str:
    """Return the paragraph of a command, all of `doc` for `""`, and the command's settings."""
    text = doc.strip()
    if name:
        text = next(part for part in text.split("\n\n") if part.startswith(f"{name}: "))
    examples = " ", "python "  # which are not cut into lines
    lines = [line if line.startswith(examples) else wrap(line, width) for line in text.splitlines()]
    if not name and len(commands) > 1:
        lines += ["", "--help after a command lists its settings."]
    if name in commands:
        lines += ["", settings_help(commands[name][0], width)]
    return "\n".join(lines)
