"""Many real processes train as one: its losses, files and model, whatever their number; a lost one ends the others.

Run as a script it is one of these processes: scripts/train.py, which is cut off before it reads a given batch.
"""

import dataclasses
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import datasets, models

from cepe_jax.config import CrossLayers
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.distributed import LOST_STATUS, DistributedConfig, tells_of_a_lost_peer
from cepe_jax.exits import STOPPED
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.training import run
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import load, save

SCRIPT = Path(__file__).parents[2] / "scripts/train.py"
DEVICES = 4
MESH = ["--mesh.fsdp=2", "--mesh.tensor=2"]
STEPS = 8
# At the usual eps the first step divides rounding noise by itself.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.25, weight_decay=0.1, eps=1e-3)
EXAMPLES = ExampleConfig(window=8, num_chunks=2, chunk_length=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """data/ and model/, a tiny CEPE, and the run of one process with one device, whole/."""
    home = tmp_path_factory.mktemp("processes")
    tokenizer = datasets.make_tokenizer(home)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, tokenizer.vocab_size, 17).astype(np.uint16) for _ in range(40)]
    datasets.write_sequences(home / "data", tokens, 16, tokenizer)
    decoder_config = dataclasses.replace(models.DECODER, vocab_size=tokenizer.vocab_size)
    encoder_config = dataclasses.replace(models.ENCODER, vocab_size=tokenizer.vocab_size + 1, mlm_head=False)
    key = jax.random.key(0)
    decoder = models.filled(lambda: Llama(decoder_config, key=key), seed=1)
    encoder = models.filled(lambda: Encoder(encoder_config, key=key), seed=2)
    cross = models.filled(
        lambda: cross_from_self_attention(decoder, encoder_config, CrossLayers("last", 2), "normal", key=key), seed=3
    )
    save(Cepe(decoder, encoder, cross), home / "model")
    start = {"cepe": str(home / "model"), "train": ("cross",), "examples": EXAMPLES, "optimizer": OPTIMIZER}
    start |= {"save_every": 2, "log_every": 1}
    run_stage(TrainConfig("cepe", home / "data", home / "whole", STEPS, 8, **start))
    return home


def settings(home: Path, out: Path, **changes) -> list[str]:
    values = {"stage": "cepe", "data": home / "data", "cepe": home / "model", "out": out}
    values |= {"train": "[cross]", "steps": STEPS, "batch_size": 8, "save_every": 2, "log_every": 1}
    for group, fields in ("optimizer", OPTIMIZER), ("examples", EXAMPLES):
        values |= {f"{group}.{name}": json.dumps(value) for name, value in dataclasses.asdict(fields).items()}
    return [f"--{name}={value}" for name, value in (values | changes).items()] + MESH


def start(home: Path, count: int, arguments: list[str], stop=-1, dying=-1, how="KILL", folders=()) -> list["Process"]:
    """`count` processes with four devices in all, each in a folder of its own if given.

    Before they read batch `stop`, all are interrupted, or the one whose number is `dying` gets the signal `how`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0",
        "PYTHONPATH": f"{SCRIPT.parents[1]}:{SCRIPT.parents[1] / 'tests'}",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, str(stop), str(dying), how, *arguments]
    if count > 1:
        command += [f"--distributed.coordinator=localhost:{port}", f"--distributed.num_processes={count}"]
    numbers = [[f"--distributed.process_id={number}"] if count > 1 else [] for number in range(count)]
    folders = folders or [home] * count
    return [Process([*command, *number], flags, folder) for number, folder in zip(numbers, folders, strict=True)]


class Process(subprocess.Popen):
    """A process that prints into a file: a pipe that nobody reads would stop it."""

    def __init__(self, command: list[str], flags: dict[str, str], folder: Path):
        folder.mkdir(exist_ok=True)
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        super().__init__(command, env=flags, cwd=folder, stdout=self.printed, stderr=subprocess.STDOUT)

    def text(self) -> str:
        self.printed.seek(0)
        return self.printed.read()


def ended(processes: list[Process], seconds: float = 600) -> list[int]:
    """The exit status of each."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["nll"]) for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def assert_equals_whole(home: Path, out: Path) -> None:
    steps, values = zip(*losses(out), strict=True)
    wanted_steps, wanted = zip(*losses(home / "whole"), strict=True)
    assert steps == wanted_steps == tuple(range(1, STEPS + 1))
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    ours, wanted = (jax.tree.leaves(load(home_of / "model")) for home_of in (out, home / "whole"))
    begun = jax.tree.leaves(load(home / "model"))
    assert max(models.relative_error(a, b) for a, b in zip(ours, wanted, strict=True)) < 1e-5
    assert sum(models.relative_error(a, c) > 1e-3 for a, c in zip(ours, begun, strict=True)) == 5  # cross-attention


