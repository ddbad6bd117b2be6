"""Our own directory of a model: config.json, safetensors shards with one tensor per layer, hash.json, tokenizer files.

Whole or absent: it is written under another name, its index and config last, and renamed when all of it is there.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from cepe_jax.data.tokenizer_files import BESIDE, NAMES
from cepe_jax.directories import new_directory, write_json
from cepe_jax.progress import track
from cepe_jax.weights.build import shapes
from cepe_jax.weights.files import WeightFiles, describe, digest, read_json, write_shards
from cepe_jax.weights.kinds import KINDS, Config

FORMAT = "cepe_jax"
ASSETS = *NAMES, *BESIDE, "chat_template.jinja", "chat_template.json", "generation_config.json"


class Directory:
    """A directory in our format. `written` is its config.json."""

    def __init__(self, path: Path, written: dict):
        self.path, self.facts = path, written.get("huggingface", {})
        self.config = _config_from(written, str(path / "config.json"))

    @cached_property
    def hashes(self) -> dict:
        hashes = read_json(self.path / "hash.json")
        if set(hashes) != {"base", "all", "tensors"}:
            raise ValueError(f"{self.path}/hash.json is not one of ours: convert again")
        return hashes

    @cached_property
    def files(self) -> WeightFiles:
        """The weights, their names, shapes and types checked against the config and the hashes."""
        path, files = self.path, WeightFiles(self.path)
        expected = {name: list(shape) for name, shape in shapes(self.config).items()}
        check_names(path, set(expected), set(files.tensors))
        for name, stored in files.tensors.items():
            if (shape := list(stored.shape)) != expected[name]:
                raise ValueError(f"{path}: {name} is {shape}, by config.json {expected[name]}: convert again")
            noted = self.hashes["tensors"].get(name, {})
            if (noted.get("shape"), noted.get("dtype")) != (shape, stored.dtype.name):
                raise ValueError(f"{path}: {name} is not what hash.json describes: convert again")
        return files

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.files.read(name, index)

    def write_assets(self, to: Path) -> None:
        copy_assets(self.path, to)

    @property
    def base_hash(self) -> str | None:
        """The hash of the decoder's tensors: two models with the same one have the same frozen base."""
        return self.hashes["base"]

    def verify(self) -> None:
        """ValueError unless every tensor has the bytes that were written."""
        differing = [
            name
            for name in track(self.files.tensors, f"verifying {self.path}")
            if describe(self.read(name)) != self.hashes["tensors"][name]
        ]
        if differing:
            raise ValueError(f"{self.path}: {', '.join(differing)} changed since it was written: copy it again")
        if _totals(self.hashes["tensors"]) != {key: self.hashes[key] for key in ("base", "all")}:
            raise ValueError(f"{self.path}/hash.json contradicts itself: copy it again")


def check_names(where: Path | str, expected: set[str], found: set[str]) -> None:
    """ValueError that names missing and unknown tensors, if there are any."""
    for word, names in ("lacks", sorted(expected - found)), ("holds unknown", sorted(found - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {word} {', '.join(names[:3])}{more}: its config describes another model")


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
        write_json(partial / "hash.json", _totals(hashes) | {"tensors": hashes})
        write_json(partial / "config.json", _config_to(config) | {"huggingface": facts or {}})


def _totals(hashes: dict[str, dict]) -> dict[str, str | None]:
    base = {name: described for name, described in hashes.items() if name.startswith("decoder.")}
    return {"base": digest(base) if base else None, "all": digest(hashes)}


def copy_assets(source: Path | str | None, to: Path) -> None:
    """The tokenizer, chat template and generation files of `source`, those that exist, are in `to`."""
    for name in ASSETS if source is not None else ():
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, to / name)


def _config_to(config: Config) -> dict:
    name, kind = next((name, kind) for name, kind in KINDS.items() if type(config) is kind.config)
    fields = dataclasses.asdict(config)
    return {"format": FORMAT, "kind": name} | ({kind.part: fields} if kind.part else fields)


def _config_from(written: dict, where: str) -> Config:
    fields = {key: value for key, value in written.items() if key not in ("format", "kind", "huggingface")}
    if (kind := KINDS.get(written.get("kind"))) is None:
        raise ValueError(f"{where}: kind {written.get('kind')!r}: one of {', '.join(KINDS)}")
    if "num_cross_layers" in fields:  # how the last layers were written before others could be chosen
        fields["cross_layers"] = {"kind": "last", "count": fields.pop("num_cross_layers")}
    if kind.part is None:
        return _dataclass(kind.config, fields, where)
    if set(fields) != {kind.part}:
        raise ValueError(f"{where} of kind {written['kind']} holds {', '.join(fields)}: it needs {kind.part} alone")
    return _dataclass(kind.config, fields[kind.part], f"{where}: {kind.part}")


def _dataclass(cls: type, fields: dict | None, where: str):
    """Return `cls` of these fields; ValueError for unknown and missing ones."""
    fields = dict(fields or {})
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := set(fields) - set(known):
        raise ValueError(f"{where}: unknown key {', '.join(sorted(unknown))}: it may be from a newer version")
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if missing := required - set(fields):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    for name, value in fields.items():
        if dataclasses.is_dataclass(known[name].type):
            fields[name] = _dataclass(known[name].type, value, f"{where}: {name}")
    return cls(**fields)
