"""Steps compiled for TPUs that are not at hand, in processes of their own; what the programs of training may not hold.

Run as a script it is such a process: it prints what the compiled step of a tiny model holds.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = {  # sizes of which each can be told from every other in a shape
    "window": 1024,
    "num_chunks": 3,
    "chunk_length": 256,
    "loss_chunk": 128,
    "mlp_chunk": 512,
}
MEMORY = SETTINGS["num_chunks"] * SETTINGS["chunk_length"]
TINY = (
    "--decoder=tiny",
    "--encoder=tiny",
    "--batch_size=8",
    *(f"--examples.{name}={SETTINGS[name]}" for name in ("window", "num_chunks", "chunk_length")),
)


PODS = [("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 2), ("v4:4x4x4", 1), ("v5p:2x4x4", 1), ("v6e:8x8", 1)]


def run(*command: str) -> subprocess.CompletedProcess:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def compile_step(*arguments: str) -> subprocess.CompletedProcess:
    return run("scripts/compile_step.py", "--config", "configs/train_cepe.yaml", *TINY, *arguments)


@pytest.mark.parametrize("step", [pytest.param("train", marks=pytest.mark.slow), "decode"])
def test_a_step_is_compiled_and_reported(tmp_path, step):
    """8 CPU-seconds and more of the TPU compiler: a whole report, as the command writes it."""
    done = compile_step("--topology=v5e:2x2", f"--step={step}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert (
        path.name == {"train": "cepe_v5e_2x2_1x4x1x1x1_8.json", "decode": "cepe_decode_v5e_2x2_1x4x1x1x1_4.json"}[step]
    )
    assert result["config"]["examples"]["window"] == SETTINGS["window"]
    assert result["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1, "memory": 1}
    assert (result["chips"], result["fits"]) == (4, True)
    memory = result["memory"]
    assert memory["hbm"] == 15.75 * 2**30
    assert 0 < memory["aliases"] <= memory["arguments"] < memory["hbm"]
    assert result["collectives"]
    times = result["seconds_at_least"]
    assert result["step_seconds"] == max(times.values())
    assert times["network"] == sum(kind["bytes"] for kind in result["collectives"].values()) / 2e11
    assert result["mfu_at_most"] == pytest.approx(result["model_flops"] / 4 / 1.97e14 / result["step_seconds"])
    assert "15.75 GiB" in done.stdout
    assert "MFU at most" in done.stdout


def test_what_does_not_fit_is_said(tmp_path):
    """16,384 sequences at once on a chip: 6 GiB for each layer's input alone.

    8 CPU-seconds of the TPU compiler: its own words are read.
    """
    done = compile_step("--topology=v5e:2x2", "--batch=65536", "--micro_batch=0", f"--out={tmp_path}")
    assert done.returncode == 1
    assert re.fullmatch(
        r"compile_step.py: cepe on v5e:2x2 .* \d+\.\d\d GiB .* 15.75 GiB: .*",
        done.stderr.splitlines()[-1],
    )
    assert json.loads((tmp_path / "cepe_v5e_2x2_1x4x1x1x1_65536.json").read_text())["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5e:3x3"], "topology v5e:3x3: .*"),
        (["--topology=v9:2x2"], "topology 'v9:2x2': .* v5e:4x4, .*"),
        (["--topology=v5e:2x2", "--batch=6"], "batch_size 6 .* = 4: .*"),
        (["--topology=v5e:2x2", "--mesh.data=3"], "mesh data=3, fsdp=1, .* 3 devices .* 4: .*"),
    ],
)
def test_bad_input(arguments, said):
    done = compile_step("--batch_size=12", *arguments)
    assert done.returncode == 1
    assert re.fullmatch(f"compile_step.py: {said}", done.stderr.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "arguments", "chunks", "most"),
    [("v5e:4x4", ["--mesh.tensor=4", "--memory=4"], 4096, 5), ("v6e:1x1", [], 512, 18)],
)
def test_the_7b_model_decodes_over_long_contexts(tmp_path, topology, arguments, chunks, most):
    """1,048,576 tokens on 16 chips and 131,072 on one, at most `most` GiB each; over the network go sums alone."""
    shared = "--step=decode", "--batch=1", f"--examples.num_chunks={chunks}", "--mesh.fsdp=1", f"--out={tmp_path}"
    done = run(
        "scripts/compile_step.py", "--config", "configs/train_cepe.yaml", f"--topology={topology}", *shared, *arguments
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(next(tmp_path.iterdir()).read_text())
    memory = result["memory"]
    assert memory["peak"] + memory["temporaries"] < most * 2**30
    assert memory["arguments"] > (2 * 8.0e9 + chunks * 256 * 2048) / result["chips"]  # weights read, and the memory
    assert sum(kind["bytes"] for kind in result["collectives"].values()) < 32 * 2**20


def test_a_memory_is_not_cut_in_training():
    done = compile_step("--topology=v5e:2x2", "--memory=2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("compile_step.py: memory is 2 and step train: ")


@pytest.fixture(scope="module")
def held() -> dict:
    done = run(__file__, "held")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_array_of_all_logits_exists(held):
    """Nor of more positions than `loss_chunk` at once, forward or backward."""
    assert held["ours"]["logits"] == SETTINGS["loss_chunk"]
    assert held["stored"]["logits"] == SETTINGS["window"]  # what is looked for is found where the loss is whole


@pytest.mark.slow
def test_no_array_of_all_mlp_activations_exists(held):
    """Nor of more positions than `mlp_chunk` at once."""
    assert held["ours"]["mlp"] == SETTINGS["mlp_chunk"]
    assert held["stored"]["mlp"] >= SETTINGS["window"]


@pytest.mark.slow
def test_no_array_of_scores_exists(held):
    """Neither T x T nor T x M, in any order of their axes."""
    assert held["ours"]["scores"] == []
    assert held["stored"]["scores"]


@pytest.mark.slow
def test_nothing_of_the_frozen_decoder_is_computed(held):
    """No gradient and no copy of its stacks: what has their shape is an argument, passed on as it is."""
    assert held["ours"]["frozen"] == []
    assert held["ours"]["trained"]  # what is looked for is found for what trains


def test_the_peak_is_of_the_chip_alone():
    """Inputs of 8 layers, 64 MiB each, are the host's or the chip's: the compiler's own peak counts both.

    8 CPU-seconds of the TPU compiler: what it says of a program decides which windows are said to fit.
    """
    done = run(__file__, "offloaded")
    assert done.returncode == 0, done.stderr[-2000:]
    offloaded, kept = json.loads(done.stdout.splitlines()[-1])
    assert (offloaded["host"], kept["host"]) == (8 << 26, 0)
    assert kept["peak"] >= 8 << 26
    assert offloaded["peak"] <= kept["peak"] - (5 << 26)  # up to three are on their way at once


@pytest.mark.slow
def test_the_longest_window_has_room_for_splash_s_tables():
    """524,288 tokens of several texts, forward and backward: twice as many need 2 MiB of SMEM, and there is one."""
    done = run(__file__, "long")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "3"  # calls: forward, and two backward


def test_the_processes_of_a_pod_feed_the_batch():
    """Every row by each process a device of which holds it, and by no other; a host's rows need not be contiguous."""
    done = run(__file__, "rows")
    assert done.returncode == 0, done.stderr[-2000:]
    gaps = set()
    for pod, of_devices, of_processes in json.loads(done.stdout.splitlines()[-1]):
        holders = {row: set() for row in range(256)}
        for process, first, last in of_devices:
            for row in range(first, last):
                holders[row].add(process)
        feeders = {row: {process for process, rows in enumerate(of_processes) if row in rows} for row in range(256)}
        assert feeders == holders
        assert all(holders.values())
        assert all(rows == sorted(set(rows)) for rows in of_processes)
        gaps |= {pod for rows in of_processes if rows[-1] - rows[0] >= len(rows)}
    assert gaps >= {"v5e:4x4", "v5e:8x8", "v4:4x4x4", "v5p:2x4x4", "v6e:8x8"}


