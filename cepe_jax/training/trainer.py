"""One training loop for every stage: state, optimiser, step, checkpoints."""

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import optax

from cepe_jax.distributed import peers
from cepe_jax.model.parts import Model, Parts
from cepe_jax.progress import track
from cepe_jax.sharding import constrain, constrain_like, shardings_of
from cepe_jax.training.logs import Log, StepFacts
from cepe_jax.training.objectives import Batch, Objective
from cepe_jax.training.stop import StopRequests
from cepe_jax.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    trainable: Parts
    opt_state: optax.OptState
    step: jax.Array  # steps taken
    halted: jax.Array  # 1 from the first step on that was not finite; neither it nor any later one is taken


def initial_state(trainable: Parts, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def init_state(trainable: Parts, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, the optimiser's state born where what it belongs to is; `trainable` is not copied."""

    def rest(trainable: Parts) -> TrainState:
        return dataclasses.replace(initial_state(trainable, optimizer), trainable=None)

    mesh = jax.sharding.get_mesh()
    shardings = None if mesh.empty else shardings_of(jax.eval_shape(rest, trainable), mesh)
    return dataclasses.replace(jax.jit(rest, out_shardings=shardings)(trainable), trainable=trainable)


def sum_over_rows(function: Callable, batch: Batch, accumulate: int):
    """`function(rows)`, a tree of sums over rows, added up over `accumulate` micro-batches of a batch's rows.

    Micro-batch i has rows i, i + accumulate, ...: of each device's share the same number, so that none moves.
    """
    if accumulate == 1:
        return function(batch)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, function(rows)), None

    micros = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    micros = jax.tree.map(lambda x: constrain(x, None, "batch", *[None] * (x.ndim - 2)), micros)
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, micros)[0]


def all_finite(tree) -> jax.Array:
    """Return true if every number in the tree is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, model: type[Model], accumulate: int = 1
) -> Callable:
    """Return `step(state, frozen, batch) -> (state, metrics)`, compiled; `state` is donated.

    The batch's rows are taken in `accumulate` micro-batches, weighted so that the result is the whole batch's:
    by kept labels, not by rows. Only what trains has gradients; the frozen parts are an argument like the batch.
    A step whose loss, gradient or new state is not finite is not taken, nor is any after it: the metrics, which may be
    read much later, have `halted`, and the state is still the one before that step.
    """

    def train_step(state: TrainState, frozen: Parts, batch: Batch):
        weights = objective.weights(batch)

        def loss(trainable, rows):
            return objective(model.from_parts(trainable | frozen), rows, weights)

        def gradient_of(rows):
            (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, rows)
            return terms | {"loss": total}, constrain_like(gradient)

        terms, gradient = sum_over_rows(gradient_of, batch, accumulate)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        metrics = terms | {"grad_norm": optax.tree.norm(gradient)}
        taken = TrainState(optax.apply_updates(state.trainable, updates), opt_state, state.step + 1, state.halted)
        # Moments overflow long after the gradient that did it, and an infinite one makes updates of 0 without a word.
        halted = state.halted | ~all_finite((metrics, taken))
        stays = dataclasses.replace(state, halted=halted)
        state = jax.tree.map(lambda new, old: jnp.where(halted, old, new), taken, stays)
        # Placed as it came in, whatever the compiler would choose.
        return constrain_like(state), metrics | {"halted": halted}

    return jax.jit(train_step, donate_argnums=0)


@dataclass(frozen=True)
class Run:
    """The place of a run's files and their intervals: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `profile/`."""

    out: Path
    steps: int
    save_every: int  # steps
    log_every: int  # steps
    evaluate_every: int  # steps
    profile: tuple[int, ...]  # the first and the last step to trace

    def __post_init__(self):
        for name in ("steps", "save_every", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.steps):
            raise ValueError(f"profile is {list(self.profile)}: give the first and the last step to trace, as [11, 13]")

    def due(self, step: int, every: int) -> bool:
        """Return true after every so many steps, and after the last step."""
        return step % every == 0 or step == self.steps


class Trace:
    """A profile of some steps of a run, in `profile/`. Within the block it starts and stops by itself."""

    def __init__(self, run: Run, first: int):
        """Trace the run's steps after `first`, the one from which it resumes."""
        self._out = str(run.out / "profile")
        self._steps = range(max(run.profile[0], first + 1), run.profile[1] + 1) if run.profile else range(0)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def before(self, step: int, state: TrainState) -> None:
        if step in self._steps[:1]:
            jax.block_until_ready(state)
            self._open.enter_context(jax.profiler.trace(self._out))

    def is_last(self, step: int) -> bool:
        return step in self._steps[-1:]

    def close(self) -> None:
        self._open.close()


