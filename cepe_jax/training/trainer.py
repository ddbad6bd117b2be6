"""One training loop for every stage: state, optimiser, step, checkpoints, metrics."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cepe_jax.model.cepe import Parts, assemble
from cepe_jax.progress import track
from cepe_jax.sharding import constrain, shardings_of
from cepe_jax.training.objectives import Batch
from cepe_jax.weights.checkpoint import Checkpoints


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up from 0 and a cosine back to 0, as the reference's trainer runs it."""

    learning_rate: float = 3e-4  # at the end of warm-up
    warmup_fraction: float = 0.04  # of all steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the gradient of everything that trains
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: give a number above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}: give a share of the steps below 1")

    def schedule(self, steps: int) -> optax.Schedule:
        warmup = int(self.warmup_fraction * steps)
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        adamw = optax.adamw(schedule, self.beta1, self.beta2, self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    trainable: Parts
    opt_state: optax.OptState
    step: jax.Array


def init_state(trainable: Parts, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, the optimiser's state placed like what it belongs to."""
    mesh = jax.sharding.get_mesh()
    shardings = None if mesh.empty else shardings_of(jax.eval_shape(optimizer.init, trainable), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    return TrainState(trainable, opt_state, jnp.zeros((), jnp.int32))


def make_train_step(objective, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Callable:
    """`step(state, frozen, batch) -> (state, metrics)`, compiled; `state` is donated.

    The batch's rows are taken in `accumulate` micro-batches, weighted so that the result is the whole batch's:
    by kept labels, not by rows. Micro-batch i has rows i, i + accumulate, ...: of each device's share the same number,
    so that none moves. Only what trains has gradients; the frozen parts are an argument like the batch.
    """

    def train_step(state: TrainState, frozen: Parts, batch: Batch):
        weights = objective.weights(batch)

        def loss(trainable, rows):
            return objective(assemble(trainable | frozen), rows, weights)

        def gradient_of(rows):
            (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, rows)
            return terms, gradient

        def add(total, rows):
            return jax.tree.map(jnp.add, total, gradient_of(rows)), None

        if accumulate == 1:
            terms, gradient = gradient_of(batch)
        else:
            micros = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            micros = jax.tree.map(lambda x: constrain(x, None, "batch", *[None] * (x.ndim - 2)), micros)
            first = jax.tree.map(lambda x: x[0], micros)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, first))
            (terms, gradient), _ = jax.lax.scan(add, zeros, micros)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        metrics = terms | {"grad_norm": optax.tree.norm(gradient)}
        return TrainState(optax.apply_updates(state.trainable, updates), opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


@dataclass(frozen=True)
class Run:
    """Where one run's files go and how often: `checkpoints/`, `metrics.jsonl`."""

    out: Path
    steps: int
    save_every: int  # steps
    log_every: int = 10  # steps

    def __post_init__(self):
        for name in ("steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")


def train(
    run: Run,
    state: TrainState,
    frozen: Parts,
    step: Callable,
    batches_from: Callable[[int], Iterator[Batch]],
    checkpoints: Checkpoints,
) -> TrainState:
    """The state after `run.steps` steps, going on from the newest checkpoint where there is one.

    `batches_from(n)` yields the batches of steps n, n + 1, ...: a resumed run sees what an uninterrupted one does.
    A non-finite loss ends the run with a ValueError that names the step.
    """
    first = 0
    if (restored := checkpoints.restore(state)) is not None:
        first, state = restored
        print(f"resumed at step {first} of {run.steps} from {checkpoints.directory}")
    log = MetricsLog(run.out / "metrics.jsonl", first)
    batches = batches_from(first)
    pending: list[tuple[int, dict]] = []  # read one step late, so that the device never waits for the host
    for number in track(range(first, run.steps), run.out.name, run.steps - first, lambda: log.latest):
        state, metrics = step(state, frozen, next(batches))
        log.write(pending)
        done = number + 1
        saving = done % run.save_every == 0 or done == run.steps
        pending = [(done, metrics)] if saving or done % run.log_every == 0 else []
        if saving:
            log.write(pending)  # before the state is saved: what is not finite is not kept
            pending = []
            checkpoints.save(done, state)
    return state


class MetricsLog:
    """metrics.jsonl, one line per logged step; lines after `first` (of a run that was cut off) are dropped."""

    def __init__(self, path: Path, first: int):
        kept = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= first]
        path.write_text("".join(kept))
        self.path, self.latest, self._last = path, "", (first, time.monotonic())

    def write(self, steps: list[tuple[int, dict[str, jax.Array]]]) -> None:
        for step, metrics in steps:
            values = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(list(values.values())).all():
                raise ValueError(f"step {step}: {values} is not finite: lower the learning rate, or look at the data")
            last_step, last_time = self._last
            self._last = step, time.monotonic()
            values["seconds_per_step"] = (self._last[1] - last_time) / (step - last_step)
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            self.latest = f"nll {values['nll']:.3f}"