def resumed_at(process: Process) -> int:
    return int(re.search(r"resumed at step (\d+) of", process.text())[1])


def test_a_lost_process_ends_the_others_and_the_run_goes_on(home, tmp_path):
    """One of two is killed. The other says where, and ends; one process goes on from the checkpoint that it named.

    40 CPU-seconds for three real processes: only the runtime itself shows what a lost peer does to the others.
    """
    out = tmp_path / "out"
    first, killed = start(home, 2, settings(home, out), stop=4, dying=1)
    assert ended([first, killed])[1] == -signal.SIGKILL
    if first.returncode != -signal.SIGABRT:  # the runtime may notice before a collective does
        assert first.returncode == LOST_STATUS, first.text()
        lost = re.search(r"train.py: process 0: .*lost by step (\d): .* from step (\d) ", first.text())
        assert int(lost[1]) in (5, 6, 7)  # steps are dispatched before those before them are done
    [alone] = start(home, 1, settings(home, out))
    assert ended([alone]) == [0], alone.text()
    assert resumed_at(alone) in (2, 4)
    if first.returncode == LOST_STATUS:
        assert resumed_at(alone) in (int(lost[2]), 4)  # the one of step 4 may be whole an instant later
    assert_equals_whole(home, out)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(home, tmp_path):
    """One process, then two, then four, then one, each cut off after a checkpoint that the next restores."""
    out = tmp_path / "out"
    for count, stop in (1, 2), (2, 4), (4, 6), (1, -1):
        processes = start(home, count, settings(home, out), stop)
        assert ended(processes) == [0 if stop < 0 else 1] * count, [process.text() for process in processes]
        assert stop == 2 or resumed_at(processes[0]) == (stop if stop > 0 else 8) - 2
        assert all("parameters train" not in process.text() for process in processes[1:])
    assert_equals_whole(home, out)


