"""A stage of training as one configuration, and what follows from it alone: mesh, sizes, objective, FLOPs."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from etils import epath

from cepe_jax.config import (
    DECODERS,
    ENCODERS,
    Backend,
    CepeConfig,
    Compute,
    CrossLayers,
    DecoderConfig,
    Dtype,
    EncoderConfig,
    RematConfig,
    preset,
)
from cepe_jax.cost import Flops, cepe_flops, decoder_flops, encoder_flops, teacher_flops
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import Stage
from cepe_jax.distributed import DistributedConfig
from cepe_jax.model.attention import native_backend
from cepe_jax.model.cepe import CrossInit
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.objectives import Distill, DistillConfig, MaskedLM, NextToken
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.trainer import Run
from cepe_jax.weights.huggingface import read_config
from cepe_jax.weights.tensors import Config


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = 1  # copies of the model
    fsdp: int = 0  # devices over which each copy is cut; 0 = all that the others leave
    tensor: int = 1  # devices that share a sequence, by heads

    def __post_init__(self):
        if min(self.data, self.tensor) < 1 or self.fsdp < 0:
            raise ValueError(f"{self}: give numbers of devices above 0")

    def over(self, devices: int) -> "MeshConfig":
        """This mesh with a number for `fsdp`: all that the other axes leave of `devices`, if it has none."""
        fsdp = self.fsdp or max(devices // (self.data * self.tensor), 1)
        return dataclasses.replace(self, fsdp=fsdp)


@dataclass(frozen=True)
class TrainConfig:
    stage: Stage  # lm: a decoder from scratch; mlm: an encoder; warmup, cepe and ceped: as in the paper
    data: Path  # a dataset of sequences, or the directory of those that `mix` names
    out: epath.Path  # gets checkpoints/, metrics.jsonl, config.json, and at the end model/
    steps: int  # optimiser steps of the whole run
    batch_size: int  # sequences of a step
    decoder: str = ""  # a preset (lm) or a model directory; mlm: the encoder starts from its first layers
    encoder: str = ""  # a preset, which starts at random, or a model directory
    cepe: str = ""  # a model directory, in place of decoder and encoder
    cross_layers: CrossLayers = CrossLayers()  # layers of the decoder that read the memory
    cross_init: CrossInit = "copy"  # start of cross-attention's output: self-attention's (copy), zero, or random
    chunk_positions: int = 0  # distinct positions of chunks, counted from the last one; 0 = chunks have none
    train: tuple[str, ...] = ("encoder", "cross")  # parts that train in warmup, cepe and ceped: encoder, cross, decoder
    mix: dict[str, float] = field(default_factory=dict)  # weight of each dataset below `data`; {}: `data` is one
    workers: int = 0  # processes that load data; 0 = threads of this one
    examples: ExampleConfig = ExampleConfig()  # how sequences become examples
    distill: DistillConfig | None = None  # loss of stage ceped, which needs it
    optimizer: OptimizerConfig = OptimizerConfig()  # the optimiser and its schedule
    micro_batch: int = 0  # sequences that a device (or those of one `mesh.tensor`) computes at once; 0 = all it has
    loss_chunk: int = 0  # positions whose logits exist at once; 0 = all
    mlp_chunk: int = 0  # positions whose MLP activations exist at once; 0 = all
    dtype: Dtype = "float32"  # type of activations and frozen weights; weights that train are float32
    attention: Backend | Literal["auto"] = "auto"  # splash: TPU; cudnn: GPU with bfloat16; auto: the platform's own
    remat: RematConfig = RematConfig()  # what the backward pass recomputes to save memory
    mesh: MeshConfig = MeshConfig()  # how devices share the model and the batch
    distributed: DistributedConfig = DistributedConfig()  # how the processes of a run find each other
    save_every: int = 500  # steps between checkpoints
    log_every: int = 10  # steps between entries of the log
    evaluation: EvalConfig = EvalConfig()  # loss on sequences that are held out
    profile: tuple[int, ...] = ()  # first and last step to trace into out/profile/; []: none
    dry_run: bool = False  # print what the run will be and end; nothing is loaded or written
    seed: int = 0  # draws the weights and the order of the data

    def __post_init__(self):
        needs = {"lm": [["decoder"]], "mlm": [["encoder"], ["decoder", "encoder"]]}.get(
            self.stage, [["cepe"], ["decoder", "encoder"]]
        )
        given = [name for name in ("decoder", "encoder", "cepe") if getattr(self, name)]
        if given not in needs:
            wanted = " or ".join(" and ".join(names) for names in needs)
            raise ValueError(f"stage {self.stage} starts from {wanted}; given: {' and '.join(given) or 'none of them'}")
        if needs == [["cepe"], ["decoder", "encoder"]] and not self.train:
            raise ValueError("train is empty: name encoder, cross or decoder")
        if given != ["decoder", "encoder"] or self.stage == "mlm":
            for name in ("cross_layers", "cross_init", "chunk_positions"):
                if getattr(self, name) != TrainConfig.__dataclass_fields__[name].default:
                    raise ValueError(f"{name} is for a start from decoder and encoder: leave it out")
        if (self.distill is not None) != (self.stage == "ceped"):
            raise ValueError(f"stage is {self.stage}: distill is the loss of stage ceped, give both or neither")
        if self.stage == "ceped" and self.examples.foreign_rate:
            raise ValueError("foreign_rate is not for stage ceped: its teacher reads what stands before the window")
        if any(weight <= 0 for weight in self.mix.values()):
            raise ValueError(f"mix is {self.mix}: give weights above 0")
        for name in ("micro_batch", "loss_chunk", "mlp_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number, or 0 for all")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give a number of processes, or 0 for threads")
        run_of(self)


def run_of(config: TrainConfig) -> Run:
    return Run(config.out, config.steps, config.save_every, config.log_every, config.evaluation.every, config.profile)


def mesh_of(config: TrainConfig, devices: int) -> MeshConfig:
    """The mesh over all devices; ValueError where they do not divide, or the batch does not over them."""
    mesh = config.mesh.over(devices)
    micro_batches(config, mesh.data * mesh.fsdp)
    return mesh


def micro_batches(config: TrainConfig, shares: int) -> int:
    """Into how many micro-batches a step's batch falls, where it is cut into `shares`."""
    rows = shares * (config.micro_batch or 1)
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of mesh.data x mesh.fsdp x micro_batch = {rows}: "
            f"change one of them"
        )
    return config.batch_size // rows if config.micro_batch else 1


