"""Hugging Face's directories: Llama, CEPE checkpoints (decoder, encoder and cross-attention) and the MLM encoder.

Every tensor of the model is filled by exactly one key, and every key is accounted for.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401 (makes numpy know the name bfloat16)
import numpy as np

from cepe_jax.weights.build import shapes
from cepe_jax.weights.directory import check_names, copy_assets
from cepe_jax.weights.files import WeightFiles
from cepe_jax.weights.hf_config import facts_of
from cepe_jax.weights.kinds import Config, architecture_of, from_hf
from cepe_jax.weights.torch_keys import Entry, entries_of


def table(config: Config) -> dict[str, Entry]:
    """Return the entry of every tensor of the model, by our name; ValueError if PyTorch has no class for it."""
    return entries_of(architecture_of(config).rows(config), shapes(config))


class HuggingFace:
    """A Hugging Face directory; tensors are read under our names, in our layout. `written` is its config.json."""

    def __init__(self, path: Path, written: dict):
        where = str(path / "config.json")
        self.path, self.config, self.facts = path, from_hf(written, where), facts_of(written, where)

    @cached_property
    def files(self) -> WeightFiles:
        return WeightFiles(self.path)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries by our names. All keys and shapes of the directory are checked, and that tied tensors agree."""
        path, stored, entries = self.path, self.files.tensors, table(self.config)
        # Buffers of old checkpoints, which the config's rotary positions repeat: the only keys passed over.
        keys = {key for key in stored if not key.endswith(".self_attn.rotary_emb.inv_freq")}
        aliases = architecture_of(self.config).aliases(self.config)
        # A converter that stores a tied tensor once may keep either name.
        lone = {key: alias for alias, key in aliases.items() if alias in keys and key not in keys}
        entries = {name: replace(entry, key=lone.get(entry.key, entry.key)) for name, entry in entries.items()}
        check_names(path, {entry.key for entry in entries.values()}, keys - (set(aliases) - set(lone.values())))
        for entry in entries.values():
            if stored[entry.key].shape != entry.shape:
                found, expected = list(stored[entry.key].shape), list(entry.shape)
                raise ValueError(f"{path}: {entry.key} is {found}, by config.json {expected}: one of them is wrong")
        for alias, key in aliases.items():
            if {alias, key} <= keys and not _same_bits(self.files.read(alias), self.files.read(key)):
                raise ValueError(f"{path}: {alias} and {key} are tied but differ: one of them is wrong")
        return entries

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        entry = self.entries[name]
        return entry.to_ours(self.files.read(entry.key))[index]

    def write_assets(self, to: Path) -> None:
        """Its tokenizer, chat template and generation files are in directory `to`."""
        copy_assets(self.path, to)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))
