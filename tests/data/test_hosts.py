"""Real processes, each of which loads the rows that its devices hold: the global arrays are one process' batches.

Run as a script it is one of these processes; it prints what the mesh holds of two batches.
"""

import json
import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from support import datasets

from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.recipes import WindowsInContext
from cepe_jax.sharding import make_mesh, place_batch, rows_of

RECIPE = WindowsInContext(ExampleConfig(window=4, num_chunks=1, chunk_length=4))
BATCH = 8


def data_at(path: Path):
    return examples(open_mix(path, {}, RECIPE), [1.0], RECIPE, seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
    tokens = [100 * (i + 1) + np.arange(9) for i in range(20)]
    return datasets.write_sequences(home / "a", tokens, 8, datasets.make_tokenizer(home))


MESHES = [  # sizes, order of the devices, and the rows of each process: 0 and 1 are process 0's devices
    ({"data": 2, "tensor": 2}, [0, 1, 2, 3], ([0, 1, 2, 3], [4, 5, 6, 7])),
    ({"data": 2, "fsdp": 2}, [0, 2, 1, 3], ([0, 1, 4, 5], [2, 3, 6, 7])),
    ({"fsdp": 4}, [3, 1, 0, 2], ([2, 3, 4, 5], [0, 1, 6, 7])),
    ({"tensor": 4}, [0, 1, 2, 3], (list(range(BATCH)), list(range(BATCH)))),
]


@pytest.fixture(scope="module")
def printed(path) -> list[list[dict]]:
    """What two processes of two devices print of each mesh, [process][mesh]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    flags["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
    command = [sys.executable, __file__, str(port), str(path)]
    started = [subprocess.Popen([*command, str(n)], env=flags, stdout=subprocess.PIPE, text=True) for n in range(2)]
    try:
        return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_two_processes_hold_one_batch(path, printed, number):
    """Rows over both processes, over all devices in two orders, and the same rows in both.

    5 to 10 CPU-seconds for two real processes, which no fake of JAX's distributed runtime replaces.
    """
    whole = [batch["tokens"] for batch in islice(batches(data_at(path), BATCH), 2)]
    for process, rows in zip(printed, MESHES[number][2], strict=True):
        shares = process[number]
        assert shares["rows"] == rows
        for batch, total, shards in zip(whole, shares["sums"], shares["shards"], strict=True):
            assert total == (batch * (1 + np.arange(BATCH))[:, None]).sum()
            for first, last, shard in shards:
                np.testing.assert_array_equal(shard, batch[first:last])


def test_one_process_feeds_all_rows():
    mesh = make_mesh(fsdp=jax.device_count())
    assert rows_of(0, mesh, 8) == list(range(8))
    placed = place_batch({"x": np.arange(16).reshape(8, 2)}, mesh, 8)
    assert placed["x"].sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(placed["x"], np.arange(16).reshape(8, 2))


def main(port: str, path: str, process: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=300)
    weighted = jax.jit(lambda x: (x * (1 + np.arange(BATCH))[:, None]).sum())
    results = []
    for sizes, order, _ in MESHES:
        mesh = make_mesh(**sizes, devices=[jax.devices()[i] for i in order])
        rows = rows_of(jax.process_index(), mesh, BATCH)
        results.append({"rows": rows, "sums": [], "shards": []})
        for batch in islice(batches(data_at(Path(path)), BATCH, rows=rows), 2):
            tokens = place_batch(batch, mesh, BATCH)["tokens"]
            results[-1]["sums"].append(int(weighted(tokens)))
            shards = [(*shard.index[0].indices(BATCH)[:2], shard.data.tolist()) for shard in tokens.addressable_shards]
            results[-1]["shards"].append(shards)
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
