"""The loop: what is frozen stays, micro-batches add up, a resumed run equals an uninterrupted one, bad runs say why."""

import contextlib
import dataclasses
import gc
import gzip
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cepe_jax.data.examples import IGNORE
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.parts import split
from cepe_jax.training import stop
from cepe_jax.training.logs import StepFacts
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.trainer import Run, TrainState, init_state, make_train_step, train
from cepe_jax.weights.checkpoint import Checkpoints

TRAIN = "encoder", "cross"
STEPS = 6
FACTS = StepFacts(np.arange(STEPS) / 10, tokens=100, flops=1e3)


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (4, 8))
    labels = np.where(rng.random((4, 8)) < 0.5, rng.integers(0, 64, (4, 8)), IGNORE)
    labels[0] = IGNORE  # rows with unequal numbers of kept labels: micro-batches weigh differently
    context = rng.integers(0, 64, (4, 2, 5))
    return {"tokens": tokens, "labels": labels, "context": context, "context_mask": rng.random((4, 2, 5)) < 0.8}


def batches_from(first: int):
    yield from (jax.device_put(batch_of(step)) for step in range(first, STEPS))


def records_of(step: int) -> list[str]:
    return [f"filtered/{step}@{row}" for row in range(4)]


@pytest.fixture(scope="module")
def optimizer():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    return config.build(config.schedule(STEPS))


@pytest.fixture(scope="module")
def step(optimizer):
    return make_train_step(NextToken(), optimizer, Cepe)


def a_copy(model):
    return jax.tree.map(lambda x: x.copy(), model)


@pytest.fixture
def run(cepe, optimizer, step, tmp_path):
    """Trains in tmp_path until `steps`, going on from what is there; returns the state."""

    def go(steps=STEPS, identity="ours", step=step, save_every=2, log_every=1, evaluate=None, profile=()):
        trainable, frozen = split(a_copy(cepe), TRAIN)
        setting = Run(tmp_path, steps, save_every, log_every, evaluate_every=2, profile=profile)
        with contextlib.closing(Checkpoints(tmp_path / "checkpoints", {"run": identity})) as checkpoints:
            start = init_state(trainable, optimizer)
            return train(setting, FACTS, start, frozen, step, batches_from, records_of, checkpoints, evaluate)

    return go


def lines_in(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    times = "seconds_per_step", "tokens_per_second", "peak_memory"
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_only_what_trains_has_gradients_and_optimiser_state(cepe, optimizer, step):
    """And the frozen part keeps its bits under weight decay; every trained array moves."""
    trainable, frozen = split(a_copy(cepe), TRAIN)
    del trainable["encoder"].mlm_head  # no batch of this stage reaches it
    before, trained = bits(frozen), bits(trainable)
    state = init_state(trainable, optimizer)
    per_leaf = 2 * len(jax.tree.leaves(trainable))  # AdamW's two moments
    assert len(jax.tree.leaves(state.opt_state)) == per_leaf + 2  # and two counters
    for number in range(2):  # the first step of the schedule has learning rate 0
        state, _ = step(state, frozen, batch_of(number))
    assert bits(frozen) == before
    assert all(now != then for now, then in zip(bits(state.trainable), trained, strict=True))
    assert int(state.step) == 2


def test_micro_batches_add_up_to_the_batch(cepe, optimizer, step):
    """Weighted by kept labels: the mean of the micro-batches' means would be another number.

    5 CPU-seconds: a step is compiled for each number of micro-batches.
    """
    results = []
    for make in (step, make_train_step(NextToken(), optimizer, Cepe, accumulate=4)):
        trainable, frozen = split(a_copy(cepe), TRAIN)
        results.append(make(init_state(trainable, optimizer), frozen, batch_of(0))[1])
    for name in ("nll", "grad_norm"):
        assert float(results[1][name]) == pytest.approx(float(results[0][name]), rel=1e-5)


def test_schedule_warms_up_and_ends_at_zero():
    schedule = OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.1).schedule(100)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(1e-3)
    assert float(schedule(10)) == pytest.approx(2e-3)
    assert float(schedule(55)) == pytest.approx(1e-3)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-9)


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    whole = bits(run())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))  # as if killed after step 4 was saved, and after step 5 ran
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:5], lines[5][:7]]))
    assert bits(run()) == whole
    resumed = lines_in(tmp_path)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert without_times(resumed) == without_times(map(json.loads, lines))