def compute_of(config: TrainConfig, platform: str) -> Compute:
    """Return how the run computes on this platform of JAX's, whose own attention takes the place of `auto`."""
    attention = native_backend(platform, config.dtype) if config.attention == "auto" else config.attention
    return Compute(config.dtype, attention, config.remat, config.mlp_chunk)


def sizes_of(config: TrainConfig, vocab_size: int | None = None) -> Config:
    """The config of the stage's model, nothing loaded.

    `vocab_size` is the tokenizer's. Without it a preset of a decoder has its own, and one of an encoder its decoder's.
    """

    def part(name: str, presets: dict, vocab_size: int | None):
        start = getattr(config, name)
        if Path(start).is_dir():
            return read_config(start)
        sizes = preset(presets, start)
        return sizes if vocab_size is None else dataclasses.replace(sizes, vocab_size=vocab_size)

    if config.cepe:
        return read_config(config.cepe)
    decoder = part("decoder", DECODERS, vocab_size) if config.decoder else None
    if config.stage == "lm":
        return decoder
    ids = vocab_size or (decoder and decoder.vocab_size)
    encoder = part("encoder", ENCODERS, ids and ids + 1)
    if config.stage == "mlm":
        return dataclasses.replace(encoder, mlm_head=True)
    return CepeConfig(decoder, of_a_cepe(encoder, config), config.cross_layers)


def of_a_cepe(encoder: EncoderConfig, config: TrainConfig) -> EncoderConfig:
    """Return the config of the encoder in the CEPE that a run builds from it."""
    return dataclasses.replace(encoder, mlm_head=False, chunk_positions=config.chunk_positions)


def trained_parts(config: TrainConfig) -> tuple[str, ...]:
    return {"lm": ("decoder",), "mlm": ("encoder",)}.get(config.stage, config.train)


def flops_of(config: TrainConfig, sizes: Config, taught: bool = False) -> Flops:
    """Of one sequence of the stage. `taught`: a teacher's probabilities are in the data."""
    shape = config.examples.window, config.examples.num_chunks, config.examples.chunk_length
    match sizes:
        case DecoderConfig():
            return decoder_flops(sizes, config.examples.window)
        case EncoderConfig():
            return encoder_flops(sizes, 1, config.examples.window)
    flops = cepe_flops(sizes, *shape, config.train)
    if config.stage != "ceped" or taught:
        return flops
    return dataclasses.replace(flops, ahead=flops.ahead + teacher_flops(sizes.decoder, shape[0], shape[1] * shape[2]))


def objective_of(config: TrainConfig) -> NextToken | MaskedLM | Distill:
    match config.stage:
        case "mlm":
            return MaskedLM(config.loss_chunk)
        case "ceped":
            return Distill(**vars(config.distill), loss_chunk=config.loss_chunk)
    return NextToken(config.loss_chunk)


def tokens_of_step(config: TrainConfig) -> int:
    """Tokens of the data that a step reads: windows, and the contexts before them.

    A warm-up's context is its window once more, and not counted, as in the paper.
    """
    examples = config.examples
    return config.batch_size * (examples.span if config.stage in ("cepe", "ceped") else examples.window)


def run_identity(resolved: dict) -> dict:
    """What two configurations must share for one to go on where the other stopped: all but places and pace.

    The contents of the places are compared instead. Pace may change the last bits of what follows, as another number
    of devices does; it is what lets a run go on where there are others.
    """
    places = {"data", "decoder", "encoder", "cepe", "out"}
    pace = {
        "save_every",
        "log_every",
        "evaluation",
        "profile",
        "dry_run",
        "mesh",
        "micro_batch",
        "loss_chunk",
        "mlp_chunk",
        "remat",
        "attention",
        "distributed",
        "workers",
    }
    return {key: value for key, value in resolved.items() if key not in places | pace}
