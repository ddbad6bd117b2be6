"""The stages of training as one table: where each starts, what trains, on which examples, towards which loss.

A stage of one's own is one more row of `STAGES`. Everything else goes by the rows; nothing compares their names.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cepe_jax.config import (
    DECODERS,
    ENCODERS,
    CepeConfig,
    Compute,
    ContextRewardConfig,
    DecoderConfig,
    EncoderConfig,
    RewardConfig,
    RopeConfig,
    preset,
    without_lora,
)
from cepe_jax.cost import Flops, cepe_flops, decoder_flops, encoder_flops, teacher_flops
from cepe_jax.data.loader import Sequences
from cepe_jax.data.recipes import (
    DuplicatedWindows,
    MaskedWindows,
    PairsOfAnswers,
    Recipe,
    TaughtWindows,
    WholeConversations,
    Windows,
    WindowsInContext,
)
from cepe_jax.directories import Place
from cepe_jax.model.cepe import Cepe, cross_from_self_attention, encoder_from_decoder
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.model.lora import Lora
from cepe_jax.model.parts import Model
from cepe_jax.model.reward import Reward, RewardHead
from cepe_jax.sharding import shardings_of
from cepe_jax.training.objectives import BradleyTerry, Distill, Dpo, MaskedLM, NextToken, Objective
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.kinds import Config, kind_of
from cepe_jax.weights.source import check_positions, load, open_model

log = logging.getLogger(__name__)

Settings = Any  # a TrainConfig, which this table checks and which is therefore declared after it


@dataclass(frozen=True)
class Start:
    """A way to begin: the model before the first step."""

    models: tuple[str, ...]  # the settings that name models: these and no others are given
    config: Callable[[Settings, int | None], Config]  # of the model; the tokenizer's vocabulary size, None = not known
    model: Callable[[Settings, Config, Compute, tuple[str, ...]], Model]  # of `config`; the last names what trains
    trains: tuple[str, ...]  # parts that train where nothing is said
    frozen: tuple[str, ...] = ()  # further parts that may train; and factors beside decoder and encoder
    settings: tuple[str, ...] = ()  # that only such starts read


@dataclass(frozen=True)
class Stage:
    """A stage of training."""

    starts: tuple[Start, ...]
    recipe: Callable[[Settings], Recipe]
    objective: Callable[[Settings], Objective]
    flops: Callable[[Settings, Config, Sequence[Sequences]], Flops]  # of one sequence of these sources
    settings: tuple[str, ...] = ()  # that only such stages read; one without a value must be given
    more_ids: int = 0  # that examples have beyond the tokenizer's
    check: Callable[[Settings, Place, Sequence[Sequences]], None] = lambda config, data, sources: None  # refuses data


def part_config(name: str, start: str, presets: dict[str, Config], vocab_size: int | None) -> Config:
    """Return the config of the directory `start`, or of the preset with a vocabulary of this size (None = its own)."""
    if not Path(start).exists():
        sizes = preset(presets, start)
        return sizes if vocab_size is None else dataclasses.replace(sizes, vocab_size=vocab_size)
    sizes, wanted = open_model(start).config, type(next(iter(presets.values())))
    if type(sizes) is not wanted:
        raise ValueError(f"{name} {start} has a {type(sizes).__name__}: give the directory of a plain {name}")
    return sizes


def decoder_config(config: Settings, vocab_size: int | None) -> DecoderConfig:
    return with_rope(part_config("decoder", config.decoder, DECODERS, vocab_size), config)


def with_rope(sizes: DecoderConfig, config: Settings) -> DecoderConfig:
    """Return the decoder's config with the RoPE that the run gives it: another base makes it plain."""
    return dataclasses.replace(sizes, rope=RopeConfig(config.rope_theta)) if config.rope_theta else sizes


def encoder_config(config: Settings, vocab_size: int | None) -> EncoderConfig:
    """Return the config of an encoder. A preset has an id more than the tokenizer, or than the decoder: the mask."""
    if vocab_size is None and config.decoder:
        vocab_size = decoder_config(config, None).vocab_size
    return part_config("encoder", config.encoder, ENCODERS, vocab_size and vocab_size + 1)


def masked_config(config: Settings, vocab_size: int | None) -> EncoderConfig:
    return dataclasses.replace(encoder_config(config, vocab_size), mlm_head=True)