def test_a_resumed_run_holds_as_much_as_a_fresh_one(run, step, tmp_path):
    """And not the state that it would have begun with as well."""
    held = []

    def weighed(*args):
        state = step(*args)
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return state

    run(2)
    run(4, step=weighed, save_every=4)
    shutil.rmtree(tmp_path / "checkpoints")
    run(4, step=weighed, save_every=4)  # no save begins before the step that is compared
    assert held[1] == held[5]


def test_a_finished_run_is_not_trained_again(run, step):
    whole = bits(run())

    def no_step(*_):
        raise AssertionError("trained again")

    assert bits(run(step=no_step)) == whole


def test_a_checkpoint_of_another_run_is_refused(run):
    run(2)
    with pytest.raises(ValueError, match='checkpoints/2: .*another run, run .*"ours".*"other"'):
        run(4, identity="other")


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(run, tmp_path):
    run(4)
    files = [p for p in (tmp_path / "checkpoints/4/state").rglob("*") if p.is_file()]
    flip_a_bit(max(files, key=lambda p: p.stat().st_size))
    with pytest.raises(ValueError, match=r"checkpoints/4: .*damaged.* step 2\b"):
        run()
    shutil.rmtree(tmp_path / "checkpoints/4")
    run()


def test_an_empty_directory_is_no_checkpoint(run, tmp_path):
    run(2)
    (tmp_path / "checkpoints/3").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints/3: damaged.* step 2\b"):
        run()


class Metric:
    """A number on a device: `events` gets an entry when it is read."""

    def __init__(self, events: list, step: int, value: float):
        self.events, self.step, self.value = events, step, value

    def __array__(self, dtype=None, copy=None):
        self.events.append(("read", self.step))
        return np.asarray(self.value)


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(tmp_path):
    events = []

    def step(state, frozen, batch):
        n = len([1 for kind, _ in events if kind == "dispatch"]) + 1
        events.append(("dispatch", n))
        return state, {"loss": Metric(events, n, 0.5), "halted": np.zeros(())}

    state = TrainState({"w": jnp.ones(3)}, (), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        setting = Run(tmp_path, 4, save_every=4, log_every=1, evaluate_every=1, profile=())
        train(setting, FACTS, state, {}, step, batches_from, records_of, checkpoints)
    order = "dispatch 1, dispatch 2, read 1, dispatch 3, read 2, dispatch 4, read 3, read 4"
    assert ", ".join(f"{kind} {n}" for kind, n in events) == order


@pytest.mark.parametrize(("bad", "log_every"), [(1, 1), (4, 5), (3, 5)])
def test_a_step_that_is_not_finite_is_not_taken(run, step, tmp_path, bad, log_every):
    """Nor is any after it, though the metrics are read later; what is saved is the state before it, bit for bit."""
    calls, poison = [], jax.jit(lambda frozen: jax.tree.map(lambda x: x * jnp.nan, frozen))

    def poisoned(state, frozen, batch):
        calls.append(1)
        if len(calls) == bad:
            frozen = poison(frozen)
        return step(state, frozen, batch)

    whole = bits(run(bad - 1)) if bad > 1 else None
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    names = ", ".join(records_of(bad - 1))
    with pytest.raises(ValueError, match=f"^step {bad}: .*not finite.*checkpoints/{bad - 1}: .*--out.*: {names}$"):
        run(step=poisoned, save_every=2 * log_every, log_every=log_every)
    assert len(calls) == (bad + 1 if log_every == 1 else log_every + 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(bad - 1)]
    assert not lines_in(tmp_path)
    if whole:
        assert bits(run(bad - 1)) == whole
    assert int(run().step) == STEPS  # without the poison it goes on from there


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.scale(np.inf),  # the update
        optax.chain(optax.scale(1e25), optax.adam(1e-3)),  # the second moment, which makes an update of 0
    ],
    ids=["update", "moment"],
)
def test_a_state_that_is_not_finite_is_not_taken(cepe, optimizer):
    trainable, frozen = split(a_copy(cepe), TRAIN)
    before = bits(trainable)
    state, metrics = make_train_step(NextToken(), optimizer, Cepe)(
        init_state(trainable, optimizer), frozen, batch_of(0)
    )
    assert np.isfinite(metrics["grad_norm"])
    assert (int(metrics["halted"]), int(state.step)) == (1, 0)
    assert bits(state.trainable) == before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_sigterm_saves_and_ends(run, step, tmp_path, caplog):
    """After the step in flight; the second signal would kill. What goes on from there equals an uninterrupted run."""
    whole = bits(run())
    lines = without_times(lines_in(tmp_path))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    before = signal.getsignal(signal.SIGTERM)
    handlers = []

    def stopped_in(nth, number):
        calls = []

        def wrapped(*args):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), number)
                handlers.append(signal.getsignal(number))
            return step(*args)

        return wrapped

    assert int(run(step=stopped_in(3, signal.SIGTERM), log_every=2).step) == 3
    assert "stopped after step 3 of 6" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        run(step=stopped_in(1, signal.SIGINT), save_every=5, log_every=2)
    assert "stopped after step 4 of 6" in caplog.text
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]
    assert signal.getsignal(signal.SIGTERM) == before
    assert bits(run(log_every=2)) == whole
    assert without_times(lines_in(tmp_path)) == [line for line in lines if line["step"] % 2 == 0]