class Deferred:
    """The metrics of a step, read one step late, so that the device never waits for the host."""

    def __init__(self, read: Callable[[int, dict[str, float]], None]):
        self._read, self._pending = read, None

    def put(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending = step, metrics

    def settle(self) -> None:
        """Wait for the metrics that were put, if there are any, and read them."""
        if self._pending is not None:
            (step, metrics), self._pending = self._pending, None
            self._read(step, {name: value.item() for name, value in jax.device_get(metrics).items()})


def train(
    run: Run,
    facts: StepFacts,
    state: TrainState,
    frozen: Parts,
    step: Callable,
    batches_from: Callable[[int], Iterator[Batch]],
    records_of: Callable[[int], list[str]],
    checkpoints: Checkpoints,
    evaluate: Callable[[Parts], dict[str, float]] | None = None,
) -> TrainState:
    """Return the state after `run.steps` steps, resumed from the newest checkpoint if there is one; `state` is donated.

    SIGTERM, or preemption of one of many processes, saves the state and ends the run before its last step: then that
    state is returned. Ctrl-C does so too, and raises KeyboardInterrupt.
    `batches_from(n)` yields the batches of steps n, n + 1, ...: a resumed run sees what an uninterrupted one does.
    A step that is not finite ends the run with a ValueError that names it and `records_of` it; the state before it
    is saved. The batches must be on the devices: between dispatches nothing is moved there, nor waited for.
    `evaluate` gets what trains, every `run.evaluate_every` steps and after the last.
    """
    first, state = resumed(run, state, checkpoints)
    batches, number = batches_from(first), first

    def where() -> str:
        return f" by step {number + 1}: start again, it goes on from step {checkpoints.latest_whole() or 0}"

    def read(done: int, values: dict[str, float]) -> None:
        if values.pop("halted"):
            raise ValueError(kept_before_halt(state, checkpoints, records_of))
        if run.due(done, run.log_every):
            journal.write(done, values)
        elif done == first + 1:
            journal.rest(done)

    with (
        contextlib.closing(Log(run.out, first, facts)) as journal,
        StopRequests() as stop,
        peers(where),
        Trace(run, first) as trace,
    ):
        metrics_late = Deferred(read)
        for number in track(range(first + 1, run.steps + 1), run.out.name, run.steps - first, lambda: journal.latest):
            batch = next(batches)
            trace.before(number, state)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("step", step_num=number):
                state, metrics = step(state, frozen, batch)
            metrics_late.settle()
            stopping = stop.after(number) and number < run.steps
            saving = stopping or run.due(number, run.save_every)
            evaluating = evaluate is not None and run.due(number, run.evaluate_every)
            waiting = saving or evaluating or trace.is_last(number)  # what a checkpoint holds is finite and logged
            if waiting or number == first + 1 or run.due(number, run.log_every):
                metrics_late.put(number, metrics)
            if waiting:
                metrics_late.settle()
            if trace.is_last(number):
                trace.close()
                journal.rest(number)
            if stopping:  # before an evaluation: whoever preempts does not wait for long
                checkpoints.save(number, state)
                checkpoints.wait()
                log.info("stopped after step %d of %d, which is saved: the same command goes on", number, run.steps)
            if evaluating:
                journal.write_evaluation(number, evaluate(state.trainable))
            if stopping and stop.received == signal.SIGINT:
                raise KeyboardInterrupt
            if stopping:
                break
            if saving:
                checkpoints.save(number, state)
    return state


def resumed(run: Run, state: TrainState, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """Return the newest checkpoint's step and state, whose arrays take the place of `state`'s; without one, step 0."""
    if checkpoints.latest() is None:
        return 0, state
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)  # else it would stay beside the restored one, which steps donate
    first, state = checkpoints.restore(like)
    log.info("resumed at step %d of %d from %s", first, run.steps, checkpoints.directory)
    return first, state


def kept_before_halt(state: TrainState, checkpoints: Checkpoints, records_of: Callable[[int], list[str]]) -> str:
    """Save the state before the step that was not finite; return a text that names the step and its records."""
    step = int(jax.device_get(state.step))
    if checkpoints.latest() != step:
        checkpoints.save(step, dataclasses.replace(state, halted=jnp.zeros_like(state.halted)))
    checkpoints.wait()
    return (
        f"step {step + 1}: the loss, its gradient or the update is not finite. The state before it is "
        f"{checkpoints.directory / str(step)}: train in another --out, with a lower optimizer.learning_rate or "
        f"without its records: {', '.join(records_of(step))}"
    )
