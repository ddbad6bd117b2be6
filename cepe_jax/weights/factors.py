"""Low-rank factors on disk: PEFT's directories, read beside their base and written, and factors merged into weights."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta
from safetensors import safe_open

from cepe_jax.config import LoraConfig, with_lora, without_lora
from cepe_jax.data.tokenizer_files import NAMES
from cepe_jax.directories import new_directory, write_json
from cepe_jax.parsing import read_json, shortened, typed
from cepe_jax.weights.build import Source, shapes
from cepe_jax.weights.directory import Directory, check_names, copy_assets, decoder_hash
from cepe_jax.weights.files import WeightFiles, check_finite, save_tensors
from cepe_jax.weights.kinds import Config
from cepe_jax.weights.torch_keys import BLOCK, Entry, entries_of, lora_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PRODUCT_OF = {key.split(".")[1]: path.rpartition(".")[2] for path, (key, _, torchs) in BLOCK.items() if " " in torchs}
# In the metadata of written weights: the hash of the decoder that they belong to, and the type of its weights.
BASE, BASE_DTYPE = "cepe_jax_base", "cepe_jax_base_dtype"
# What PEFT's factors may be and ours are not: the settings of adapter_config.json that must be absent or empty.
OTHERS = (
    "use_dora",
    "use_rslora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
)


class Written(TypedDict):
    """The settings of adapter_config.json that are read."""

    peft_type: str
    base_model_name_or_path: str
    r: Annotated[int, Meta(ge=1)]
    lora_alpha: Annotated[float, Meta(gt=0)]


def is_peft(path: Path) -> bool:
    return (path / CONFIG).is_file()


def base_of(path: Path) -> Path:
    """Return the directory of the base that a PEFT directory names; ValueError if there is none."""
    where = path / CONFIG
    written = read_json(where)
    if (kind := written.get("peft_type")) != "LORA":
        raise ValueError(f"{where}: peft_type is {shortened(kind)}: LORA alone is read")
    base = Path(typed(written, Written, str(where))["base_model_name_or_path"])
    if is_peft(base):
        raise ValueError(
            f"{where}: base_model_name_or_path is {base}, which are factors: write a model's directory there"
        )
    if not base.exists():
        raise ValueError(
            f"{where}: base_model_name_or_path is {base}, and no model is there: write its directory there"
        )
    return base


class Peft:
    """PEFT's directory of a decoder's factors, beside its base, which keeps its own format."""

    def __init__(self, path: Path, base: Source):
        where = str(path / CONFIG)
        written = read_json(path / CONFIG)
        given = [f"{name} {shortened(written[name])}" for name in OTHERS if written.get(name)]
        if (start := written.get("init_lora_weights", True)) not in (
            True,
            False,
            None,
            "gaussian",
            "eva",
            "orthogonal",
        ):
            given.append(f"init_lora_weights {shortened(start)}")  # which changes the base's weights
        if written.get("bias", "none") != "none":
            given.append(f"bias {shortened(written['bias'])}")
        if given:
            raise ValueError(
                f"{where}: {', '.join(given)}: factors of one rank, without more, are read: merge with PEFT"
            )
        settings = typed(written, Written, where)
        self.path, self.base, self.facts = path, base, base.facts
        if without_lora(base.config) != base.config:
            raise ValueError(
                f"{where}: {base.path} has factors of its own: merge them into it first (convert.py merge)"
            )
        named = {part for key in self.files.tensors for part in key.split(".")}
        products = tuple(product for module, product in PRODUCT_OF.items() if module in named)
        if not products:
            raise ValueError(f"{path}: no factors of {', '.join(PRODUCT_OF)}: other modules are not read")
        lora = LoraConfig(settings["r"], settings["lora_alpha"], products)
        self.config: Config = with_lora(base.config, "decoder", lora)

    @cached_property
    def files(self) -> WeightFiles:
        return WeightFiles(self.path, (WEIGHTS, "adapter_model.bin"))

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """The entries of the factors by our names; keys and shapes are checked, and that they are of this base."""
        entries, stored = factor_entries(self.config), self.files.tensors
        check_names(self.path, {entry.key for entry in entries.values()}, set(stored))
        for entry in entries.values():
            if stored[entry.key].shape != entry.shape:
                found, wanted = list(stored[entry.key].shape), list(entry.shape)
                raise ValueError(
                    f"{self.path}: {entry.key} is {found}, and {wanted} for {self.base.path}: another base"
                )
        if (self.path / WEIGHTS).is_file() and isinstance(self.base, Directory):
            with safe_open(self.path / WEIGHTS, "np") as file:
                file_metadata = file.metadata() or {}
            wanted = file_metadata.get(BASE)
            stored = {
                described["dtype"]
                for name, described in self.base.hashes.tensors.items()
                if name.startswith("decoder.")
            }
            same = stored == {(file_metadata or {}).get(BASE_DTYPE)}  # of another type its hash says nothing
            if same and wanted != decoder_hash(self.base.hashes.tensors, "decoder."):
                raise ValueError(f"{self.path}: its factors belong to another decoder than {self.base.path}")
        return entries

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if not name.startswith("decoder_lora."):
            return self.base.read(name, index)
        entry = self.entries[name]
        return entry.to_ours(self.files.read(entry.key))[index]

    def write_assets(self, to: Path) -> None:
        """Write its tokenizer and chat template, or its base's if it has none, to directory `to`."""
        if any((self.path / name).exists() for name in NAMES):
            copy_assets(self.path, to)
        else:
            self.base.write_assets(to)


