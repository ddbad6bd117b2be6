"""Steps compiled ahead of time for devices that are not at hand, and the contents of their programs: memory,
collectives, limits. Nothing here touches an accelerator or reads a weight.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cepe_jax.benchmarks.hlo import collectives, cudnn_workspaces
from cepe_jax.benchmarks.topologies import Topology, topology_of
from cepe_jax.config import Compute
from cepe_jax.cost import gib
from cepe_jax.data.recipes import blank
from cepe_jax.directories import write_json
from cepe_jax.identity import as_json
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.model.layers import fits_a_chunk
from cepe_jax.sharding import batch_axes, is_variable, make_mesh, partition_spec, shardings_of
from cepe_jax.training.objectives import chunk_of_logits
from cepe_jax.training.settings import (
    TrainConfig,
    compute_of,
    mesh_of,
    micro_batches,
    recipe_of,
    sizes_of,
)
from cepe_jax.training.stages import STAGES
from cepe_jax.training.trainer import initial_state, make_train_step
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.kinds import Config, kind_of


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(TrainConfig):
    """A stage of training by its shapes alone: no data are read, and sizes are the paper's unless a model is named."""

    data: Path = Path("none")  # not read
    decoder: str = ""  # a preset or a model directory; "": llama2_7b if the stage needs a decoder
    encoder: str = ""  # a preset or a model directory; "": mlm_large if the stage needs an encoder

    def __post_init__(self):
        paper = {"decoder": "llama2_7b", "encoder": "mlm_large"}
        both = () if self.cepe else ("decoder", "encoder")
        needed = {"mlm": ("encoder",)} | dict.fromkeys(("lm", "sft", "reward", "dpo"), ("decoder",))
        for name in both and needed.get(self.stage, both):
            object.__setattr__(self, name, getattr(self, name) or paper[name])
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CompileConfig(ShapesConfig):
    """A step of a model, to be compiled for devices that are not at hand."""

    topology: str  # TPUs, as their compiler names them: v5e:4x4, v4:4x4x4; GPUs as hosts x GPUs of a host: h100:1x8
    step: Literal["train", "encode", "prefill", "decode"] = "train"  # a step of training, or one of inference
    batch: int = 0  # sequences; 0 = batch_size to train, one for the devices that share a sequence to infer
    cache: CacheConfig = CacheConfig()  # what the decoder of prefill and decode keeps of a window of tokens
    memory: int = 1  # devices over which a memory is cut; more than 1 to infer alone
    out: Path = Path("out/compile")  # gets a JSON file for each step

    def __post_init__(self):
        super().__post_init__()
        if self.memory < 1 or (self.memory > 1 and self.step == "train"):
            raise ValueError(f"memory is {self.memory} and step {self.step}: give 1 to train, 1 or more to infer")
        if self.mesh.context > 1 and self.step != "train":
            raise ValueError(f"mesh.context is {self.mesh.context} and step {self.step}: it cuts windows of training")
        if self.cache != CacheConfig() and self.step not in ("prefill", "decode"):
            raise ValueError(f"cache.kind is {self.cache.kind}, and step {self.step} has no cache: leave cache out")


@dataclass(frozen=True)
class Step:
    """A jitted function, its arguments by shape and place, and the FLOPs that its formula gives it."""

    function: Callable
    arguments: tuple
    model_flops: float
    done_flops: float  # with what the backward pass recomputes, where that is all


Make = Callable[[TrainConfig, Config, Compute], Step]