def test_who_preempts_waits_for_no_evaluation(run, step, tmp_path):
    """The state is on disk before it begins; the entry is there all the same, as in a run that nothing stopped."""

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    def evaluate(trainable) -> dict[str, float]:
        saved.extend(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
        return {"loss": 1.0}

    saved: list[str] = []
    run(1)
    run(step=stopped, save_every=5, evaluate=evaluate)
    assert saved == ["1", "2"]
    assert "eval_loss" in lines_in(tmp_path)[-1]


def test_evaluation_is_logged_where_it_should_be(run, tmp_path):
    """Every second step and after the last; it sees the weights of its step, and a resumed run has each entry once."""

    def evaluate(trainable) -> dict[str, float]:
        return {"loss": float(jnp.abs(trainable["cross"].q[...]).sum())}

    def entries() -> list[tuple[int, float]]:
        return [(line["step"], line["eval_loss"]) for line in lines_in(tmp_path) if "eval_loss" in line]

    state = run(5, save_every=3, evaluate=evaluate)
    whole = entries()
    assert [step for step, _ in whole] == [2, 4, 5]
    assert whole[-1][1] == evaluate(state.trainable)["loss"] != whole[0][1]
    shutil.rmtree(tmp_path / "checkpoints/5")
    run(5, save_every=3, evaluate=evaluate)
    assert entries() == whole
    assert [line["step"] for line in lines_in(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]


def test_the_steps_asked_for_are_traced(run, tmp_path):
    """And no other, by their numbers in the run; the trace is where TensorBoard looks for it."""
    run(profile=(3, 4))
    (path,) = (tmp_path / "profile/plugins/profile").glob("*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "step"}
    assert steps == {"3", "4"}
    assert list(path.parent.glob("*.xplane.pb"))


@pytest.mark.parametrize("profile", [(3,), (0, 2), (4, 3), (3, 7)])
def test_bad_steps_to_trace(tmp_path, profile):
    with pytest.raises(ValueError, match=re.escape(f"profile is {list(profile)}: ")):
        Run(tmp_path, STEPS, 1, 1, 1, profile)


def test_of_many_processes_none_installs_a_handler(monkeypatch):
    """All ask jax at every step: it tells each the same step at which to end."""
    before, asked = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        stop.multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or step == 7
    )
    with stop.StopRequests() as requests:
        assert signal.getsignal(signal.SIGTERM) == before
        assert [requests.after(step) for step in (5, 6, 7)] == [False, False, True]
    assert asked == [5, 6, 7]


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.0), ("warmup_fraction", 1.0)])
def test_bad_optimizer_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        OptimizerConfig(**{field: value})


def test_bad_run_settings(tmp_path):
    for field in ("steps", "save_every", "log_every", "evaluate_every"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            dataclasses.replace(Run(tmp_path, 1, 1, 1, 1, ()), **{field: 0})
