"""One training loop for every stage: state, optimiser, step, checkpoints."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from cepe_jax.distributed import peers
from cepe_jax.model.cepe import Parts, assemble
from cepe_jax.progress import track
from cepe_jax.sharding import constrain, constrain_like, shardings_of
from cepe_jax.training.logs import Log, StepFacts
from cepe_jax.training.objectives import Batch
from cepe_jax.training.stop import StopRequests
from cepe_jax.weights.checkpoint import Checkpoints


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


def make_train_step(objective, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Callable:
    """`step(state, frozen, batch) -> (state, metrics)`, compiled; `state` is donated.

    The batch's rows are taken in `accumulate` micro-batches, weighted so that the result is the whole batch's:
    by kept labels, not by rows. Only what trains has gradients; the frozen parts are an argument like the batch.
    A step whose loss or gradient is not finite is not taken, nor is any after it: the metrics, which may be read
    much later, have `halted`, and the state is still the one before that step.
    """

    def train_step(state: TrainState, frozen: Parts, batch: Batch):
        weights = objective.weights(batch)

        def loss(trainable, rows):
            return objective(assemble(trainable | frozen), rows, weights)

        def gradient_of(rows):
            (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, rows)
            return terms | {"loss": total}, constrain_like(gradient)

        terms, gradient = sum_over_rows(gradient_of, batch, accumulate)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        metrics = terms | {"grad_norm": optax.tree.norm(gradient)}
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        halted = state.halted | ~finite
        taken = TrainState(optax.apply_updates(state.trainable, updates), opt_state, state.step + 1, state.halted)
        stays = dataclasses.replace(state, halted=halted)
        state = jax.tree.map(lambda new, old: jnp.where(halted, old, new), taken, stays)
        # Placed as it came in, whatever the compiler would choose.
        return constrain_like(state), metrics | {"halted": halted}

    return jax.jit(train_step, donate_argnums=0)


@dataclass(frozen=True)
class Run:
    """Where one run's files go and how often: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `profile/`."""

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
    """The state after `run.steps` steps, going on from the newest checkpoint where there is one; `state` is donated.

    SIGTERM, or preemption of one of many processes, saves the state and ends the run before its last step: then that
    state is returned. Ctrl-C does so too, and raises KeyboardInterrupt.
    `batches_from(n)` yields the batches of steps n, n + 1, ...: a resumed run sees what an uninterrupted one does.
    A step that is not finite ends the run with a ValueError that names it and `records_of` it; the state before it
    is saved. The batches must be on the devices: between dispatches nothing is moved there, nor waited for.
    `evaluate` gets what trains, every `run.evaluate_every` steps and after the last.
    """
    first = 0
    if checkpoints.latest() is not None:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)  # else it would stay beside the restored one, which steps donate
        first, state = checkpoints.restore(like)
        print(f"resumed at step {first} of {run.steps} from {checkpoints.directory}")
    batches = batches_from(first)
    pending: tuple[int, dict] | None = None  # read one step late, so that the device never waits for the host
    done = first

    def where() -> str:
        return f" by step {done + 1}: start again, it goes on from step {checkpoints.latest_whole() or 0}"

    traced = range(max(run.profile[0], first + 1), run.profile[1] + 1) if run.profile else range(0)
    with (
        contextlib.closing(Log(run.out, first, facts)) as log,
        StopRequests() as stop,
        peers(where),
        contextlib.ExitStack() as trace,
    ):

        def settle() -> None:
            """What is pending is read and logged; it ends the run where it is not finite."""
            nonlocal pending
            if pending is None:
                return
            (done, metrics), pending = pending, None
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            if values.pop("halted"):
                raise ValueError(kept_before_halt(state, checkpoints, records_of))
            if done % run.log_every == 0 or done == run.steps:
                log.write(done, values)
            elif done == first + 1:
                log.rest(done)

        for done in track(range(first + 1, run.steps + 1), run.out.name, run.steps - first, lambda: log.latest):
            batch = next(batches)
            if done in traced[:1]:
                jax.block_until_ready(state)
                trace.enter_context(jax.profiler.trace(str(run.out / "profile")))
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("step", step_num=done):
                state, metrics = step(state, frozen, batch)
            settle()
            stopping = stop.after(done) and done < run.steps
            saving = stopping or done % run.save_every == 0 or done == run.steps
            evaluating = evaluate is not None and (done % run.evaluate_every == 0 or done == run.steps)
            if saving or evaluating or done in traced[-1:] or done == first + 1 or done % run.log_every == 0:
                pending = done, metrics
            if saving or evaluating:
                settle()  # waits for the step, as the save does: what a checkpoint holds is finite and logged
            if done in traced[-1:]:
                settle()
                trace.close()
                log.rest(done)
            if stopping:  # before an evaluation: whoever preempts does not wait for long
                checkpoints.save(done, state)
                checkpoints.wait()
                print(f"stopped after step {done} of {run.steps}, which is saved: the same command goes on from there")
            if evaluating:
                log.write_evaluation(done, evaluate(state.trainable))
            if stopping:
                if stop.received == signal.SIGINT:
                    raise KeyboardInterrupt
                break
            if saving:
                checkpoints.save(done, state)
    return state


def kept_before_halt(state: TrainState, checkpoints: Checkpoints, records_of: Callable[[int], list[str]]) -> str:
    """Saves the state before the step that was not finite, and says which step of which records that was."""
    step = int(jax.device_get(state.step))
    if checkpoints.latest() != step:
        checkpoints.save(step, dataclasses.replace(state, halted=jnp.zeros_like(state.halted)))
    checkpoints.wait()
    return (
        f"step {step + 1}: the loss or its gradient is not finite. The state before it is "
        f"{checkpoints.directory / str(step)}: train in another --out, with a lower optimizer.learning_rate or "
        f"without its records: {', '.join(records_of(step))}"
    )