def compile_step(config: CompileConfig, make: Make) -> dict:
    """Compile the step that `make` gives and return bytes a chip, collectives, and the time they allow.

    The result is in `config.out` as JSON too. If a chip's memory does not hold the step, it says so: see `check_fits`.
    """
    topology = topology_of(config.topology)
    devices, chip = topology.devices, topology.chip
    batch = config.batch
    if not batch and config.step != "train":
        batch = max(len(devices) // config.mesh.tensor // config.memory, 1)
    config = dataclasses.replace(config, batch_size=batch or config.batch_size)
    shares = dataclasses.asdict(mesh_of(config, len(devices) // config.memory)) | {"memory": config.memory}
    sizes, compute = sizes_of(config), compute_of(config, topology.platform)
    kind = [] if config.cache == CacheConfig() else [config.cache.kind]
    result = {
        "topology": config.topology,
        "chips": len(devices),
        "step": "_".join([config.stage, *([config.step] if config.step != "train" else []), *kind]),
        "batch": config.batch_size,
        "mesh": shares,
        "config": as_json(config),
    }
    begun = time.monotonic()
    with jax.set_mesh(make_mesh(**shares, devices=devices)):
        step = make(config, sizes, compute)
        try:
            compiled = step.function.lower(*step.arguments).compile(compiler_options=topology.options)
            memory = memory_of(compiled)
        except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses what does not fit
            compiled, memory = None, {"peak": bytes_needed(str(error))}
    result |= {"fits": memory["peak"] <= chip.hbm, "compile_seconds": time.monotonic() - begun}
    result["memory"] = memory | {"hbm": chip.hbm}
    if compiled is not None:
        program = compiled.as_text()
        result["collectives"] = collectives(program)
        result["cudnn_workspaces"] = cudnn_workspaces(program)
        result |= roofline(step, result, topology)
    config.out.mkdir(parents=True, exist_ok=True)
    mesh = "x".join(str(size) for size in result["mesh"].values())
    name = f"{result['step']}_{config.topology.replace(':', '_')}_{mesh}_{config.batch_size}.json"
    write_json(config.out / name, result)
    return result


def check_fits(result: dict) -> None:
    """ValueError if a chip's memory does not hold the step."""
    if not result["fits"]:
        raise ValueError(
            f"{result['step']} on {result['topology']} needs {gib(result['memory']['peak'])} a chip and there are "
            f"{gib(result['memory']['hbm'])}: take more chips, a larger mesh.tensor, a smaller micro_batch or batch, "
            f"remat, loss_chunk or mlp_chunk"
        )


def placed(tree, dtype=None):
    """The tree with a shape, a dtype (`dtype` for each Variable, where given) and its place for each array."""
    mesh = jax.sharding.get_mesh()

    def place(leaf, sharding):
        if is_variable(leaf):
            return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings_of(tree, mesh), is_leaf=is_variable)


def placed_batch(batch: dict, rows: int) -> dict:
    """`rows` examples like the one in `batch`, by shape and place."""
    mesh = jax.sharding.get_mesh()

    def place(x):
        x = jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec(batch_axes(x))))

    return jax.tree.map(place, batch)


