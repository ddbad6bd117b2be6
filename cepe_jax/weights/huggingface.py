"""PyTorch weights in and out: one table `torch key <-> our tensor`, read in both directions.

Hugging Face's Llama directories, CEPE checkpoints (decoder, encoder and cross-attention) and the MLM encoder. Every
tensor of the model is filled by exactly one key, and every key is accounted for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import ml_dtypes  # noqa: F401 (makes numpy know the name bfloat16)
import numpy as np

from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig
from cepe_jax.directories import new_directory
from cepe_jax.progress import track
from cepe_jax.weights.directory import Directory, check_names, config_at, copy_assets, is_ours, write
from cepe_jax.weights.files import WeightFiles, read_json, write_json, write_shards
from cepe_jax.weights.hf_config import facts_of, from_hf, to_hf_config
from cepe_jax.weights.tensors import Config, Model, build, shapes

# Our path: torch's key, our axes, torch's axes. Letters that stand together are one axis in torch. The heads' order
# within an axis and the rotated pairs are the same on both sides.
SAME = "D", "D"
BLOCK = {
    "attention_norm.scale": ("input_layernorm.weight", *SAME),
    "attention.q": ("self_attn.q_proj.weight", "DNH", "NH D"),
    "attention.k": ("self_attn.k_proj.weight", "DKH", "KH D"),
    "attention.v": ("self_attn.v_proj.weight", "DKH", "KH D"),
    "attention.o": ("self_attn.o_proj.weight", "NHD", "D NH"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", *SAME),
    "mlp.gate": ("mlp.gate_proj.weight", "DF", "F D"),
    "mlp.up": ("mlp.up_proj.weight", "DF", "F D"),
    "mlp.down": ("mlp.down_proj.weight", "FD", "D F"),
}
CROSS = {
    "norm.scale": ("layernorm.weight", *SAME),
    "q": ("q_proj.weight", "DNH", "NH D"),
    "k": ("k_proj.weight", "EKH", "KH E"),
    "v": ("v_proj.weight", "EKH", "KH E"),
    "o": ("o_proj.weight", "NHD", "D NH"),
}
MLM_HEAD = {
    "dense": ("lm_dense.weight", "DE", "E D"),
    "dense_bias": ("lm_dense.bias", *SAME),
    "norm.scale": ("lm_layer_norm.weight", *SAME),
    "bias": ("lm_bias", "V", "V"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: torch's is ours with its axes in `order`, of shape `split`, and neighbours joined into `shape`."""

    key: str
    name: str
    order: tuple[int, ...]
    split: tuple[int, ...]
    shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.split).transpose(np.argsort(self.order))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.order).reshape(self.shape)


def _rows(config: Config) -> Iterator[tuple[str, str, str, str]]:
    """(our name, torch key, our axes, torch axes) of every tensor."""
    match config:
        case DecoderConfig():
            yield from _stack("decoder", "model", config.num_layers)
            if not config.tied_head:
                yield "decoder.head", "lm_head.weight", "VD", "V D"
        case EncoderConfig():
            if not config.mlm_head:
                raise ValueError("PyTorch has no class for an encoder without its MLM head: export its Cepe")
            yield from _stack("encoder", "model", config.num_layers)
            for path, (key, ours, torchs) in MLM_HEAD.items():
                yield f"encoder.mlm_head.{path}", key, ours, torchs
        case CepeConfig():
            yield from _rows(config.decoder)
            first = config.decoder.num_layers - config.num_cross_layers
            for layer in range(config.num_cross_layers):
                for path, (key, ours, torchs) in CROSS.items():
                    yield f"cross.{layer}.{path}", f"model.layers.{first + layer}.cross_attn.{key}", ours, torchs
            yield from _stack("encoder", "encoder", config.encoder.num_layers)


def _stack(part: str, prefix: str, num_layers: int) -> Iterator[tuple[str, str, str, str]]:
    yield f"{part}.embed", f"{prefix}.embed_tokens.weight", "VD", "V D"
    for layer in range(num_layers):
        for path, (key, ours, torchs) in BLOCK.items():
            yield f"{part}.layers.{layer}.{path}", f"{prefix}.layers.{layer}.{key}", ours, torchs
    yield f"{part}.norm.scale", f"{prefix}.norm.weight", *SAME


def table(config: Config) -> dict[str, Entry]:
    """The entry of every tensor of the model, by our name; shapes come from the model itself."""
    left = shapes(config)
    entries = {}
    for name, key, ours, torchs in _rows(config):
        size = dict(zip(ours, left.pop(name), strict=True))
        groups = torchs.split()
        order = tuple(ours.index(letter) for letter in "".join(groups))
        split = tuple(size[letter] for group in groups for letter in group)
        shape = tuple(math.prod(size[letter] for letter in group) for group in groups)
        entries[name] = Entry(key, name, order, split, shape)
    if left:
        raise ValueError(f"PyTorch's classes have no place for {', '.join(left)}: export another kind of model")
    return entries


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


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))


def read_config(path: Path | str) -> Config:
    """The config of the model at `path`, in our format or Hugging Face's; no weight is looked at."""
    path = Path(path)
    return config_at(path) if is_ours(path) else from_hf(read_json(path / "config.json"), str(path / "config.json"))


def load(path: Path | str, dtype: Literal["float32", "bfloat16"] = "float32", master: tuple[str, ...] = ()) -> Model:
    """The `Llama`, `Cepe` or `Encoder` at `path`, weights and activations in `dtype`.

    `master` names parts (`decoder`, `encoder`, `cross`) whose weights are float32 all the same, to be trained.
    `path` is a directory in our format or one of Hugging Face's. Under a mesh (`jax.set_mesh`) arrays are born
    sharded; of our format each process reads only its slices, of Hugging Face's whole tensors.
    """
    source = Directory(path) if is_ours(Path(path)) else HuggingFace(path)
    return build(source.config, dtype, source.read, master)


def to_jax(source: Path | str, target: Path | str, dtype: Literal["float32", "bfloat16"] | None = None) -> None:
    """The Hugging Face directory `source` is at `target` in our format; tensors as stored, or in `dtype`."""
    if is_ours(Path(source)):
        raise ValueError(f"{source} is already in our format: copy it")
    model = HuggingFace(source)

    def tensors():
        for name in track(model.entries, f"converting {source}"):
            array = model.read(name)
            yield name, array if dtype is None else array.astype(dtype, copy=False)

    write(target, model.config, tensors(), model.facts, source)


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
