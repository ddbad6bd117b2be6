"""The speed of a training step on the devices at hand."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.benchmarks.compiled import ShapesConfig, memory_of, train_step
from cepe_jax.config import CepeConfig
from cepe_jax.cost import gib, peak_flops
from cepe_jax.data.recipes import blank
from cepe_jax.devices import describe
from cepe_jax.directories import write_json, write_text
from cepe_jax.identity import as_json
from cepe_jax.model.cepe import Cepe
from cepe_jax.progress import track
from cepe_jax.sharding import make_mesh, place_batch
from cepe_jax.training.logs import peak_memory
from cepe_jax.training.settings import (
    TrainConfig,
    compute_of,
    mesh_of,
    recipe_of,
    sizes_of,
    tokens_of_step,
)
from cepe_jax.weights.build import abstract_parts


@dataclass(frozen=True, kw_only=True)
class TrainBenchmarkConfig(ShapesConfig):
    """A step of training to be timed."""

    timed_steps: int = 10  # steps that are timed, after one that is not
    beside: Literal["", "torch"] = ""  # torch: each step is followed by one of the tests' oracle; fp32, one CPU
    out: Path = Path("out/benchmark")  # gets train.json and train.md

    def __post_init__(self):
        super().__post_init__()
        if self.timed_steps < 1:
            raise ValueError(f"timed_steps is {self.timed_steps}: give a number above 0")


def benchmark_train(config: TrainBenchmarkConfig) -> None:
    """Time a step on random weights and tokens, and print its speed and memory, also into `config.out`."""
    oracle = torch_oracle(config.dtype) if config.beside else None
    if oracle and config.optimizer.kind != "adamw":
        raise ValueError(f"--beside=torch trains with AdamW: leave out optimizer.kind {config.optimizer.kind}")
    shares = mesh_of(config, jax.device_count())
    sizes, compute = sizes_of(config), compute_of(config, jax.default_backend())
    if oracle and not isinstance(sizes, CepeConfig):
        raise ValueError(f"--beside=torch measures a CEPE, and stage {config.stage} trains none")
    with jax.set_mesh(make_mesh(**dataclasses.asdict(shares))):
        step = train_step(config, sizes, compute)
        begun = time.monotonic()
        compiled = step.function.lower(*step.arguments).compile()
        compile_seconds = time.monotonic() - begun
        state, frozen, _ = step.arguments
        trainable = filled(state.trainable, 0.02)
        state = dataclasses.replace(filled(dataclasses.replace(state, trainable=None), 0.0), trainable=trainable)
        frozen, batch = filled(frozen, 0.02), _tokens(config, sizes)

        def step_of_ours() -> float:
            nonlocal state
            state, metrics = compiled(state, frozen, batch)
            return float(metrics["loss"])

        steps = {"ours": step_of_ours}
        if oracle:
            model, optimizer = Cepe.from_parts(trainable | frozen), config.optimizer
            steps["torch"] = oracle.train_step(model, batch, optimizer.learning_rate, optimizer.clip_norm)
        runs = in_turn(steps, config.timed_steps)
    seconds, loss = runs["ours"].seconds, runs["ours"].results[-1]
    median, peak = float(np.median(seconds)), peak_flops(jax.devices())
    result = {
        "device": describe(),
        "date": date.today().isoformat(),
        "config": as_json(config),
        "stage": config.stage,
        "parameters": sum(x.size for x in jax.tree.leaves(abstract_parts(sizes))),
        "batch": config.batch_size,
        "tokens": tokens_of_step(config),
        "attention": compute.attention,
        "loss": loss,
        "compile_seconds": compile_seconds,
        "step_seconds": median,
        "tokens_per_second": tokens_of_step(config) / median,
        "model_flops": step.model_flops,
        "flops_per_second": step.model_flops / median,
        "mfu": peak and step.model_flops / median / peak,
        "memory": memory_of(compiled) | {"in_use": peak_memory()},
    }
    if oracle:
        best = {name: min(run.seconds) for name, run in runs.items()}
        losses = {name: run.results[0] for name, run in runs.items()}
        ratio = best["ours"] / best["torch"]
        result["beside"] = {"seconds": best, "first_losses": losses, "ratio": ratio, "steps": config.timed_steps}
    page = _table(result)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "train.json", result)
    write_text(config.out / "train.md", page)
    print(page)


def _table(result: dict) -> str:
    """Return the result as a table for people."""
    memory = result["memory"]
    rows = {
        "device": result["device"],
        "model": f"{result['stage']}, {result['parameters']:,} parameters, attention {result['attention']}",
        "step": f"{result['batch']} sequences, {result['tokens']:,} tokens, {result['step_seconds']:.3f} s",
        "tokens a second": f"{result['tokens_per_second']:,.0f}",
        "model FLOPs": f"{result['model_flops']:.4g} a step, {result['flops_per_second']:.4g} a second",
        "MFU": f"{result['mfu']:.1%}" if result["mfu"] else "not known: this device's peak is not",
        "memory": f"{gib(memory['in_use'])} in use at most",
        "by the compiler": f"{gib(memory['arguments'])} of arguments, {gib(memory['temporaries'])} of temporaries",
        "compilation": f"{result['compile_seconds']:.1f} s",
    }
    if beside := result.get("beside"):
        rows["beside torch"] = (
            f"{beside['seconds']['ours']:.3f} s, torch {beside['seconds']['torch']:.3f} s: {beside['ratio']:.2f}; "
            f"minimum of {beside['steps']} in turn"
        )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


@dataclass
class Runs:
    """The seconds of each run after the first, and what each gave."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    results: list = dataclasses.field(default_factory=list)


def in_turn(functions: dict[str, Callable[[], object]], number: int) -> dict[str, Runs]:
    """`number` runs of each function and one before them that does not count, one after the other in turn."""
    runs = {name: Runs() for name in functions}
    for index in track(range(1 + number), "benchmark"):
        for name, function in functions.items():
            begun = time.monotonic()
            runs[name].results.append(jax.block_until_ready(function()))
            if index:
                runs[name].seconds.append(time.monotonic() - begun)
    return runs


def torch_oracle(dtype: str) -> ModuleType:
    """The tests' CEPE in PyTorch; ValueError where it cannot stand beside ours."""
    path = Path(__file__).parents[2] / "tests" / "support" / "torch_cepe.py"
    if not path.exists():
        raise ValueError("--beside=torch needs the tests of a clone of this repository: it is their oracle")
    if dtype != "float32" or jax.devices()[0].platform != "cpu":
        raise ValueError("--beside=torch compares in float32 on a CPU: give --dtype=float32 and JAX_PLATFORMS=cpu")
    if importlib.util.find_spec("torch") is None:
        raise ValueError('--beside=torch needs PyTorch: pip install ".[parity]"')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(abstract, scale: float):
    """Arrays like these: normal with deviation `scale`, zeros where it is 0; born in their places, if they have any."""

    def make():
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(abstract))))
        return jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape, x.dtype) * scale if scale else jnp.zeros(x.shape, x.dtype),
            abstract,
        )

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()


def _tokens(config: TrainConfig, sizes) -> dict[str, jax.Array]:
    """A batch of random tokens, nothing masked."""
    rng = np.random.default_rng(0)
    vocab_size = getattr(sizes, "decoder", sizes).vocab_size

    def draw(x):
        shape = (config.batch_size, *x.shape)
        return np.ones(shape, bool) if x.dtype == bool else rng.integers(0, vocab_size, shape, np.int32)

    batch = {name: draw(x) for name, x in blank(recipe_of(config)).items()}
    return place_batch(batch, jax.sharding.get_mesh(), config.batch_size)
