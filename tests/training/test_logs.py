"""What is written of a run, against a clock that the test sets and a reader of event files of its own."""

import json
import struct
from pathlib import Path

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from cepe_jax.devices import peak_memory
from cepe_jax.training import logs
from cepe_jax.training.logs import Log, StepFacts

FACTS = StepFacts(learning_rates=[n / 8 for n in range(40)], tokens=1000, flops=3e9, peak_flops=1e10)
METRICS = {"loss": 2.5, "nll": 2.5, "grad_norm": 0.5}


@pytest.fixture
def clock(monkeypatch):
    """The time is `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def written(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def shown(out) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows them: a start at step n takes back what is of n or later."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((out / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("session_log"):
                found = {tag: [point for point in found[tag] if point[0] < event.step] for tag in found}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_speeds_are_of_the_steps_since_the_last_entry(tmp_path, clock):
    """The first step, which compiles, counts in none; nor does what comes before `rest`."""
    log = Log(tmp_path, 0, FACTS)
    clock[0] = 150.0
    log.rest(1)
    clock[0] = 154.5
    log.write(10, METRICS)
    assert log.latest.startswith("loss 2.500, 2,000 tokens/s, MFU 60.0%, ")
    clock[0] = 200.0
    log.rest(10)
    clock[0] = 210.0
    log.write(20, METRICS)
    first, second = written(tmp_path)
    assert [first[name] for name in ("seconds_per_step", "tokens_per_second", "mfu")] == [0.5, 2000, 0.6]
    assert [second[name] for name in ("seconds_per_step", "tokens_per_second", "mfu")] == [1.0, 1000, 0.3]
    assert [line["learning_rate"] for line in (first, second)] == [9 / 8, 19 / 8]  # step 10 is the tenth
    assert first.items() >= METRICS.items()


def test_what_is_not_known_is_left_out(tmp_path):
    log = Log(tmp_path, 0, StepFacts([0.0], 1000, 1.0, None))
    log.write(1, METRICS)
    (line,) = written(tmp_path)
    assert set(line) == {"step", "loss", "nll", "grad_norm", "learning_rate", "peak_memory"}
    assert "tokens/s" not in log.latest


def test_a_resumed_log_goes_on_after_its_step(tmp_path):
    """In metrics.jsonl, where a line was cut short, and in TensorBoard: no entry stands twice."""
    log = Log(tmp_path, 0, FACTS)
    for step in (1, 2, 3):
        log.record(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    log = Log(tmp_path, 2, FACTS)
    for step in (3, 4):
        log.record(step, {"loss": 10.0 * step})
    log.close()
    assert [(line["step"], line["loss"]) for line in written(tmp_path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert shown(tmp_path) == {"loss": [(1, 1), (2, 2), (3, 30), (4, 40)]}


def test_a_log_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Cut off while it takes back what came after its step, it still has everything."""
    log = Log(tmp_path, 0, FACTS)
    for step in (1, 2, 3):
        log.record(step, {"loss": float(step)})
    log.close()
    before = written(tmp_path)

    def killed(*_):
        assert written(tmp_path) == before
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path, 2, FACTS)
    assert written(tmp_path) == before


def test_a_line_that_is_no_entry_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: .*JSON"):
        Log(tmp_path, 3, FACTS)


def test_of_many_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = Log(tmp_path, 0, FACTS)
    log.write(1, METRICS)
    log.close()
    assert not list(tmp_path.iterdir())
    assert log.latest.startswith("loss 2.500")


def test_memory_is_the_fullest_devices(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"peak_bytes_in_use": n}) for n in (5, 9, 7)])
    assert peak_memory() == 9
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert 50e6 < peak_memory() < 1e12  # this process holds jax, in bytes
