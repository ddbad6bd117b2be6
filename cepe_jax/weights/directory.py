"""Our own directory of a model: config.json, safetensors shards with one tensor per layer, hash.json, tokenizer files.

Whole or absent: it is written under another name, its index and config last, and renamed when all of it is there.
hash.json describes every other file; all that it says is compared with them, so that it needs no digest of its own.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cepe_jax.data.tokenizer_files import BESIDE, NAMES, TEMPLATE
from cepe_jax.directories import new_directory, write_json, write_text
from cepe_jax.parsing import check_is_file, read_json, shortened, typed
from cepe_jax.progress import track
from cepe_jax.weights.build import shapes
from cepe_jax.weights.files import Description, WeightFiles, check_finite, describe, digest, existing, write_shards
from cepe_jax.weights.hf_config import facts_of
from cepe_jax.weights.kinds import KINDS, Config

FORMAT = "cepe_jax"
CONFIG = "config.json"  # written last: a directory that has it is whole
ASSETS = *NAMES, *BESIDE, TEMPLATE, "chat_template.json", "generation_config.json"


class FileNote(TypedDict):
    """The words of hash.json on a file."""

    size: int
    sha256: str | None  # None: of a file of weights, whose tensors have their own


@dataclasses.dataclass(frozen=True)
class Hashes:
    """The content of hash.json."""

    base: str | None
    all: str
    tensors: dict[str, Description]
    files: dict[str, FileNote] | None = None  # None: of a directory written before they were noted


class Directory:
    """A directory in our format. `written` is its config.json, and `note` what hash.json must say of that."""

    def __init__(self, path: Path, written: dict, note: FileNote):
        where = str(path / "config.json")
        self.path, self._note, self.config = path, note, _config_from(written, where)
        facts = typed(written.get("huggingface", {}), dict[str, Any], f"{where}: huggingface")
        self.facts = facts_of(facts, f"{where}: huggingface")

    @cached_property
    def hashes(self) -> Hashes:
        return read_json(existing(self.path / "hash.json"), Hashes)

    @cached_property
    def files(self) -> WeightFiles:
        """The weights, once they and the other files are those of the config and the hashes; not their bytes."""
        path = self.path
        for name, note in (self.hashes.files or {}).items():
            if not (file := path / name).is_file():
                raise ValueError(f"{path} lacks {name}, which was written with it: copy it again")
            if (self._note if name == CONFIG else note_of(file)) != note:
                mend = "copy it again, or if you changed it yourself, take its entry out of hash.json"
                raise ValueError(f"{file} is not what hash.json describes: {mend}")
        files = WeightFiles(path)
        expected = {name: list(shape) for name, shape in shapes(self.config).items()}
        check_names(path, set(expected), set(files.tensors))
        for name, stored in files.tensors.items():
            if (shape := list(stored.shape)) != expected[name]:
                raise ValueError(f"{path}: {name} is {shape}, by config.json {expected[name]}: convert again")
            noted = self.hashes.tensors.get(name)
            if noted is None or (noted["shape"], noted["dtype"]) != (shape, stored.dtype.name):
                raise ValueError(f"{path}: {name} is not what hash.json describes: convert again")
        return files

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.files.read(name, index)

    def write_assets(self, to: Path) -> None:
        copy_assets(self.path, to)

    @property
    def base_hash(self) -> str | None:
        """The hash of the decoder's tensors and factors: two models with the same one have the same frozen base."""
        return self.hashes.base

    def verify(self) -> None:
        """Raise ValueError unless every file is as it was written, and every weight a finite number."""
        differing = []
        for name in track(self.files.tensors, f"verifying {self.path}"):
            array = self.read(name)
            check_finite(self.path, name, array)
            if describe(array) != self.hashes.tensors[name]:
                differing.append(name)
        if differing:
            raise ValueError(f"{self.path}: {_listed(differing)} changed since it was written: copy it again")
        if _totals(self.hashes.tensors) != (self.hashes.base, self.hashes.all):
            raise ValueError(f"{self.path}/hash.json contradicts itself: copy it again")
        present = {name for name in ASSETS if (self.path / name).exists()}
        if self.hashes.files is not None and (added := sorted(present - set(self.hashes.files))):
            raise ValueError(f"{self.path}: {_listed(added)} was not written with it: take it away, or convert again")


