"""The kinds of model: what config.json calls them, how they are made, and PyTorch's class of each.

A kind of one's own is one more row here, and its class follows `model/parts.py`'s `Model`. Loading, saving,
checkpoints, sharding and conversion go by this table.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from cepe_jax.config import CepeConfig, ContextRewardConfig, DecoderConfig, EncoderConfig, RewardConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import Model
from cepe_jax.model.reward import Reward
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
    fits: Callable[[Config, Mapping[str, Any]], bool] = lambda config, facts: True  # True for a model with these facts


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    config: type
    model: type[Model]
    create: Callable[..., Model]  # of (config, compute, key=), with random weights
    part: str | None = None  # under which config.json holds the fields of a model of one part
    architectures: tuple[Architecture, ...] = ()  # those that it may be in PyTorch; none = PyTorch has no class for it


def _family(name: str, family: hf_config.Family) -> Architecture:
    return Architecture(
        name,
        partial(hf_config.read_decoder, family),
        partial(hf_config.write_decoder, family),
        torch_keys.decoder_rows,
        lambda config: LM_HEAD if config.tied_head else {},
        lambda config, facts: family.has(config) and facts.get("model_type", family.model_type) == family.model_type,
    )


KINDS = {
    "llama": Kind(
        DecoderConfig,
        Llama,
        Llama,
        "decoder",
        tuple(_family(name, family) for name, family in hf_config.FAMILIES.items()),
    ),
    "encoder": Kind(
        EncoderConfig,
        Encoder,
        Encoder,
        "encoder",
        (
            Architecture(
                "LlamaForMLM",
                hf_config.read_mlm,
                hf_config.write_mlm,
                torch_keys.encoder_rows,
                lambda config: LM_HEAD | {"lm_head.bias": "lm_bias"},
            ),
        ),
    ),
    "cepe": Kind(
        CepeConfig,
        Cepe,
        Cepe.create,
        None,
        (
            Architecture(
                "LlamaForCausalContextLM",
                hf_config.read_cepe,
                hf_config.write_cepe,
                torch_keys.cepe_rows,
                lambda config: LM_HEAD if config.decoder.tied_head else {},
            ),
        ),
    ),
    "reward": Kind(
        RewardConfig,
        Reward,
        Reward.create,
        None,
        (
            Architecture(
                "LlamaForSequenceClassification",
                hf_config.read_reward,
                hf_config.write_reward,
                torch_keys.reward_rows,
                fits=lambda config, facts: hf_config.LLAMA.has(config.decoder),
            ),
        ),
    ),
    "cepe_reward": Kind(ContextRewardConfig, Reward, Reward.create),
}


def kind_of(config: Config) -> Kind:
    """Return the kind of the model that has this config."""
    return next(kind for kind in KINDS.values() if type(config) is kind.config)


def architecture_of(config: Config, facts: Mapping[str, Any] = MappingProxyType({})) -> Architecture:
    """Return PyTorch's class of a model with these facts; ValueError if there is none."""
    for architecture in kind_of(config).architectures:
        if architecture.fits(config, facts):
            return architecture
    raise ValueError(f"PyTorch has no class for a model with this {type(config).__name__}: use it here")


def from_hf(hf: dict, where: str = "config.json") -> Config:
    """Return our config of a Hugging Face config.json; ValueError names what we do not compute."""
    known = {one.name: one for kind in KINDS.values() for one in kind.architectures}
    architectures = typed(hf.get("architectures") or ["none"], list[str], f"{where}: architectures")
    if len(architectures) != 1 or architectures[0] not in known:
        names = shortened(", ".join(architectures), quoted=False)
        raise ValueError(f"{where}: architecture {names}: {', '.join(known)} are read")
    return known[architectures[0]].read(hf, where)


def to_hf_config(config: Config, facts: dict, dtype: str) -> dict:
    """Return the config.json that transformers (4 and 5) and the reference read.

    `dtype` is that of the stored tensors. ValueError if PyTorch has no class for the model.
    """
    architecture = architecture_of(config, facts)
    stored = {"torch_dtype": dtype, "dtype": dtype}  # of transformers 4 and 5
    return architecture.write(config, hf_config.DEFAULT_FACTS | facts) | {"architectures": [architecture.name]} | stored
