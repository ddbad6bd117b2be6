"""Settings that are spoiled, on the command line and in YAML files, of the commands in the scripts' help."""

import dataclasses
import json
import math
import re
import shlex
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from support.scripts import FOLDER, SCRIPTS, SETTINGS

from cepe_jax.commands import command_in
from cepe_jax.settings import group_class_of, is_by_name, is_required, parse
from fuzz.kind import KINDS, Kind, mistyped
from fuzz.mutations import (
    TEXTS,
    Rng,
    change_bytes,
    pick,
)


def shown_arguments() -> list[tuple[str, str, list[str]]]:
    """Return script, command and arguments of each example in the scripts' help."""
    shown = []
    for script, module in SCRIPTS.items():
        for example in re.findall(rf"python scripts/{script} (.*)", module.__doc__.replace("\\\n", " ")):
            word, arguments = command_in(module.COMMANDS, shlex.split(example))
            words = [re.sub(r"^configs/", f"{FOLDER.parent}/configs/", argument) for argument in arguments]
            if all(argument.startswith("--") or argument.endswith(".yaml") for argument in words):
                shown.append((script, word, words))
    return shown


SHOWN = shown_arguments()


def settings_in(config_class: Any, group: str = "") -> list[tuple[str, Any]]:
    """Return name and type of every setting of a class, those of groups by their dotted names."""
    settings = []
    for field in config_class.__dataclass_fields__.values():
        inner = group_class_of(field.type)
        if inner is not None and is_by_name(field.type):
            settings += settings_in(inner, f"{group}{field.name}.a.")
        elif inner is not None:
            settings += settings_in(inner, f"{group}{field.name}.")
        else:
            settings.append((f"{group}{field.name}", field.type))
    return settings


def spoil_setting(place: Path, rng: Rng) -> list[str]:
    """Choose an example, one of its command's settings and a text for it, on the command line or in a file."""
    script, word, arguments = pick(rng, SHOWN)
    name, kind = pick(rng, settings_in(SETTINGS[script, word]))
    case = {"script": script, "word": word, "arguments": arguments, "name": name, "text": pick(rng, TEXTS)}
    (place / "case.json").write_text(json.dumps(case))
    last = name.split(".")[-1]
    return [name, f"{last} is", *(part for part in name.split(".") if len(part) > 1)]


def spoil_yaml(place: Path, rng: Rng) -> list[str]:
    """Write a setting into a file, or change bytes of a file that we show."""
    words = spoil_setting(place, rng)
    case = json.loads((place / "case.json").read_text())
    path = place / "settings.yaml"
    files = [argument for argument in case["arguments"] if argument.endswith(".yaml")]
    if files and rng.random() < 0.5:
        whole = Path(files[0]).read_bytes()
        path.write_bytes(change_bytes(whole, rng))
        both = whole.decode() + path.read_text(errors="replace")
        case, words = case | {"name": "", "text": ""}, re.findall(r"[\w-]{3,}", both)
        words += [f" {word}:" for word in re.findall(r"\b\w{1,2}\b", both)]
    else:
        groups = case["name"].split(".")
        lines = [f"{'  ' * depth}{group}:" for depth, group in enumerate(groups)]
        path.write_text("\n".join(lines) + f" {case['text']}\n", "utf-8", "surrogatepass")
        fields = dataclasses.fields(SETTINGS[case["script"], case["word"]])  # those of the example's file are gone
        words += [f"--{field.name}" for field in fields if is_required(field)]
    kept = [one for one in case["arguments"] if not one.endswith(".yaml") and setting_of(one) != case["name"]]
    case["arguments"] = [*(one for one in kept if one != "--config"), f"--config={path}"]
    (place / "case.json").write_text(json.dumps(case | {"yaml": True}))
    return words


def setting_of(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def parse_case(place: Path) -> Any:
    if not (place / "case.json").exists():
        return None
    case = json.loads((place / "case.json").read_text())
    more = [] if "yaml" in case else [f"--{case['name']}={case['text']}"]
    return parse(SETTINGS[case["script"], case["word"]], [*case["arguments"], *more])


NOTHING = object()


def meant(kind: Any, text: str, in_file: bool) -> Any:
    """Return the value that a person means by the text of a setting; NOTHING for a text that has no such meaning."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return meant(inner[0], text, in_file)
    if origin in (types.UnionType, typing.Union):
        if text in ("", "~", "null") and (in_file or str not in inner and Path not in inner):
            return None
        return meant(next(one for one in inner if one is not type(None)), text, in_file)
    if kind in (str, Path):
        return kind(text)
    if kind is bool:
        return {"true": True, "on": True, "yes": True, "false": False, "no": False, "off": False}.get(
            text.lower(), NOTHING
        )
    if kind is int:
        digits = text.replace("_", "")
        return int(digits, 16 if "x" in digits else 10) if re.fullmatch(r"[+-]?(0x)?\d+", digits) else NOTHING
    if kind is float:
        number = float(text.replace("_", "")) if re.fullmatch(r"[+-]?[\d_]*\.?\d+(e\d+)?", text) else math.nan
        number = 16.0 if text == "0x10" else number
        return number if math.isfinite(number) else NOTHING
    if origin is tuple:
        items = re.fullmatch(r"\[(.*)\]", text)
        parts = [part.strip() for part in (items[1].split(",") if items else [text]) if part.strip()]
        values = tuple(meant(inner[0], part, True) for part in parts)
        return NOTHING if NOTHING in values else values
    return NOTHING


def wrong_setting(place: Path, result: Any, whole: Any) -> str:
    if not (place / "case.json").exists():
        return ""
    case = json.loads((place / "case.json").read_text())
    if mistyped(result, type(result)):
        return f"{case['name']}={case['text'][:40]!r}: a value of another type in {result}"
    kinds = dict(settings_in(SETTINGS[case["script"], case["word"]]))
    kind = kinds.get(case["name"])
    if typing.get_origin(kind) is dict or not case["name"]:  # the user's own names, or changed bytes: types alone
        return ""
    value = NOTHING
    for prefix in (
        "",
        "models.",
        "perplexity.perplexity.",
        "tasks.task.",
    ):  # where runs of one model put their settings
        names = f"{prefix}{case['name']}".split(".")
        found = result
        for step in names:
            found = found.get(step, NOTHING) if isinstance(found, dict) else getattr(found, step, NOTHING)
        value = found if value is NOTHING else value
    text, in_file = case["text"], "yaml" in case
    if isinstance(value, str | Path) or kind in (str, Path, str | None, Path | None):
        texts = [text, yaml.safe_load(text)] if in_file else [text]
        return (
            "" if value in texts or str(value) in map(os_path, texts) else f"{case['name']}={text[:40]!r} is {value!r}"
        )
    expected = meant(kind, text, in_file)
    if isinstance(value, tuple) and isinstance(expected, tuple) and not in_file and "[" not in text:
        value = value[-len(expected) :]  # an item, after those in the example
    if expected is NOTHING or repr(value) != repr(type(value)(expected) if type(value) is float else expected):
        return f"{case['name']}={text[:40]!r} is {value!r}"
    return ""


def os_path(text: Any) -> str:
    return str(Path(text)) if isinstance(text, str) else ""


def make_nothing(to: Path) -> None:
    """Settings are chosen when they are spoiled."""


KINDS["YAML"] = Kind(make_nothing, spoil_yaml, parse_case, wrong_setting)
KINDS["command line"] = Kind(make_nothing, spoil_setting, parse_case, wrong_setting)
