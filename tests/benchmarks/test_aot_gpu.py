"""Steps compiled for GPUs that are not at hand. They need `.[gpu-compiler]` on Python 3.12, and a C compiler:

python -m pip install -c requirements.txt ".[gpu-compiler,test]"
python -m pytest tests/benchmarks/test_aot_gpu.py -m "slow or not slow"
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_cuda12_plugin", reason="the GPU's compiler is not installed")

ROOT = Path(__file__).parents[2]
TINY = "--decoder=tiny", "--encoder=tiny", "--batch_size=8", "--examples.window=256"


def run(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def compile_step(*arguments: str) -> subprocess.CompletedProcess:
    return run("scripts/compile_step.py", "--config", "configs/train_cepe.yaml", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:1x2", "a100:1x2"])
def test_a_step_is_compiled_and_reported(tmp_path, topology):
    done = compile_step(*TINY, f"--topology={topology}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert (result["chips"], result["fits"]) == (2, True)
    assert max(result["cudnn_workspaces"]) > 0
    assert result["collectives"]["all-gather"]["bytes"] > 0
    assert result["seconds_at_least"]["network"] > 0


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path):
    """The 7B step with all its batch at once: the compiler itself refuses nothing."""
    done = compile_step("--topology=h100:1x1", "--batch=32", "--micro_batch=0", f"--out={tmp_path}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"compile_step.py: cepe on h100:1x1 needs \d+\.\d\d GiB .* 79.11 GiB: .*", last)


@pytest.mark.parametrize(
    ("topology", "said"),
    [("h100:8", "hosts x GPUs"), ("h100:1x2x4", "hosts x GPUs"), ("b200:1x8", "topology 'b200:1x8'")],
)
def test_bad_topologies(topology, said):
    done = compile_step(*TINY, f"--topology={topology}")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def test_cudnn_is_asked(monkeypatch):
    """JAX lets no head of 10 numbers pass. Without its check cuDNN refuses it: its calls are not taken on trust."""
    import jax
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention

    from cepe_jax.benchmarks.topologies import topology_of

    topology = topology_of("h100:1x1")
    monkeypatch.setattr(cudnn_attention, "check_is_flash_attention", lambda *_, **__: True)
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    q_BTNH = jax.ShapeDtypeStruct((1, 128, 2, 10), jnp.bfloat16, sharding=place)
    attend = jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="multiple of 8"):
        attend.lower(q_BTNH).compile(compiler_options=topology.options)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("1x1", 1, 16), ("1x2", 2, 1), ("1x2", 2, 16)])
def test_a_token_copies_no_cache_and_gathers_no_table(arguments):
    """The 7B model: beside the cache that is written in place, no array of a stack's or the table's size is made."""
    done = run(__file__, *map(str, arguments))
    assert done.returncode == 0, done.stderr[-2000:]
    made, moved = json.loads(done.stdout.splitlines()[-1])
    assert made == []
    assert moved < 32 << 20


def print_made(shape: str, tensor: str, batch: str) -> None:
    """Print the large arrays that decoding makes, and the bytes of its largest kind of collective."""
    import jax

    from cepe_jax.benchmarks.compiled import CompileConfig, compute_of, make_mesh, sizes_of
    from cepe_jax.benchmarks.hlo import arrays, collectives, instructions
    from cepe_jax.benchmarks.steps import decode_step
    from cepe_jax.benchmarks.topologies import topology_of
    from cepe_jax.settings import parse

    config = parse(
        CompileConfig,
        [f"--config={ROOT}/configs/train_cepe.yaml", f"--topology=h100:{shape}", "--step=decode"]
        + [f"--batch_size={batch}", "--examples.num_chunks=64", "--examples.window=1024"],
    )
    topology = topology_of(config.topology)
    with jax.set_mesh(make_mesh(tensor=int(tensor), devices=topology.devices)):
        step = decode_step(config, sizes_of(config), compute_of(config, "gpu"))
        program = step.function.lower(*step.arguments).compile(compiler_options=topology.options).as_text()
    made = []
    for what in instructions(program):
        result, _, _ = what.partition("(")
        if re.search(r"transpose|copy|all-gather|wrapped", what.split(", metadata")[0]):
            made += [what[:120] for _, shape in arrays(result) if math.prod(shape) > 32 << 20]
    print(json.dumps([made, max((kind["bytes"] for kind in collectives(program).values()), default=0)]))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    print_made(*sys.argv[1:])
