"""Models by their configuration: CEPE, and what it is compared with."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cepe_jax.config import CepeConfig, Dtype, RopeConfig
from cepe_jax.evaluation.readers.language_model import LanguageModel
from cepe_jax.evaluation.readers.readers import CepeReader, DecoderReader
from cepe_jax.evaluation.readers.replug import RePlug
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.inference.text import ModelFacts, read_facts

Reads = Literal["encoder", "decoder", "replug"]
Rope = Literal["trained", "linear", "yarn"]


@dataclass(frozen=True)
class ModelConfig:
    path: Path  # a CEPE model or a decoder; whatever reads with a decoder alone takes a CEPE's
    reads: Reads = "encoder"  # who reads contexts: CEPE's encoder; the decoder, in one text; replug: it, each by itself
    window: int | None = None  # tokens that the decoder reads at most; None: all its positions
    cache: CacheConfig = CacheConfig()  # what the decoder keeps and reads of the tokens before
    temperature: float = 1.0  # divides the contexts' scores in RePlug
    rope: Rope = "trained"  # linear (position interpolation) or yarn: put on a decoder that was trained without it
    factor: float = 1.0  # how many times as many positions linear and yarn give
    dtype: Dtype = "float32"  # type of weights and activations
    tokenizer: Path | None = None  # its file or directory; None: beside the model

    def __post_init__(self):
        for name, choices in ("reads", Reads), ("rope", Rope):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} is {value!r}: choose {', '.join(get_args(choices))}")
        if self.window is not None and self.window < 2:
            raise ValueError(f"window is {self.window}: give 2 tokens or more")
        if self.cache.policy.any_length and self.window is not None:
            raise ValueError(f"cache.kind is {self.cache.kind}, which reads texts of any length: leave window out")
        if self.cache != CacheConfig() and self.reads == "replug":
            raise ValueError(f"cache.kind is {self.cache.kind}, and replug takes full: let encoder or decoder read")
        if self.reads != "replug" and self.temperature != ModelConfig.temperature:
            raise ValueError(
                f"temperature is {self.temperature}, and reads {self.reads} does not read it: leave it out, or give "
                f"reads replug"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: give a number above 0")
        if (self.rope == "trained") != (self.factor == 1) or not self.factor >= 1:
            raise ValueError(
                f"rope {self.rope} with factor {self.factor}: give linear or yarn a factor above 1, and no other"
            )


def check_model(config: ModelConfig) -> ModelFacts:
    """Return the facts of the model as it is to be read; no weight is read. ValueError where it cannot be."""
    facts = read_facts(config.path, config.tokenizer)
    rope, positions = facts.decoder.rope, facts.window
    if config.reads == "encoder" and not facts.has_encoder:
        raise ValueError(
            f"{config.path} is a plain decoder, without an encoder: give --model.reads=decoder, in a sweep "
            f"--models.NAME.reads=decoder"
        )
    if config.rope != "trained":
        if rope.scaling != "default":
            raise ValueError(f"{config.path} was trained with rope scaling {rope.scaling}: leave rope out")
        if positions is None:
            raise ValueError(
                f"{config.path}/config.json lacks max_position_embeddings, which rope {config.rope} scales"
            )
        if (trained := facts.source.facts.get("max_position_embeddings")) not in (None, positions):
            raise ValueError(f"{config.path} sees {positions} of its {trained} positions at once: leave rope out")
        rope = RopeConfig(rope.theta, config.rope, config.factor, positions if config.rope == "yarn" else 0)
        positions = int(positions * config.factor)
    if positions is not None and (config.window or 0) > positions:
        raise ValueError(f"window is {config.window}: give at most {positions}, the positions that {config.path} has")
    decoder = dataclasses.replace(facts.decoder, rope=rope)
    sizes = dataclasses.replace(facts.config, decoder=decoder) if isinstance(facts.config, CepeConfig) else decoder
    policy = config.cache.policy.of(facts.source.path, decoder, positions)
    window = None if policy.any_length else config.window or positions
    return dataclasses.replace(facts, config=sizes, window=window, cache=policy)


def load_model(config: ModelConfig) -> LanguageModel:
    """Return the model, ready to be asked. Under a mesh (`jax.set_mesh`) its weights are born sharded."""
    text = check_model(config).load(config.dtype)
    rest = text.tokenizer, text.stop_ids, text.window
    match config.reads:
        case "encoder":
            return CepeReader(text.model, *rest, text.cache)
        case "decoder":
            return DecoderReader(text.model.decoder, *rest, text.cache)
        case "replug":
            return RePlug(text.model.decoder, *rest, config.temperature)
