"""The files of a tokenizer: their names, and what those beside it say of added tokens and of its ends."""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from cepe_jax.directories import Place, local_directory, write_bytes
from cepe_jax.parsing import read_json, typed

NAMES = "tokenizer.model", "tokenizer.json"  # what a directory's tokenizer is called
BESIDE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"  # files that say more of its tokens
TEMPLATE = "chat_template.jinja"  # the chat template, if it has a file of its own
TOKENIZER_FILES = *NAMES, *BESIDE, TEMPLATE
PADDING = re.compile(r"\W+pad(ding)?\W+", re.IGNORECASE)  # names of tokens that no text contains
MOST_IDS = 1 << 24  # the largest vocabularies have a million; libraries allocate up to the highest id
Id = Annotated[int, Meta(ge=0, lt=MOST_IDS)]


def local_files(directory: Place) -> Path:
    """Copy the files of the tokenizer in a directory of a bucket to this machine, and return their directory."""
    present = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not set(NAMES) & set(present):
        raise FileNotFoundError(f"{directory}: no {' and no '.join(NAMES)} in this directory")
    contents = {name: (directory / name).read_bytes() for name in present}
    here = local_directory(hashlib.sha256(repr(contents).encode()).hexdigest())
    for name, content in contents.items():
        write_bytes(here / name, content)
    return here


Placed = list[tuple[int, int, int]]  # ids, each with the place in the text that it stands for


class _Named(TypedDict):
    content: str


class AddedToken(_Named, total=False):
    """An added token, with the options of Hugging Face's library."""

    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class NamedTemplate(TypedDict):
    name: str
    template: str


Token = str | _Named


class Settings(TypedDict, total=False):
    """The settings of tokenizer_config.json and special_tokens_map.json that are read. Others may be anything."""

    bos_token: Token | None
    eos_token: Token | None
    unk_token: Token | None
    pad_token: Token | None
    additional_special_tokens: list[Token] | None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern="^[0-9]{1,8}$")], AddedToken] | None
    add_bos_token: bool | None
    legacy: bool | None
    chat_template: str | list[NamedTemplate] | None


def settings_beside(path: Path, name: str = "tokenizer_config.json") -> dict:
    """Return the settings in the file of this name beside the tokenizer at `path`, {} if there is none."""
    beside = path.with_name(name)
    if not beside.exists():
        return {}
    settings = read_json(beside)
    return settings | typed(settings, Settings, str(beside))


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
    settings, listed = settings_beside(path), path.with_name("added_tokens.json")
    ids = read_json(listed, dict[str, Id]) if listed.exists() else {}
    decoder = settings.get("added_tokens_decoder") or {}
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
    """Return true if an added token of this name may mark a turn."""
    return special or not name.isspace()
