"""The loop: what is frozen stays, micro-batches add up, a resumed run equals an uninterrupted one, bad runs say why."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cepe_jax.data.examples import IGNORE
from cepe_jax.model.cepe import split
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.trainer import OptimizerConfig, Run, init_state, make_train_step, train
from cepe_jax.weights.checkpoint import Checkpoints

TRAIN = "encoder", "cross"
STEPS = 6


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (4, 8))
    labels = np.where(rng.random((4, 8)) < 0.5, rng.integers(0, 64, (4, 8)), IGNORE)
    labels[0] = IGNORE  # rows with unequal numbers of kept labels: micro-batches weigh differently
    context = rng.integers(0, 64, (4, 2, 5))
    return {"tokens": tokens, "labels": labels, "context": context, "context_mask": rng.random((4, 2, 5)) < 0.8}


def batches_from(first: int):
    yield from map(batch_of, range(first, STEPS))


@pytest.fixture(scope="module")
def optimizer():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    return config.build(config.schedule(STEPS))


@pytest.fixture(scope="module")
def step(optimizer):
    return make_train_step(NextToken(), optimizer)


@pytest.fixture
def run(cepe, optimizer, step, tmp_path):
    """Trains in tmp_path until `steps`, going on from what is there; returns the state."""

    def go(steps=STEPS, identity="ours", step=step):
        trainable, frozen = split(jax.tree.map(lambda x: x.copy(), cepe), TRAIN)
        checkpoints = Checkpoints(tmp_path / "checkpoints", {"run": identity})
        setting = Run(tmp_path, steps, save_every=2, log_every=1)
        state = train(setting, init_state(trainable, optimizer), frozen, step, batches_from, checkpoints)
        checkpoints.close()
        return state

    return go


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_only_what_trains_has_gradients_and_optimiser_state(cepe, optimizer, step):
    """And the frozen part keeps its bits under weight decay; every trained array moves."""
    trainable, frozen = split(jax.tree.map(lambda x: x.copy(), cepe), TRAIN)
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
    """Weighted by kept labels: the mean of the micro-batches' means would be another number."""
    results = []
    for make in (step, make_train_step(NextToken(), optimizer, accumulate=4)):
        trainable, frozen = split(jax.tree.map(lambda x: x.copy(), cepe), TRAIN)
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
    resumed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["nll"] for line in resumed] == [json.loads(line)["nll"] for line in lines]


def test_a_finished_run_is_not_trained_again(run, step):
    whole = bits(run())

    def no_step(*_):
        raise AssertionError("trained again")

    assert bits(run(step=no_step)) == whole


def test_a_checkpoint_of_another_run_is_refused(run):
    run(2)
    with pytest.raises(ValueError, match=r'checkpoints/2: is of another run, run is "ours" there and "other" here'):
        run(4, identity="other")


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(run, tmp_path):
    run(4)
    files = [p for p in (tmp_path / "checkpoints/4/state").rglob("*") if p.is_file()]
    flip_a_bit(max(files, key=lambda p: p.stat().st_size))
    with pytest.raises(ValueError, match=r"checkpoints/4: .*there is one of step 2"):
        run()
    shutil.rmtree(tmp_path / "checkpoints/4")
    run()


def test_an_empty_directory_is_no_checkpoint(run, tmp_path):
    run(2)
    (tmp_path / "checkpoints/3").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints/3: damaged .*there is one of step 2"):
        run()


@pytest.mark.parametrize(("log_every", "noticed"), [(1, 1), (5, 2)])
def test_a_loss_that_is_not_finite_ends_the_run(cepe, optimizer, step, tmp_path, log_every, noticed):
    """And is not saved, also where the step of a save (2) is not one whose metrics are logged."""
    trainable, frozen = split(jax.tree.map(lambda x: x.copy(), cepe), TRAIN)
    trainable["cross"].q = trainable["cross"].q.replace(trainable["cross"].q[...].at[0, 0, 0, 0].set(np.nan))
    state, setting = init_state(trainable, optimizer), Run(tmp_path, STEPS, save_every=2, log_every=log_every)
    with pytest.raises(ValueError, match=f"step {noticed}: .*not finite"):
        train(setting, state, frozen, step, batches_from, Checkpoints(tmp_path / "checkpoints", {}))
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.0), ("warmup_fraction", 1.0)])
def test_bad_optimizer_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        OptimizerConfig(**{field: value})


def test_bad_run_settings(tmp_path):
    for field in ("steps", "save_every", "log_every"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            dataclasses.replace(Run(tmp_path, 1, 1), **{field: 0})
