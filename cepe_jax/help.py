"""The text of `--help`: every setting of a dataclass, with the comment beside its field."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from cepe_jax.settings import group_class_of, is_by_name, is_required

WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    epath.Path: "path or gs://...",
}
WIDEST = 120  # characters of a line
GLUE = "\N{NO-BREAK SPACE}"  # where no line ends


def comments(config_class: type) -> dict[str, str]:
    """Return the comment beside each field of a dataclass, a parent's if the class has none of its own.

    A class that has the fields of others without being their child names these in `FIELDS_OF`.
    """
    names, beside = {field.name for field in dataclasses.fields(config_class)}, {}
    owners = config_class, *getattr(config_class, "FIELDS_OF", ())
    bases = (base for owner in reversed(owners) for base in reversed(owner.__mro__))
    for base in filter(dataclasses.is_dataclass, bases):
        source = textwrap.dedent(inspect.getsource(base))
        fields = {
            line: node.target.id
            for node in ast.parse(source).body[0].body
            if isinstance(node, ast.AnnAssign) and node.target.id in names
            for line in range(node.lineno, node.end_lineno + 1)
        }
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.start[0] in fields:
                beside[fields[token.start[0]]] = token.string.lstrip("# ")
    return beside


def type_words(kind) -> str:
    """Return the type of a setting in words, the choices for a Literal."""
    arguments = typing.get_args(kind)
    match typing.get_origin(kind):
        case typing.Annotated:
            return type_words(arguments[0])
        case typing.Literal:
            return " | ".join(value_words(choice) for choice in arguments)
        case types.UnionType | typing.Union:
            return " | ".join(type_words(each) for each in arguments if each is not type(None))
        case origin if origin is tuple:
            return f"list of {type_words(arguments[0])}{'s' * (arguments[0] in WORDS)}"
        case origin if origin is dict:
            return f"{{{'name' if arguments[0] is str else type_words(arguments[0])}: {type_words(arguments[1])}}}"
    return WORDS[kind]


def value_words(value) -> str:
    """Return a value as the command line takes it."""
    match value:
        case bool():
            return str(value).lower()
        case "":
            return '""'
        case tuple():
            return f"[{', '.join(map(value_words, value))}]"
    return str(value)


def sections(config_class: type, defaults=None, prefix: str = "", title: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (title, {setting: (comment, [type; default])}) of the class and then of each group in it.

    A class' own settings come before those of its parents. `defaults` is an instance of the class, if there is one.
    """
    own = inspect.get_annotations(config_class)
    fields = sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own)
    beside, settings, groups = comments(config_class), {}, []
    for field in fields:
        name, comment = f"{prefix}{field.name}", beside.get(field.name, "")
        required = is_required(field) and defaults is None
        factory = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = factory if defaults is None else getattr(defaults, field.name)
        if group := group_class_of(field.type):
            by_name = is_by_name(field.type)
            optional = " (None unless a setting of it is given)" if default is None else ""
            inner = None if required or by_name else default
            place = f"{name}.NAME." if by_name else f"{name}."
            groups.append((group, inner, place, f"{name}: {comment}{optional}"))
            continue
        standard = "required" if required else f"default {value_words(default)}"
        settings[name] = comment, f"[{type_words(field.type)}; {standard}]"
    if settings:
        yield title, settings
    for group in groups:
        yield from sections(*group)


def settings_help(config_class: type, width: int) -> str:
    """Return a line or more for each setting, by group, in lines of `width`."""
    first = "settings: --name=value or --name value, with hyphens or underscores"
    file = {"config": ("a YAML file of these settings; the command line wins", "[path]")}
    pages = []
    for title, settings in sections(config_class, title=first):
        settings = file | settings if title is first else settings
        column = max(map(len, settings)) + 6
        apart = column > width // 2  # names in lines of their own
        column = 6 if apart else column
        lines = [wrap(title, width)]
        for name, (comment, kind) in settings.items():
            if len(kind) <= min(width, WIDEST) - column:
                kind = kind.replace(" ", GLUE)
            name, text = f"  --{name}", wrap(f"{comment} {kind}", width, " " * column)
            lines += [name, text] if apart else [name.ljust(column) + text[column:]]
        pages.append("\n".join(lines))
    return "\n\n".join(pages)


def wrap(text: str, width: int, indent: str = "") -> str:
    """Return the text in lines of `width`. No word is cut, so that names and paths can be copied."""
    lines = textwrap.fill(
        text,
        min(width, WIDEST),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace(GLUE, " ")