def train_step(config: TrainConfig, sizes: Config, compute: Compute) -> Step:
    """The step of training, under the mesh of the moment."""
    mesh = jax.sharding.get_mesh()
    shares = mesh_of(config, mesh.size)
    optimizer = config.optimizer.build(config.optimizer.schedule(config.steps))
    parts, trains = abstract_parts(sizes, compute), config.train
    frozen = {name: placed(part, jnp.dtype(config.dtype)) for name, part in parts.items() if name not in trains}
    trainable = {name: part for name, part in parts.items() if name in trains}
    state = jax.eval_shape(lambda trainable: initial_state(trainable, optimizer), trainable)
    stage, model, accumulate = (
        STAGES[config.stage],
        kind_of(sizes).model,
        micro_batches(config, shares.data * shares.fsdp),
    )
    function = make_train_step(stage.objective(config), optimizer, model, accumulate)
    batch = placed_batch(blank(recipe_of(config)), config.batch_size)
    flops = stage.flops(config, sizes, ())
    stacks = {"decoder", "encoder"} & parts.keys()
    vocabulary, window = getattr(sizes, "decoder", sizes).vocab_size, config.examples.window
    rows = jax.ShapeDtypeStruct((config.batch_size // accumulate, window, 1), compute.dtype)
    in_chunks = not fits_a_chunk(chunk_of_logits(config.loss_chunk, rows, vocabulary), window)
    everything = in_chunks and {getattr(config.remat, name) for name in stacks} <= {"full", "offload"}
    again = flops.forward - flops.ahead if everything else 0  # at least
    done = config.batch_size * (flops.train + again)
    return Step(function, (placed(state), frozen, batch), config.batch_size * flops.train, done)


def table(result: dict) -> str:
    """The result in lines for people."""
    memory = {name: gib(size) for name, size in result["memory"].items()}
    shares = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    seconds = ", ".join(f"{what} {time:.3g} s" for what, time in result["seconds_at_least"].items())
    spaces = result["cudnn_workspaces"]
    moved = [f"{k} {v['bytes'] / 1e9:.2f} GB in {v['number']:,}" for k, v in result["collectives"].items()]
    return "\n".join(
        (
            f"{result['step']}, {result['batch']} sequences, {result['topology']}: {result['chips']} chips, {shares}",
            f"a chip: {memory.pop('peak')} of {memory.pop('hbm')} ({', '.join(f'{k} {v}' for k, v in memory.items())})",
            f"collectives of a chip and step: {'; '.join(moved) or 'none'}",
            *([f"cuDNN's calls: {len(spaces)}, workspaces up to {max(spaces):,} bytes"] if spaces else []),
            f"{result['model_flops']:.4g} model FLOPs; at least: {seconds}; MFU at most {result['mfu_at_most']:.1%}",
            f"compiled in {result['compile_seconds']:.0f} s",
        )
    )


def bytes_needed(message: str) -> int:
    """Return the bytes that the compiler says a program needs which does not fit; raise any other message as it is."""
    units = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:temporaries|[Uu]sed|requires?)[^()\d]*\(?([\d.]+)([BKMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(message)
    return int(float(found[1]) * units[found[2]])


def memory_of(compiled) -> dict[str, int]:
    """Bytes a device: arguments, results, results in the place of arguments, temporaries, peak; the host's temporaries.

    The compilers' own peak counts what stands on the host, and their sizes do not: it is at most the sum of these.
    """
    found = compiled.memory_analysis()
    names = {"arguments": "argument", "results": "output", "aliases": "alias", "temporaries": "temp"}
    sizes = {ours: getattr(found, f"{theirs}_size_in_bytes") for ours, theirs in names.items()}
    together = sizes["arguments"] + sizes["results"] - sizes["aliases"] + sizes["temporaries"]
    sizes["peak"] = min(found.peak_memory_in_bytes, together)
    return sizes | {"host": found.host_temp_size_in_bytes}


def roofline(step: Step, result: dict, topology: Topology) -> dict:
    """The shortest time that compute, memory and network each allow the step, and the MFU of the longest of them.

    Compute does all FLOPs at the chip's peak; memory reads every argument and writes every result once; the network
    carries the collectives' results over all links of a chip. What a host lacks of them comes over all its chips' links
    to other hosts.
    """
    chips, chip, hosts = result["chips"], topology.chip, topology.hosts
    moved = sum(kind["bytes"] for kind in result["collectives"].values())
    lacking = moved * (hosts - 1) / hosts
    seconds = {
        "compute": step.done_flops / chips / chip.peak_flops,
        "memory": (result["memory"]["arguments"] + result["memory"]["results"]) / chip.bandwidth,
        "network": max(moved / chip.links, lacking and lacking / (chips // hosts * chip.across)),
    }
    longest = max(seconds.values())
    mfu = step.model_flops / chips / chip.peak_flops / longest
    return {"model_flops": step.model_flops, "seconds_at_least": seconds, "step_seconds": longest, "mfu_at_most": mfu}
