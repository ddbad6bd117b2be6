"""Our own directory of a model: config.json, safetensors shards with one tensor per layer, hash.json, tokenizer files.

Whole or absent: it is written under another name, its index and config last, and renamed when all of it is there.
"""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cepe_jax.config import CepeConfig, CrossLayers, DecoderConfig, EncoderConfig, RopeConfig
from cepe_jax.data.tokenizer import BESIDE, NAMES
from cepe_jax.directories import new_directory, write_json
from cepe_jax.distributed import is_first, meet
from cepe_jax.progress import track
from cepe_jax.weights.files import WeightFiles, describe, digest, read_json, write_shards
from cepe_jax.weights.hf_config import facts_of
from cepe_jax.weights.tensors import Config, Model, shapes, tensors_of

FORMAT = "cepe_jax"
GGUF = ".gguf"  # how a file in llama.cpp's format is called: all else that holds a model is a directory
KINDS = {"llama": DecoderConfig, "encoder": EncoderConfig, "cepe": CepeConfig}
ASSETS = *NAMES, *BESIDE, "chat_template.jinja", "chat_template.json", "generation_config.json"


def is_ours(path: Path) -> bool:
    """Whether config.json says that this directory is in our format; ValueError when there is none."""
    return path.suffix != GGUF and read_json(path / "config.json").get("format") == FORMAT


def facts_at(path: Path) -> dict:
    """The Hugging Face facts of the directory, in either format."""
    config = read_json(path / "config.json")
    return config.get("huggingface", {}) if config.get("format") == FORMAT else facts_of(config)


def check_positions(path: Path | str, length: int) -> None:
    """ValueError where the directory says that its decoder was trained for fewer positions."""
    positions = facts_at(Path(path)).get("max_position_embeddings")
    if positions is not None and length > positions:
        raise ValueError(f"{path} reads {positions} tokens, and context and window have {length}: lower one of them")


def config_at(path: Path) -> Config:
    """The config of the directory in our format at `path`."""
    return _config_from(read_json(path / "config.json"), str(path / "config.json"))


class Directory:
    """A directory in our format, its names, shapes and types checked against its config and its hashes."""

    def __init__(self, path: Path | str):
        path = Path(path)
        if not is_ours(path):
            raise ValueError(f"{path} is not in our format: run scripts/convert.py to-jax on it")
        written = read_json(path / "config.json")
        self.path = path
        self.config = _config_from(written, str(path / "config.json"))
        self.facts: dict = written.get("huggingface", {})
        self.hashes = read_json(path / "hash.json")
        if set(self.hashes) != {"base", "all", "tensors"}:
            raise ValueError(f"{path}/hash.json is not one of ours: convert again")
        self.files = WeightFiles(path)
        expected = {name: list(shape) for name, shape in shapes(self.config).items()}
        found = {name: list(stored.shape) for name, stored in self.files.tensors.items()}
        check_names(path, set(expected), set(found))
        for name, stored in self.files.tensors.items():
            if found[name] != expected[name]:
                raise ValueError(f"{path}: {name} is {found[name]}, by config.json {expected[name]}: convert again")
            noted = self.hashes["tensors"].get(name, {})
            if (noted.get("shape"), noted.get("dtype")) != (found[name], stored.dtype.name):
                raise ValueError(f"{path}: {name} is not what hash.json describes: convert again")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.files.read(name, index)

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


def save(model: Model, path: Path | str, assets: Path | str | None = None) -> None:
    """`model` is at `path` in our format, with the tokenizer files and Hugging Face facts of directory `assets`.

    Of many processes, which all call this, the first writes.
    """
    has_config = assets is not None and (Path(assets) / "config.json").is_file()
    facts = facts_at(Path(assets)) if has_config else {}
    tensors = track(tensors_of(model), f"writing {path}", len(shapes(model.config)))
    if is_first():
        write(path, model.config, tensors, facts, assets)
    else:
        for _ in tensors:
            pass  # the first process needs this one's part of each
    meet()


def write(
    path: Path | str,
    config: Config,
    tensors: Iterable[tuple[str, np.ndarray]],
    facts: dict | None = None,
    assets: Path | str | None = None,
) -> None:
    """The tensors, consumed one by one, are at `path` in our format. `facts` go back into an exported config.json."""
    expected = shapes(config)
    with new_directory(path) as partial:
        copy_assets(assets, partial)
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
    kind = next(name for name, cls in KINDS.items() if type(config) is cls)
    fields = dataclasses.asdict(config)
    if kind != "cepe":
        fields = {"encoder" if kind == "encoder" else "decoder": fields}
    return {"format": FORMAT, "kind": kind} | fields


def _config_from(written: dict, where: str) -> Config:
    kind = written.get("kind")
    fields = {key: value for key, value in written.items() if key not in ("format", "kind", "huggingface")}
    match kind:
        case "cepe":
            parts = {"decoder": DecoderConfig, "encoder": EncoderConfig, "cross_layers": CrossLayers}
            if "num_cross_layers" in fields:  # how the last layers were written before others could be chosen
                fields["cross_layers"] = {"kind": "last", "count": fields.pop("num_cross_layers")}
            fields |= {name: _dataclass(cls, fields.get(name), f"{where}: {name}") for name, cls in parts.items()}
            return _dataclass(CepeConfig, fields, where)
        case "llama" | "encoder":
            part = "decoder" if kind == "llama" else "encoder"
            if set(fields) != {part}:
                raise ValueError(f"{where} of kind {kind} holds {', '.join(fields)}: it needs {part} alone")
            return _dataclass(KINDS[kind], fields[part], f"{where}: {part}")
    raise ValueError(f"{where}: kind {kind!r}: one of {', '.join(KINDS)}")


def _dataclass(cls: type, fields: dict | None, where: str):
    """`cls` of these fields; ValueError for unknown and missing ones."""
    fields = dict(fields or {})
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := set(fields) - set(known):
        raise ValueError(f"{where}: unknown key {', '.join(sorted(unknown))}: it may be from a newer version")
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if missing := required - set(fields):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if "rope" in fields:
        fields["rope"] = _dataclass(RopeConfig, fields["rope"], f"{where}: rope")
    return cls(**fields)
