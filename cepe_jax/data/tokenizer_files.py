"""The files of a tokenizer: their names, and what those beside it say of added tokens and of its ends."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NAMES = "tokenizer.model", "tokenizer.json"  # what a directory's tokenizer is called
BESIDE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"  # files that say more of its tokens
PADDING = re.compile(r"\W+pad(ding)?\W+", re.IGNORECASE)  # names of tokens that no text contains


def settings_beside(path: Path, name: str = "tokenizer_config.json") -> dict:
    """Return what the file of this name says beside the tokenizer at `path`, {} if there is none."""
    beside = path.with_name(name)
    if not beside.exists():
        return {}
    try:
        settings = json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: not JSON ({error}): copy it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{beside}: holds no settings by name: copy it again")
    return settings


def tokens_in(setting: Any) -> list[str]:
    """Return the tokens that a setting names: one, as text or as an object, or a list of them."""
    match setting:
        case str():
            return [setting] * bool(setting)
        case {"content": str(name)}:
            return [name]
        case list():
            return [name for item in setting for name in tokens_in(item)]
    return []


def first_characters(names: Iterable[str]) -> re.Pattern:
    """Finds each character with which one of the names begins, also where names overlap."""
    return re.compile("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names) or "(?!)")


def added_beside(path: Path) -> dict[str, dict]:
    """Return, by name, what the files beside `path` say of added tokens: `id`, `special` and the library's options."""
    settings, ids = settings_beside(path), settings_beside(path, "added_tokens.json")
    for name, i in ids.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{path.with_name('added_tokens.json')}: the id of {name} is {i!r}: copy it again")
    decoder = settings.get("added_tokens_decoder") or {}
    for i, token in decoder.items():
        if not i.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            where = path.with_name("tokenizer_config.json")
            raise ValueError(f"{where}: added_tokens_decoder has {i!r}: {token!r}, no token with its id: copy it again")
    roles = settings_beside(path, "special_tokens_map.json") | settings
    special = {n for key, role in roles.items() if key.endswith(("_token", "_tokens")) for n in tokens_in(role)}
    added = {name: {"id": i, "special": name in special} for name, i in ids.items()}
    return added | {token["content"]: {"special": False} | token | {"id": int(i)} for i, token in decoder.items()}


def without_padding(added: dict[str, dict], size: int) -> dict[str, dict]:
    """Leave out padding after all other ids: the models of some directories that add it have no row for it."""
    last = max((t["id"] for name, t in added.items() if not PADDING.fullmatch(name)), default=0)
    return {name: token for name, token in added.items() if token["id"] <= max(last, size - 1)}


def ends_of(path: Path, usual: dict[str, tuple[str, ...]], id_of: Callable[[str], int | None]) -> list[tuple[str, int]]:
    """Return name and id of begin and end of sequence: as the settings beside say, else by their usual names."""
    settings, ends = settings_beside(path), []
    for role, names in usual.items():
        names = tokens_in(settings.get(role)) or names
        known = [(name, i) for name in names if (i := id_of(name)) is not None]
        if not known:
            raise ValueError(f"{path}: no {role}: looked for {' and '.join(names)}; name it in tokenizer_config.json")
        ends.append(known[0])
    return ends


def marks_turns(name: str, special: bool) -> bool:
    """Whether an added token of this name may mark a turn."""
    return special or not name.isspace()