@pytest.mark.slow
def test_what_one_process_finds_damaged_ends_all(home, tmp_path):
    """Each process reads its own part of a checkpoint; none waits for one that cannot for longer than a heartbeat."""
    out = tmp_path / "out"
    assert ended(start(home, 2, settings(home, out), stop=4)) == [1, 1]
    for file in (out / "checkpoints/4/state/ocdbt.process_1/d").iterdir():
        os.truncate(file, 10)
    processes = start(home, 2, settings(home, out, **{"distributed.heartbeat_seconds": 10}))
    status = ended(processes)
    assert sorted({1, LOST_STATUS, -signal.SIGABRT} | set(status)) == [-signal.SIGABRT, 1, LOST_STATUS]
    assert 1 in status
    refusal = processes[status.index(1)].text()
    assert re.search(r"train.py: \S*checkpoints/4: damaged \(.*: remove it .*\(there is: 2\)", refusal)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(home, tmp_path):
    """SIGTERM to the second of two: both save the same step, and say by their status that they go on."""
    out = tmp_path / "out"
    processes = start(home, 2, settings(home, out, steps=1_000_000, save_every=1_000_000))
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not losses(out):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].text()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == [STOPPED, STOPPED], [process.text() for process in processes]
    step = int(re.search(r"stopped after step (\d+) of 1000000", processes[0].text())[1])
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(step)]
    assert not (out / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_silent_process_ends_the_others(home, tmp_path, lost):
    """One of two stops without an end; a heartbeat of 10 s later the other ends."""
    processes = start(
        home, 2, settings(home, tmp_path / "out", **{"distributed.heartbeat_seconds": 10}), 4, lost, "STOP"
    )
    other = processes[1 - lost]
    try:
        os.waitpid(processes[lost].pid, os.WUNTRACED)
        begun = time.monotonic()
        assert other.wait(60) in (LOST_STATUS, -signal.SIGABRT)
        assert time.monotonic() - begun < 40
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_each_process_with_its_own_directory_is_refused(home, tmp_path):
    processes = start(home, 2, [*settings(home, "out")], folders=[tmp_path / "a", tmp_path / "b"])
    status = ended(processes)
    assert status[1] == 1
    assert status[0] != 0
    assert re.search(r"config\.json .*process 1: .*--out", processes[1].text())


def test_processes_that_do_not_come_are_not_waited_for(home, tmp_path):
    first, second = start(home, 2, settings(home, tmp_path / "out", **{"distributed.start_seconds": 3}))
    second.kill()
    assert ended([first]) == [LOST_STATUS]
    assert re.search(r"train.py: .* localhost:\d+ .* 3 s: ", first.text())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "a:1", "num_processes": 2}, "coordinator, num_processes and process_id"),
        ({"process_id": 0}, "coordinator, num_processes and process_id"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator is a: .*host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2: 2 processes"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**settings)


RUNTIME_ERROR = jax.errors.JaxRuntimeError
GLOO = "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    ("kind", "message", "lost"),
    [
        (RUNTIME_ERROR, GLOO, True),
        (ValueError, GLOO, True),  # as it comes out of float(x)
        (RUNTIME_ERROR, "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        (RUNTIME_ERROR, "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", True),
        (RUNTIME_ERROR, "UNAVAILABLE: Socket closed\nremote target coordination_service while calling", True),
        (ValueError, "step 3: the loss is not finite: look at its records: linux_docs/heartbeat.rst, Gloo.md", False),
        (ValueError, "gloo/data: no such dataset", False),
        (ConnectionResetError, "[Errno 104] Connection reset by peer", False),
        (ValueError, "UNAVAILABLE: CURL error: Recv failure: Connection reset by peer", False),  # a bucket
        (RUNTIME_ERROR, "RESOURCE_EXHAUSTED: NCCL operation failed: out of memory", False),
        (RUNTIME_ERROR, "INTERNAL: RESOURCE_EXHAUSTED: NCCL out of memory", False),
        (RUNTIME_ERROR, "INTERNAL: a chip halted", False),
        (RuntimeError, "the gloo of records", False),
    ],
)
def test_a_lost_peer_is_told_by_the_runtime_alone(kind, message, lost):
    assert tells_of_a_lost_peer(kind(message)) == lost

    def save():
        try:
            raise kind(message)
        except Exception:
            raise OSError("/runs/gloo/checkpoints: a checkpoint was not written") from None

    with pytest.raises(OSError, match="not written") as raised:
        save()
    assert tells_of_a_lost_peer(raised.value) == lost


def main(stop: int, dying: int, how: str) -> None:
    unlimited = run.batches

    def cut_off(data, batch_size, first, *rest):
        for number, batch in enumerate(unlimited(data, batch_size, first, *rest), first):
            if number == stop and dying < 0:
                raise KeyboardInterrupt
            if number == stop and dying == jax.process_index():
                os.kill(os.getpid(), getattr(signal, f"SIG{how}"))
            yield batch

    run.batches = cut_off
    sys.argv = [str(SCRIPT), *sys.argv[4:]]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
