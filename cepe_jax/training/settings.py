"""The settings of a run of training, and what follows from them alone: mesh, model, examples, identity."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from etils import epath

from cepe_jax.config import Backend, Chunk, Compute, CrossLayers, Dtype, LoraConfig, RematConfig, check_chunk, with_lora
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.recipes import PairsOfAnswers, Recipe
from cepe_jax.distributed import DistributedConfig
from cepe_jax.model.backends import native_backend
from cepe_jax.model.cepe import CrossInit
from cepe_jax.model.kernels import check_window
from cepe_jax.parsing import Seed
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.stages import STAGES, Start
from cepe_jax.training.trainer import Run
from cepe_jax.weights.checkpoint import KEPT
from cepe_jax.weights.kinds import Config


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = 1  # copies of the model
    fsdp: int = 0  # devices over which each copy is cut; 0 = all that the others leave
    context: int = 1  # devices that share a sequence, by its tokens, and cut the copy as well: of a plain decoder alone
    tensor: int = 1  # devices that share a sequence, by heads

    def __post_init__(self):
        if min(self.data, self.context, self.tensor) < 1 or self.fsdp < 0:
            raise ValueError(f"{self}: give numbers of devices above 0")

    def over(self, devices: int) -> "MeshConfig":
        """This mesh with a number for `fsdp`: all that the other axes leave of `devices`, if it has none."""
        fsdp = self.fsdp or max(devices // (self.data * self.context * self.tensor), 1)
        return dataclasses.replace(self, fsdp=fsdp)


@dataclass(frozen=True)
class TrainConfig:
    stage: Literal[*STAGES]  # lm: a decoder; mlm: an encoder; warmup, cepe, ceped: as in the paper; sft, reward, dpo
    data: epath.Path  # a dataset of sequences, or the directory of those that `mix` names
    out: epath.Path  # gets checkpoints/, metrics.jsonl, config.json, and at the end model/
    steps: int  # optimiser steps of the whole run
    batch_size: int  # sequences of a step
    decoder: str = ""  # a preset or a model directory; mlm: the encoder starts from its first layers
    encoder: str = ""  # a preset, which starts at random, or a model directory
    cepe: str = ""  # a model directory, in place of decoder and encoder
    rope_theta: float = 0.0  # base of the decoder's RoPE, in place of its own and its scaling; 0 = the decoder's own
    cross_layers: CrossLayers = CrossLayers()  # layers of the decoder that read the memory
    cross_init: CrossInit = "copy"  # start of cross-attention's output: self-attention's (copy), zero, or random
    chunk_positions: int = 0  # distinct positions of chunks, counted from the last one; 0 = chunks have none
    train: tuple[str, ...] = ()  # parts: encoder, cross, decoder, head, decoder_lora, encoder_lora; []: the stage's own
    lora: LoraConfig | None = None  # the factors of decoder_lora and encoder_lora, where the model has none yet
    mix: dict[str, float] = field(default_factory=dict)  # weight of each dataset below `data`; {}: `data` is one
    mix_by: Literal["weight", "size"] = "weight"  # size: a pass over all has each record as often as its weight
    workers: int = 0  # processes that load data; 0 = threads of this one
    examples: ExampleConfig = ExampleConfig()  # how sequences become examples
    distill: DistillConfig | None = None  # loss of stage ceped, which needs it
    beta: float = 0.1  # how much a preference may move stage dpo's model from its reference: more if it is less
    optimizer: OptimizerConfig = OptimizerConfig()  # the optimiser and its schedule
    micro_batch: int = 0  # sequences that a device (or those that share a sequence) computes at once; 0 = all it has
    loss_chunk: Chunk = 0  # positions whose logits exist on a device at once; 0 = all; auto: by their size
    mlp_chunk: Chunk = 0  # positions whose MLP activations exist on a device at once; 0 = all; auto: by their size
    dtype: Dtype = "float32"  # type of activations and frozen weights; weights that train are float32
    attention: Backend | Literal["auto"] = "auto"  # splash: TPU; cudnn: GPU with bfloat16; auto: the platform's own
    remat: RematConfig = RematConfig()  # what the backward pass recomputes to save memory
    mesh: MeshConfig = MeshConfig()  # how devices share the model and the batch
    distributed: DistributedConfig = DistributedConfig()  # how the processes of a run find each other
    save_every: int = 500  # steps between checkpoints
    keep: int = KEPT  # checkpoints that stay, the newest; 0 = all
    log_every: int = 10  # steps between entries of the log
    evaluation: EvalConfig = EvalConfig()  # loss on sequences that are held out
    profile: tuple[int, ...] = ()  # first and last step to trace into out/profile/; []: none
    dry_run: bool = False  # print what the run will be and end; nothing is loaded or written
    seed: Seed = 0  # draws the weights and the order of the data

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage}: choose one of {', '.join(STAGES)}")
        stage, given = STAGES[self.stage], models_given(self)
        if given not in [start.models for start in stage.starts]:
            wanted = " or ".join(" and ".join(start.models) for start in stage.starts)
            raise ValueError(f"stage {self.stage} starts from {wanted}; given: {' and '.join(given) or 'none of them'}")
        start = start_of(self)
        object.__setattr__(self, "train", self.train or start.trains)
        if unknown := sorted(set(self.train) - set(known := may_train(start))):
            raise ValueError(f"train names {', '.join(unknown)}: stage {self.stage} may train {', '.join(known)}")
        if self.lora and not any(name.endswith("_lora") for name in self.train):
            raise ValueError("lora is given and train names no factors: add decoder_lora or encoder_lora to train")
        readers = [reader for of_table in STAGES.values() for reader in (of_table, *of_table.starts)]
        read = stage.settings + start.settings
        for name in sorted({name for reader in readers for name in reader.settings}):
            if name not in read and getattr(self, name) != TrainConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is not read in stage {self.stage} from {' and '.join(given)}: leave it out")
            if name in read and getattr(self, name) is None:
                raise ValueError(f"stage {self.stage} needs {name}: give it")
        recipe_of(self)
        if (parts := self.mesh.context) > 1:
            if given != ("decoder",):
                raise ValueError(
                    f"mesh.context is {parts}: it cuts the window of a plain decoder, and stage {self.stage} starts "
                    f"from {' and '.join(given)}: leave it out"
                )
            if self.examples.window % (2 * parts):
                raise ValueError(
                    f"examples.window {self.examples.window} is not a multiple of 2 x mesh.context = {2 * parts}: "
                    f"change one of them"
                )
        if not all(0 < weight < math.inf for weight in self.mix.values()):
            raise ValueError(f"mix is {self.mix}: give weights above 0")
        if self.mix_by == "size" and not (self.mix and all(weight == int(weight) for weight in self.mix.values())):
            raise ValueError(
                f"mix is {self.mix} by size: give whole numbers, how often a pass has each record of a part"
            )
        if self.rope_theta and not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}: give a number above 1, or 0 for the decoder's own")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch is {self.micro_batch}: give a number, or 0 for all")
        for name in ("loss_chunk", "mlp_chunk"):
            check_chunk(name, getattr(self, name))
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}: give a number above 0")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give a number of processes, or 0 for threads")
        if self.keep < 0:
            raise ValueError(f"keep is {self.keep}: give a number of checkpoints, or 0 for all")
        run_of(self)


def run_of(config: TrainConfig) -> Run:
    return Run(config.out, config.steps, config.save_every, config.log_every, config.evaluation.every, config.profile)


def mesh_of(config: TrainConfig, devices: int) -> MeshConfig:
    """Return the mesh over all devices; ValueError if they do not divide, or the batch does not over them."""
    mesh = config.mesh.over(devices)
    micro_batches(config, mesh.data * mesh.fsdp)
    return mesh


def micro_batches(config: TrainConfig, shares: int) -> int:
    """Return the number of micro-batches of a step's batch, if it is cut into `shares`."""
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


