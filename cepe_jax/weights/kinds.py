"""The kinds of model: what config.json calls them, how they are made, and PyTorch's class of each.

A kind of one's own is one more row here, and its class follows `model/parts.py`'s `Model`. Loading, saving,
checkpoints, sharding and conversion go by this table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import Model
from cepe_jax.parsing import shortened, typed
from cepe_jax.weights import hf_config, torch_keys

Config = Any  # a dataclass of the column `config` below

LM_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True)
class Architecture:
    """A class of PyTorch's, whose directories are read and written."""

    name: str  # in config.json's `architectures`
    read: Callable[[dict, str], Config]  # config.json's content, and its path for errors
    write: Callable[[Config, dict], dict]  # the config and the facts that it does not hold -> config.json's content
    rows: Callable[[Config], Iterable[torch_keys.Row]]
    aliases: Callable[[Config], dict[str, str]] = lambda config: {}  # a second key of a tensor -> its key


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    config: type
    model: type[Model]
    create: Callable[..., Model]  # of (config, compute, key=), with random weights
    part: str | None = None  # under which config.json holds the fields of a model of one part
    architecture: Architecture | None = None  # None = PyTorch has no class for it


KINDS = {
    "llama": Kind(
        DecoderConfig,
        Llama,
        Llama,
        "decoder",
        Architecture(
            "LlamaForCausalLM",
            hf_config.read_llama,
            hf_config.write_llama,
            torch_keys.decoder_rows,
            lambda config: LM_HEAD if config.tied_head else {},
        ),
    ),
    "encoder": Kind(
        EncoderConfig,
        Encoder,
        Encoder,
        "encoder",
        Architecture(
            "LlamaForMLM",
            hf_config.read_mlm,
            hf_config.write_mlm,
            torch_keys.encoder_rows,
            lambda config: LM_HEAD | {"lm_head.bias": "lm_bias"},
        ),
    ),
    "cepe": Kind(
        CepeConfig,
        Cepe,
        Cepe.create,
        None,
        Architecture(
            "LlamaForCausalContextLM",
            hf_config.read_cepe,
            hf_config.write_cepe,
            torch_keys.cepe_rows,
            lambda config: LM_HEAD if config.decoder.tied_head else {},
        ),
    ),
}


def kind_of(config: Config) -> Kind:
    """Return the kind of the model that has this config."""
    return next(kind for kind in KINDS.values() if type(config) is kind.config)


def architecture_of(config: Config) -> Architecture:
    """Return PyTorch's class of the model; ValueError if there is none."""
    if (architecture := kind_of(config).architecture) is None:
        raise ValueError(f"PyTorch has no class for a model with a {type(config).__name__}: use it here")
    return architecture


def from_hf(hf: dict, where: str = "config.json") -> Config:
    """Return our config of a Hugging Face config.json; ValueError names what we do not compute."""
    known = {kind.architecture.name: kind.architecture for kind in KINDS.values() if kind.architecture}
    architectures = typed(hf.get("architectures") or ["none"], list[str], f"{where}: architectures")
    if len(architectures) != 1 or architectures[0] not in known:
        names = shortened(", ".join(architectures), quoted=False)
        raise ValueError(f"{where}: architecture {names}: {', '.join(known)} are read")
    return known[architectures[0]].read(hf, where)


def to_hf_config(config: Config, facts: dict, dtype: str) -> dict:
    """Return the config.json that transformers (4 and 5) and the reference read.

    `dtype` is that of the stored tensors. ValueError if PyTorch has no class for the model.
    """
    architecture = architecture_of(config)
    stored = {"torch_dtype": dtype, "dtype": dtype}  # of transformers 4 and 5
    return architecture.write(config, hf_config.DEFAULT_FACTS | facts) | {"architectures": [architecture.name]} | stored
