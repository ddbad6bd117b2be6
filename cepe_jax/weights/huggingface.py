"""PyTorch weights in and out, and whatever the format, the model at a path.

Hugging Face's Llama directories, CEPE checkpoints (decoder, encoder and cross-attention) and the MLM encoder. Every
tensor of the model is filled by exactly one key, and every key is accounted for.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401 (makes numpy know the name bfloat16)
import numpy as np

from cepe_jax.config import FLOAT32, CepeConfig, Compute, DecoderConfig, Dtype, EncoderConfig
from cepe_jax.directories import new_directory, write_json
from cepe_jax.progress import track
from cepe_jax.weights.directory import GGUF, Directory, check_names, config_at, copy_assets, is_ours, write
from cepe_jax.weights.files import WeightFiles, read_json, write_shards
from cepe_jax.weights.gguf import Gguf
from cepe_jax.weights.hf_config import facts_of, from_hf, to_hf_config
from cepe_jax.weights.table import table
from cepe_jax.weights.tensors import Config, Model, build


def _aliases(config: Config) -> dict[str, str]:
    """Keys under which a tensor may be stored a second time."""
    match config:
        case EncoderConfig():
            return {"lm_head.weight": "model.embed_tokens.weight", "lm_head.bias": "lm_bias"}
        case CepeConfig():
            return _aliases(config.decoder)
        case DecoderConfig():
            return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {}


class HuggingFace:
    """A Hugging Face directory, its keys and shapes checked; tensors are read under our names, in our layout."""

    def __init__(self, path: Path | str):
        path = Path(path)
        where = path / "config.json"
        written = read_json(where)
        self.path = path
        self.config = from_hf(written, str(where))
        self.facts = facts_of(written)
        self.entries = table(self.config)
        self.files = WeightFiles(path)
        stored = self.files.tensors
        # Buffers of old checkpoints, which the config's rotary positions repeat: the only keys passed over.
        keys = {key for key in stored if not key.endswith(".self_attn.rotary_emb.inv_freq")}
        aliases = _aliases(self.config)
        # A converter that stores a tied tensor once may keep either name.
        lone = {key: alias for alias, key in aliases.items() if alias in keys and key not in keys}
        for name, entry in self.entries.items():
            self.entries[name] = replace(entry, key=lone.get(entry.key, entry.key))
        check_names(path, {entry.key for entry in self.entries.values()}, keys - (set(aliases) - set(lone.values())))
        for entry in self.entries.values():
            if stored[entry.key].shape != entry.shape:
                found, expected = list(stored[entry.key].shape), list(entry.shape)
                raise ValueError(f"{path}: {entry.key} is {found}, by config.json {expected}: one of them is wrong")
        for alias, key in aliases.items():
            if {alias, key} <= keys and not _same_bits(self.files.read(alias), self.files.read(key)):
                raise ValueError(f"{path}: {alias} and {key} are tied but differ: one of them is wrong")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        entry = self.entries[name]
        return entry.to_ours(self.files.read(entry.key))[index]

    def write_assets(self, to: Path) -> None:
        """Its tokenizer, chat template and generation files are in directory `to`."""
        copy_assets(self.path, to)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))


def read_config(path: Path | str) -> Config:
    """The config of the model at `path`, in any of the formats that `load` reads; no weight is looked at."""
    path = Path(path)
    if path.suffix == GGUF:
        return Gguf(path).config
    return config_at(path) if is_ours(path) else from_hf(read_json(path / "config.json"), str(path / "config.json"))


def _foreign(path: Path | str) -> HuggingFace | Gguf:
    """The model at `path`, which is not in our format."""
    return Gguf(path) if Path(path).suffix == GGUF else HuggingFace(path)


def load(
    path: Path | str, compute: Compute = FLOAT32, master: tuple[str, ...] = (), config: Config | None = None
) -> Model:
    """Return the `Llama`, `Cepe` or `Encoder` at `path`, its weights in the dtype of activations.

    `master` names parts (`decoder`, `encoder`, `cross`) whose weights are float32 instead, to be trained. `config` is
    the architecture to build from these tensors, or from some of them, if it is not the one in the directory. `path` is
    a directory in our format, one of Hugging Face's, or a GGUF file. Under a mesh (`jax.set_mesh`) arrays are born
    sharded; of our format each process reads only its slices, of the others whole tensors.
    """
    source = Directory(path) if is_ours(Path(path)) else _foreign(path)
    return build(config or source.config, compute, source.read, master)


def to_jax(source: Path | str, target: Path | str, dtype: Dtype | None = None) -> None:
    """The Hugging Face directory or GGUF file `source` is at `target` in our format, with its tokenizer.

    Tensors are as stored, those of a GGUF file in float32; or in `dtype`.
    """
    if is_ours(Path(source)):
        raise ValueError(f"{source} is already in our format: copy it")
    model = _foreign(source)

    def tensors():
        for name in track(model.entries, f"converting {source}"):
            array = model.read(name)
            yield name, array if dtype is None else array.astype(dtype, copy=False)

    with tempfile.TemporaryDirectory() as assets:
        model.write_assets(Path(assets))
        write(target, model.config, tensors(), model.facts, assets)


def to_hf(source: Path | str, target: Path | str) -> None:
    """The model at `source`, in our format, is at `target` as transformers or the CEPE reference reads it."""
    model = Directory(source)
    entries = table(model.config)

    def tensors():
        for entry in track(list(entries.values()), f"converting {source}"):
            yield entry.key, entry.to_torch(model.read(entry.name))

    embedding = "encoder.embed" if isinstance(model.config, EncoderConfig) else "decoder.embed"
    dtype = model.files.tensors[embedding].dtype.name
    with new_directory(Path(target)) as partial:
        copy_assets(source, partial)
        write_shards(partial, tensors())
        write_json(partial / "config.json", to_hf_config(model.config, model.facts, dtype))