def check_attention(config: TrainConfig, attention: Backend) -> None:
    """Raise ValueError if `attention` cannot read the run's windows on its mesh."""
    if attention == "splash":
        check_window(config.examples.window, config.mesh.context)


def models_given(config: TrainConfig) -> tuple[str, ...]:
    """Return the settings that name models and have a value."""
    return tuple(name for name in ("decoder", "encoder", "cepe") if getattr(config, name))


def start_of(config: TrainConfig) -> Start:
    return next(start for start in STAGES[config.stage].starts if start.models == models_given(config))


def sizes_of(config: TrainConfig, vocab_size: int | None = None) -> Config:
    """Return the config of the run's model; no weight is read.

    `vocab_size` is the tokenizer's. Without it a preset of a decoder has its own, and one of an encoder its decoder's.
    """
    sizes = start_of(config).config(config, vocab_size)
    for name in config.train:
        if name.endswith("_lora"):
            sizes = with_lora(sizes, name.removesuffix("_lora"), config.lora)
    return sizes


def may_train(start: Start) -> list[str]:
    """Return the parts that may train from such a start."""
    own = [*start.trains, *start.frozen]
    return own + [f"{part}_lora" for part in own if part in ("decoder", "encoder")]


def recipe_of(config: TrainConfig) -> Recipe:
    return STAGES[config.stage].recipe(config)


def trained_length(config: TrainConfig) -> int:
    """Return how many tokens the decoder is trained to read by a run that gives it another RoPE; 0 without one."""
    return config.examples.window if config.rope_theta else 0


def tokens_of_step(config: TrainConfig) -> int:
    """Return how many tokens of the data a step reads: windows, and the contexts before them.

    A warm-up's context is its window once more, and not counted, as in the paper. A pair is two windows.
    """
    recipe = recipe_of(config)
    return config.batch_size * recipe.size(None) * (2 if isinstance(recipe, PairsOfAnswers) else 1)


def run_identity(resolved: dict) -> dict:
    """Return the settings that two runs must share for one to go on where the other stopped: all but places and pace.

    The contents of the places are compared instead. Pace may change the last bits of what follows, as another number
    of devices does; it is what lets a run go on where there are others.
    """
    places = {"data", "decoder", "encoder", "cepe", "out"}
    pace = {
        "save_every",
        "keep",
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
