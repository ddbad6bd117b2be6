"""A token of each cache policy, compiled for TPUs: the program holds no copy of the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKENS = 1 << 16, 1 << 18


@pytest.mark.parametrize("kind", ["full", "reattention", "razor"])
def test_a_token_holds_no_copy_of_the_cache(kind):
    """A layer's keys grow by 100 MB. ReAttention keeps the products of 4 queries with all keys, which grow by 3.

    80 CPU-seconds of the TPU's compiler for the three: only its programs show whether it turns the cache around.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (short, short_cache), (long, long_cache) = json.loads(done.stdout.splitlines()[-1])
    assert long_cache - short_cache > {"razor": 100e6}.get(kind, 350e6)
    assert long - short < {"reattention": 8e6}.get(kind, 1e6)


def main(kind: str) -> None:
    """Print the bytes of temporaries and arguments of a token after each number of tokens."""
    import jax

    from cepe_jax.benchmarks.compiled import CompileConfig, make_mesh
    from cepe_jax.benchmarks.steps import decode_step
    from cepe_jax.benchmarks.topologies import topology_of
    from cepe_jax.config import Compute, DecoderConfig
    from cepe_jax.data.examples import ExampleConfig
    from cepe_jax.inference.caches import CacheConfig

    sizes = DecoderConfig(512, 256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=256)
    topology, found = topology_of("v5e:2x2"), []
    cache = CacheConfig(kind, **({"induction": 0.25} if kind == "razor" else {}))
    for tokens in TOKENS:
        examples = ExampleConfig(window=tokens, num_chunks=1, chunk_length=64)
        config = CompileConfig(
            "lm", step="decode", steps=1, batch_size=1, topology="v5e:2x2", out="none", examples=examples, cache=cache
        )
        with jax.set_mesh(make_mesh(devices=topology.devices[:1])):
            step = decode_step(config, sizes, Compute("bfloat16", "splash"))
            memory = step.function.lower(*step.arguments).compile().memory_analysis()
        found.append((memory.temp_size_in_bytes, memory.argument_size_in_bytes))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