def factor_entries(config: Config) -> dict[str, Entry]:
    """Return the entry of every factor of a model's decoder, by our name."""
    sizes = {name: shape for name, shape in shapes(config).items() if name.startswith("decoder_lora.")}
    return entries_of(lora_rows(getattr(config, "decoder", config)), sizes)


def to_peft(model: Directory, base: str, target: Path | str) -> None:
    """Write the factors of a model's decoder to `target` as PEFT loads them on `base`, a name or a directory.

    ValueError if it has none, or its encoder has some, for which PEFT's class has no place.
    """
    decoder = getattr(model.config, "decoder", model.config)
    if getattr(decoder, "lora", None) is None:
        raise ValueError(f"{model.path} has no decoder_lora: train it, or export the model with to-hf")
    if "head.weight" in model.files.tensors:
        raise ValueError(f"{model.path} has a head of its own beside its factors: merge them, or export it with to-hf")
    if getattr(getattr(model.config, "encoder", None), "lora", None):
        raise ValueError(f"{model.path} has encoder_lora, which PEFT has no place for: export the model with to-hf")
    module_of, tensors = {product: module for module, product in PRODUCT_OF.items()}, {}
    for entry in factor_entries(model.config).values():
        array = model.read(entry.name)
        check_finite(model.path, entry.name, array)
        tensors[entry.key] = np.ascontiguousarray(entry.to_torch(array))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": decoder.lora.rank,
        "lora_alpha": decoder.lora.alpha,
        "target_modules": [module_of[product] for product in decoder.lora.products],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    stored = model.files.tensors["decoder.embed"].dtype.name
    metadata = {"format": "pt", BASE: decoder_hash(model.hashes.tensors, "decoder."), BASE_DTYPE: stored}
    with new_directory(Path(target)) as partial:
        model.write_assets(partial)
        save_tensors(tensors, partial / WEIGHTS, metadata)
        write_json(partial / CONFIG, config)


class Merged:
    """A model whose low-rank factors are added to its weights, tensor by tensor; of one without any, itself."""

    def __init__(self, source: Source):
        self.source, self.path, self.facts = source, source.path, source.facts
        self.config: Config = without_lora(source.config)
        self._loras = {
            f"{part}_lora": lora
            for part in ("decoder", "encoder")
            if (lora := getattr(getattr(source.config, part, source.config), "lora", None))
        }
        self._names = shapes(source.config).keys()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return the tensor in the dtype that the weight is stored in; the sum is taken in float32."""
        weight = self.source.read(name)
        part, _, of_layer = name.partition(".layers.")
        if (factors := f"{part}_lora.{of_layer}") + ".a" in self._names:
            lora = self._loras[f"{part}_lora"]
            a, b = (self.source.read(f"{factors}.{side}").astype(np.float32) for side in "ab")
            added = lora.alpha / lora.rank * (a.reshape(-1, lora.rank) @ b.reshape(lora.rank, -1))
            weight = (weight.astype(np.float32) + added.reshape(weight.shape)).astype(weight.dtype)
        return weight[index]

    def write_assets(self, to: Path) -> None:
        self.source.write_assets(to)