def check_names(where: Path | str, expected: set[str], present: set[str]) -> None:
    """Raise ValueError that names missing and unknown tensors, if there are any."""
    for word, names in ("lacks", sorted(expected - present)), ("holds unknown", sorted(present - expected)):
        if names:
            raise ValueError(f"{where} {word} {_listed(names)}: its config describes another model")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shortened(name, quoted=False) for name in names[:3]) + more


def note_of(file: Path, content: bytes | None = None) -> FileNote:
    """Return what hash.json says of a file, whose content may be known already."""
    if file.suffix == ".safetensors":
        return {"size": file.stat().st_size, "sha256": None}
    content = file.read_bytes() if content is None else content
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(
    path: Path | str,
    config: Config,
    tensors: Iterable[tuple[str, np.ndarray]],
    facts: dict | None = None,
    write_assets: Callable[[Path], None] = lambda to: None,
) -> None:
    """The tensors, consumed one by one, are at `path` in our format. `facts` go back into an exported config.json."""
    expected = shapes(config)
    with new_directory(path) as partial:
        write_assets(partial)
        hashes = write_shards(partial, tensors)
        check_names(path, set(expected), set(hashes))
        for name, written in hashes.items():
            if tuple(written["shape"]) != expected[name]:
                raise ValueError(f"{name} is {written['shape']}, by its config {list(expected[name])}")
        written = json.dumps(_config_to(config) | {"huggingface": facts or {}}, indent=2) + "\n"
        notes = {file.name: note_of(file) for file in sorted(partial.iterdir())}
        notes[CONFIG] = note_of(partial / CONFIG, written.encode())
        write_json(partial / "hash.json", vars(Hashes(*_totals(hashes), hashes, notes)))
        write_text(partial / CONFIG, written)


def _totals(tensors: dict[str, Description]) -> tuple[str | None, str]:
    return decoder_hash(tensors, "decoder.", "decoder_lora."), digest(tensors)


def decoder_hash(tensors: dict[str, Description], *prefixes: str) -> str | None:
    """Return the hash of the tensors whose names begin so; None if there are none."""
    chosen = {name: described for name, described in tensors.items() if name.startswith(prefixes)}
    return digest(chosen) if chosen else None


def copy_assets(source: Path | str | None, to: Path, template: str = "") -> None:
    """The tokenizer, chat template and generation files of `source`, those that exist, are in `to`.

    So is `template`, the text of another chat template, if there is one.
    """
    for name in ASSETS if source is not None else ():
        if (path := Path(source) / name).exists():
            check_is_file(path)
            shutil.copyfile(path, to / name)
    if template:
        write_text(to / TEMPLATE, template)


def _config_to(config: Config) -> dict:
    name, kind = next((name, kind) for name, kind in KINDS.items() if type(config) is kind.config)
    fields = dataclasses.asdict(config)
    return {"format": FORMAT, "kind": name} | ({kind.part: fields} if kind.part else fields)


def _config_from(written: dict, where: str) -> Config:
    fields = {key: value for key, value in written.items() if key not in ("format", "kind", "huggingface")}
    if (kind := KINDS.get(typed(written.get("kind"), str, f"{where}: kind"))) is None:
        raise ValueError(f"{where}: kind {shortened(written['kind'])}: one of {', '.join(KINDS)}")
    if "num_cross_layers" in fields:  # how the last layers were written before others could be chosen
        fields["cross_layers"] = {"kind": "last", "count": fields.pop("num_cross_layers")}
    if kind.part is None:
        return typed(fields, kind.config, where)
    if set(fields) != {kind.part}:
        held = _listed(sorted(fields)) or "nothing"
        raise ValueError(f"{where} of kind {written['kind']} holds {held}: it needs {kind.part} alone")
    return typed(fields[kind.part], kind.config, f"{where}: {kind.part}")