def print_rows() -> None:
    """For each pod (process, first row, last row + 1) of every device, and the rows that each process feeds."""
    from cepe_jax.benchmarks.topologies import topology_of
    from cepe_jax.sharding import make_mesh, rows_of

    found = []
    for pod, tensor in PODS:
        devices = topology_of(pod).devices
        mesh = make_mesh(fsdp=len(devices) // tensor, tensor=tensor, devices=devices)
        size = 256 // (len(devices) // tensor)
        of_devices = [
            (device.process_index, size * place, size * (place + 1))
            for place, row in enumerate(mesh.devices.reshape(-1, tensor))
            for device in row
        ]
        processes = range(1 + max(device.process_index for device in devices))
        found.append((pod, of_devices, [rows_of(process, mesh, 256) for process in processes]))
    print(json.dumps(found))


def print_offloaded() -> None:
    """Print the memory of a gradient through 8 layers whose inputs are offloaded to the host, and kept."""
    import jax
    import jax.numpy as jnp
    from jax.ad_checkpoint import checkpoint_name

    from cepe_jax.benchmarks.compiled import memory_of
    from cepe_jax.benchmarks.topologies import topology_of

    place = jax.sharding.SingleDeviceSharding(topology_of("v5e:1x1").devices[0])
    w_LDD, x_TD = (jax.ShapeDtypeStruct(shape, "bfloat16", sharding=place) for shape in ((8, 512, 512), (1 << 16, 512)))

    def layer(x_TD, w_DD):
        return jnp.tanh(checkpoint_name(x_TD, "input") @ w_DD), None

    found = []
    for kept, offloaded in ([], ["input"]), (["input"], []):
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
        stack = jax.checkpoint(layer, policy=policy)
        gradient = jax.grad(lambda w_LDD, x_TD, stack=stack: jax.lax.scan(stack, x_TD, w_LDD)[0].sum())
        found.append(memory_of(jax.jit(gradient).lower(w_LDD, x_TD).compile()))
    print(json.dumps(found))


def print_long() -> None:
    """Print the number of splash's calls in the gradient of attention in a long window."""
    import jax

    from cepe_jax.benchmarks.hlo import instructions
    from cepe_jax.benchmarks.topologies import topology_of
    from cepe_jax.model.kernels import splash

    place = jax.sharding.SingleDeviceSharding(topology_of("v5e:1x1").devices[0])
    q_BTNH, segments_BT = (
        jax.ShapeDtypeStruct((1, 1 << 19, *shape), dtype, sharding=place)
        for shape, dtype in (((1, 128), "bfloat16"), ((), "int32"))
    )
    gradient = jax.grad(lambda q, ids: splash(True, q, q, q, (ids, ids)).astype("float32").sum())
    program = jax.jit(gradient).lower(q_BTNH, segments_BT).compile().as_text()
    print(sum("tpu_custom_call" in what for what in instructions(program)))


def print_held() -> None:
    """Compiles our step, and one that stores scores and logits, and prints what each holds."""
    import jax

    from cepe_jax.benchmarks.compiled import train_step
    from cepe_jax.benchmarks.hlo import arrays, instructions
    from cepe_jax.benchmarks.topologies import topology_of
    from cepe_jax.config import DECODERS, ENCODERS
    from cepe_jax.data.examples import ExampleConfig
    from cepe_jax.sharding import make_mesh
    from cepe_jax.training.settings import RematConfig, TrainConfig, compute_of, sizes_of

    shapes = ExampleConfig(*(SETTINGS[name] for name in ("window", "num_chunks", "chunk_length")))
    # Head dimensions of 64 and odd sizes of all else: no two axes are alike.
    DECODERS["tiny"] = dataclasses.replace(DECODERS["tiny"], head_dim=64, num_layers=5, mlp_width=448, vocab_size=3000)
    ENCODERS["tiny"] = dataclasses.replace(ENCODERS["tiny"], head_dim=64, num_layers=7, vocab_size=3001)
    base = TrainConfig("cepe", Path("d"), Path("o"), 10, 4, decoder="tiny", encoder="tiny", examples=shapes)
    base = dataclasses.replace(base, dtype="bfloat16", remat=RematConfig("full", "full"))

    def compiled(backend: str, **chunks: int) -> str:
        config = dataclasses.replace(base, attention=backend, **chunks)
        with jax.set_mesh(make_mesh(fsdp=4, devices=topology_of("v5e:2x2").devices)):
            step = train_step(config, sizes_of(config), compute_of(config, "tpu"))
            return step.function.lower(*step.arguments).compile().as_text()

    def positions_of_logits(program: str) -> int:
        """The most positions of which an array holds the whole vocabulary."""
        with_vocabulary = [shape for _, shape in arrays(program) if 3000 in shape]
        return max(size for shape in with_vocabulary for size in shape if size in (1024, 512, 256, 128))

    def positions_of_mlp(program: str) -> int:
        """The most positions of which an array that is no weight holds the decoder's MLP activations."""
        shapes = {shape for _, shape in arrays(program) if 448 in shape}
        return max(math.prod(shape) // 448 for shape in shapes if not {192, 192 // 4} & set(shape))

    def scores(program: str) -> list:
        pairs = {(1024, 1024), (1024, MEMORY), (MEMORY, 1024)}
        found = {shape for _, shape in arrays(program) if pairs & {(a, b) for a in shape for b in shape if a != b}}
        return sorted(found | {shape for _, shape in arrays(program) if shape.count(1024) > 1})

    def computed(program: str, layers: int, width: int) -> list[str]:
        """Instructions that compute an array of a stack's shape, (layers, ., width): they do not pass it on."""
        passing = " parameter(", " get-tuple-element(", " bitcast(", " while(", " tuple(", " optimization-barrier("
        made = []
        for text in instructions(program):
            result = text.split("(")[0]
            is_stack = any(shape[0] == layers and width in shape for _, shape in arrays(result) if len(shape) > 2)
            if is_stack and not any(word in text for word in passing):
                made.append(text[:150])
        return made

    chunks = {name: SETTINGS[name] for name in ("loss_chunk", "mlp_chunk")}
    programs = {"ours": compiled("splash", **chunks), "stored": compiled("xla")}
    held = {
        name: {
            "logits": positions_of_logits(program),
            "mlp": positions_of_mlp(program),
            "scores": scores(program),
            "frozen": computed(program, 5, 448),
            "trained": computed(program, 7, 512),
        }
        for name, program in programs.items()
    }
    print(json.dumps(held))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    {"held": print_held, "long": print_long, "offloaded": print_offloaded, "rows": print_rows}[sys.argv[1]]()