def masked_like_decoder(config: Settings, vocab_size: int | None) -> EncoderConfig:
    """Return the config of an encoder that has the biases and norms of the decoder from which it starts."""
    decoder = decoder_config(config, vocab_size)
    properties = {"qkv_bias": decoder.qkv_bias, "qk_norm": decoder.qk_norm}
    return dataclasses.replace(masked_config(config, vocab_size), **properties)


def spliced_config(config: Settings, vocab_size: int | None) -> CepeConfig:
    encoder = encoder_config(config, vocab_size)
    encoder = dataclasses.replace(encoder, mlm_head=False, chunk_positions=config.chunk_positions)
    return CepeConfig(decoder_config(config, vocab_size), encoder, config.cross_layers)


def with_new_factors(model: Model, sizes: Config, seed: int) -> Model:
    """Return the model with new factors for the parts that have some by `sizes` and have none yet."""
    parts = model.parts
    for name in sorted(abstract_parts(sizes).keys() - parts.keys()):
        part = name.removesuffix("_lora")
        lora, key = getattr(sizes, part, sizes).lora, jax.random.fold_in(jax.random.key(seed), len(parts))
        parts[name] = born_sharded(lambda key, blocks, lora=lora: Lora(blocks, lora, key=key), key, parts[part].layers)
    return type(model).from_parts(parts)


def born_sharded(make, *args):
    """Return `make(*args)`, every array created where it belongs on the mesh."""
    shardings = shardings_of(jax.eval_shape(make, *args), jax.sharding.get_mesh())
    return jax.jit(make, out_shardings=shardings)(*args)


def part_model(start: str, seed: int, sizes: Config, compute: Compute, master: tuple[str, ...]) -> Model:
    """Return the model at `start` with this config, or at random if `start` is a preset."""
    if Path(start).exists():
        return load(start, compute, master, sizes)
    create = kind_of(sizes).create
    return born_sharded(lambda key: create(sizes, compute, key=key), jax.random.key(seed))


def decoder_model(config: Settings, sizes: DecoderConfig, compute: Compute, master: tuple[str, ...]) -> Llama:
    return part_model(config.decoder, config.seed, sizes, compute, master)


def encoder_model(config: Settings, sizes: EncoderConfig, compute: Compute, master: tuple[str, ...]) -> Encoder:
    return part_model(config.encoder, config.seed, sizes, compute, master)


def encoder_after_decoder(config: Settings, sizes: EncoderConfig, compute: Compute, master: tuple[str, ...]) -> Encoder:
    preset(ENCODERS, config.encoder)
    return born_sharded(
        lambda key, decoder: encoder_from_decoder(decoder, sizes, compute, key=key),
        jax.random.key(config.seed),
        load(config.decoder),
    )


def cepe_config(config: Settings, vocab_size: int | None) -> CepeConfig:
    sizes = open_model(config.cepe).config
    if type(sizes) is not CepeConfig:
        raise ValueError(f"cepe {config.cepe} has a {type(sizes).__name__}: give the directory of a CEPE")
    return sizes


def cepe_model(config: Settings, sizes: CepeConfig, compute: Compute, master: tuple[str, ...]) -> Cepe:
    return load(config.cepe, compute, master)


def spliced_model(config: Settings, sizes: CepeConfig, compute: Compute, master: tuple[str, ...]) -> Cepe:
    decoder = load(config.decoder, compute, tuple({"decoder", "decoder_lora"} & set(master)), sizes.decoder)
    encoder = part_model(
        config.encoder, config.seed, sizes.encoder, compute, tuple({"encoder", "encoder_lora"} & set(master))
    )
    layers, init = config.cross_layers, config.cross_init
    cross = born_sharded(
        lambda key, decoder: cross_from_self_attention(decoder, sizes.encoder, layers, init, key=key),
        jax.random.key(config.seed),
        decoder,
    )
    return Cepe(decoder, encoder, cross)


def reward_start(config: Settings) -> str:
    """Return the directory from which a reward model starts."""
    return config.cepe or config.decoder


def reward_config(config: Settings, vocab_size: int | None) -> RewardConfig | ContextRewardConfig:
    """Return the config of a reward model: the directory's, or that of a head on its decoder or CEPE."""
    where, wanted = (
        reward_start(config),
        (CepeConfig, ContextRewardConfig) if config.cepe else (DecoderConfig, RewardConfig),
    )
    sizes = decoder_config(config, vocab_size) if not Path(where).exists() else open_model(where).config
    if type(sizes) not in wanted:
        raise ValueError(f"{where} has a {type(sizes).__name__}: give a {' or a '.join(k.__name__ for k in wanted)}")
    if type(sizes) is DecoderConfig:
        return RewardConfig(with_rope(sizes, config))
    if type(sizes) is RewardConfig:
        return RewardConfig(with_rope(sizes.decoder, config))
    return ContextRewardConfig(**vars(sizes)) if type(sizes) is CepeConfig else sizes


