"""Spoiled input of every kind ends in a refusal of one line or in a right result, never in anything else."""

import pytest

from fuzz.harness import BAD, Worker, missing
from fuzz.kinds import KINDS


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


def check(name: str, seeds: range, worker: Worker, record_property) -> None:
    if lacking := missing(KINDS[name].needs):
        pytest.skip(f"needs {', '.join(lacking)}")
    outcomes = [worker.case(name, seed) for seed in seeds]
    record_property("outcomes", [tuple(outcome) for outcome in outcomes])
    faults = [outcome for outcome in outcomes if outcome.word in BAD]
    again = f"PYTHONPATH=.:tests python -m fuzz {name!r} SEED"
    assert not faults, "\n".join(["", *map(str, faults), f"one of them again: {again}"])


@pytest.mark.parametrize("name", KINDS)
def test_spoiled(name, worker, record_property):
    check(name, range(20), worker, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_spoiled_in_many_ways(name, worker, record_property):
    check(name, range(1000, 1250), worker, record_property)
