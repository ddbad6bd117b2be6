"""Converting streams: the process stays far smaller than the directory, pages of mapped files included."""

import json
import subprocess
import sys

import pytest

from cepe_jax.config import CepeConfig, CrossLayers, DecoderConfig, EncoderConfig
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.kinds import to_hf_config

CONFIG = CepeConfig(
    DecoderConfig(
        vocab_size=32_000, width=1024, num_layers=20, num_heads=16, num_kv_heads=16, head_dim=64, mlp_width=2816
    ),
    EncoderConfig(vocab_size=32_001, width=512, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, mlp_width=2048),
    cross_layers=CrossLayers("last", 4),
)
BOUND = 800 << 20

CONVERT = """
import sys
from cepe_jax.weights import files
from cepe_jax.weights.convert import to_hf, to_jax
files.SHARD_BYTES = 1 << 27
source, target, direction = sys.argv[1:]
{"to-jax": to_jax, "to-hf": to_hf}[direction](source, target)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) << 10)
"""


def write_zeros(path, config: CepeConfig) -> int:
    """A checkpoint of zeros in fp32 at `path`: one shard with a hole in place of the data; its size in bytes."""
    path.mkdir()
    header, size = {}, 0
    for entry in table(config).values():
        length = 4
        for axis in entry.shape:
            length *= axis
        header[entry.key] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    (path / "config.json").write_text(json.dumps(to_hf_config(config, {}, "float32")))
    return size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_is_bounded(tmp_path):
    size = write_zeros(tmp_path / "hf", CONFIG)
    assert size > 1.3e9 > 1.5 * BOUND
    for source, target, direction in (("hf", "ours", "to-jax"), ("ours", "back", "to-hf")):
        command = [sys.executable, "-c", CONVERT, str(tmp_path / source), str(tmp_path / target), direction]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) < BOUND, f"{direction} peaked at {int(done.stdout) >> 20} MiB"