def reward_model(config: Settings, sizes: Config, compute: Compute, master: tuple[str, ...]) -> Reward:
    where, key = reward_start(config), jax.random.key(config.seed)
    if not Path(where).exists() or type(open_model(where).config) is type(sizes):
        return part_model(where, config.seed, sizes, compute, master)
    base = CepeConfig(**vars(sizes)) if config.cepe else sizes.decoder
    model = load(where, compute, tuple(name for name in master if name != "head"), base)
    return Reward(model, born_sharded(lambda key: RewardHead(sizes.decoder.width, key=key), key))


OWN_PARTS = ("encoder", "cross"), ("decoder",)  # of a CEPE: those that train where nothing is said, and the rest
ROPE = ("rope_theta",)
DECODER = Start(("decoder",), decoder_config, decoder_model, ("decoder",), settings=ROPE)
ENCODER = Start(("encoder",), masked_config, encoder_model, ("encoder",))
ENCODER_AFTER_DECODER = Start(("decoder", "encoder"), masked_like_decoder, encoder_after_decoder, ("encoder",))
CEPE = Start(("cepe",), cepe_config, cepe_model, *OWN_PARTS)
SPLICED = Start(
    ("decoder", "encoder"),
    spliced_config,
    spliced_model,
    *OWN_PARTS,
    ("cross_layers", "cross_init", "chunk_positions", *ROPE),
)


REWARD = Start(("decoder",), reward_config, reward_model, ("decoder", "head"), settings=ROPE)
CONTEXT_REWARD = Start(("cepe",), reward_config, reward_model, ("encoder", "cross", "head"), ("decoder",))


def next_token_loss(config: Settings) -> NextToken:
    return NextToken(config.loss_chunk)


def lm_flops(config: Settings, sizes: DecoderConfig, sources: Sequence[Sequences]) -> Flops:
    return decoder_flops(sizes, config.examples.window, config.train)


def mlm_flops(config: Settings, sizes: EncoderConfig, sources: Sequence[Sequences]) -> Flops:
    return encoder_flops(sizes, 1, config.examples.window, config.train)


def context_flops(config: Settings, sizes: CepeConfig, sources: Sequence[Sequences]) -> Flops:
    examples = config.examples
    return cepe_flops(sizes, examples.window, examples.num_chunks, examples.chunk_length, config.train)


def distill_flops(config: Settings, sizes: CepeConfig, sources: Sequence[Sequences]) -> Flops:
    """Return those of the student, and of its teacher unless all sources have a teacher's probabilities."""
    flops, examples = context_flops(config, sizes, sources), config.examples
    if sources and all(source.joined for source in sources):
        return flops
    teacher = teacher_flops(sizes.decoder, examples.window, examples.span - examples.window)
    return dataclasses.replace(flops, ahead=flops.ahead + teacher)


def conversation_flops(config: Settings, sizes: Config, sources: Sequence[Sequences]) -> Flops:
    """Return those of a whole window, however many texts share it: attention to other texts is masked, not left out."""
    return (context_flops if isinstance(sizes, CepeConfig) else lm_flops)(config, sizes, sources)


def whole_conversations(config: Settings) -> WholeConversations:
    return WholeConversations(config.examples, reads_documents=bool(config.cepe or config.encoder))


def pair_flops(config: Settings, sizes: Config, sources: Sequence[Sequences]) -> Flops:
    """Return those of both texts of a pair, which read one context; of a reward model with a head of one number."""
    if isinstance(sizes, RewardConfig | ContextRewardConfig):
        decoder = dataclasses.replace(sizes.decoder, vocab_size=1)
        if isinstance(sizes, RewardConfig):
            return decoder_flops(decoder, config.examples.window, config.train).times(2)
        sizes = CepeConfig(decoder, sizes.encoder, sizes.cross_layers)
    if isinstance(sizes, DecoderConfig):
        return lm_flops(config, sizes, sources).times(2)
    examples = config.examples
    return cepe_flops(sizes, examples.window, examples.num_chunks, examples.chunk_length, config.train, windows=2)


def dpo_flops(config: Settings, sizes: Config, sources: Sequence[Sequences]) -> Flops:
    """Return those of a pair, and of the reference unless all sources have its log-probabilities."""
    flops = pair_flops(config, sizes, sources)
    if sources and all(source.joined for source in sources):
        return flops
    plain = pair_flops(config, without_lora(sizes), sources)
    return dataclasses.replace(flops, ahead=flops.ahead + plain.forward)


def pairs_of_answers(config: Settings) -> PairsOfAnswers:
    return PairsOfAnswers(config.examples, reads_documents=bool(config.cepe))


def check_reference(config: Settings, data: Place, sources: Sequence[Sequences]) -> None:
    """Raise ValueError unless all datasets have a reference's log-probabilities, or the model without factors is it."""
    if all(source.joined for source in sources):
        log.info("reference of %s: log-probabilities in it", data)
        return
    if any(source.joined for source in sources):
        raise ValueError(f"{data}: a part of mix holds a reference's log-probabilities: give all of it one, or none")
    start = config.cepe or config.decoder
    prepare = "or prepare its log-probabilities with prepare_data.py reference"
    if others := [name for name in config.train if not name.endswith("_lora")]:
        raise ValueError(f"{data}: {', '.join(others)} is part of the reference: train decoder_lora alone, {prepare}")
    if without_lora(own := open_model(start).config) != own:
        raise ValueError(f"{start} has factors, and the reference would have none: merge them (convert.py), {prepare}")
    log.info("reference of %s: the model without factors", data)


def check_teacher(config: Settings, data: Place, sources: Sequence[Sequences]) -> None:
    """Raise ValueError if the datasets have another teacher than the loss reads, or the decoder cannot be the teacher.

    The teacher's probabilities are in the datasets, or else the decoder that the stage starts from computes them.
    """
    for source in sources:
        if source.joined and (top_k := source.joined.fact("top_k")) != config.distill.top_k:
            raise ValueError(
                f"{source.joined.path} has {top_k} tokens a position and distill.top_k is {config.distill.top_k}: set "
                f"the one, or make the other again"
            )
    if all(source.joined for source in sources):
        log.info("teacher of %s: probabilities in it", data)
        return
    if any(source.joined for source in sources):
        raise ValueError(f"{data}: a part of mix holds a teacher's probabilities: give all of it one, or none")
    if not {"decoder", "decoder_lora"}.isdisjoint(config.train):
        raise ValueError(
            f"{data}: the decoder is the teacher and cannot train: leave it out, or prepare a teacher's data"
        )
    if not config.rope_theta:
        check_positions(open_model(config.cepe or config.decoder), config.examples.span)
    log.info("teacher of %s: the frozen decoder", data)


STAGES = {
    # A decoder, from scratch or further.
    "lm": Stage((DECODER,), lambda config: Windows(config.examples), next_token_loss, lm_flops),
    # The encoder (paper, section 3.2).
    "mlm": Stage(
        (ENCODER, ENCODER_AFTER_DECODER),
        lambda config: MaskedWindows(config.examples),
        lambda config: MaskedLM(config.loss_chunk),
        mlm_flops,
        more_ids=1,
    ),
    # CEPE learns to copy (paper, section 3.2), then to use contexts.
    "warmup": Stage((CEPE, SPLICED), lambda config: DuplicatedWindows(config.examples), next_token_loss, context_flops),
    "cepe": Stage((CEPE, SPLICED), lambda config: WindowsInContext(config.examples), next_token_loss, context_flops),
    # CEPED (paper, section 3.3).
    "ceped": Stage(
        (CEPE, SPLICED),
        lambda config: TaughtWindows(config.examples),
        lambda config: Distill(config.distill, config.loss_chunk),
        distill_flops,
        settings=("distill",),
        check=check_teacher,
    ),
    # Conversations: a decoder's, or a CEPE's with their documents as contexts.
    "sft": Stage((DECODER, CEPE, SPLICED), whole_conversations, next_token_loss, conversation_flops),
    # Pairs of answers: scores under a context (arXiv 2407.14916), and answers that are preferred.
    "reward": Stage((REWARD, CONTEXT_REWARD), pairs_of_answers, lambda config: BradleyTerry(), pair_flops),
    "dpo": Stage(
        (DECODER, CEPE),
        pairs_of_answers,
        lambda config: Dpo(config.beta, config.loss_chunk),
        dpo_flops,
        settings=("beta",),
        check=check_reference,
    ),
}
