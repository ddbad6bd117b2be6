"""Speeds of one part, as a table and as JSON.

    python scripts/benchmark.py data --input=documents --tokenizer=llama-2-7b --out=out/benchmark
    python scripts/benchmark.py train --config configs/train_cepe.yaml
    python scripts/benchmark.py train --config configs/train_cepe.yaml --decoder=tiny --encoder=tiny --batch_size=8 \\
        --dtype=float32 --examples.window=128 --examples.chunk_length=64
    JAX_PLATFORMS=cpu python scripts/benchmark.py memory --config configs/train_cepe.yaml --mlp_chunk=512
    python scripts/benchmark.py inference
    python scripts/benchmark.py inference --decoder=llama2_7b --encoder=mlm_large --chunk_length=256 --dtype=bfloat16

`train` and `memory` take all settings of train.py too; sizes are the paper's where the configuration names no model.
"""

from cepe_jax.benchmarks.compiled import without_files
from cepe_jax.benchmarks.data import DataBenchmarkConfig, benchmark
from cepe_jax.benchmarks.inference import InferenceBenchmarkConfig, benchmark_inference
from cepe_jax.benchmarks.training import MemoryConfig, TrainBenchmarkConfig, benchmark_memory, benchmark_train
from cepe_jax.cli import run_command
from cepe_jax.training.settings import TrainConfig

COMMANDS = {
    "data": (DataBenchmarkConfig, benchmark),
    "train": (TrainBenchmarkConfig, benchmark_train, TrainConfig, without_files),
    "inference": (InferenceBenchmarkConfig, benchmark_inference),
    "memory": (MemoryConfig, benchmark_memory, TrainConfig, without_files),
}

if __name__ == "__main__":
    run_command(COMMANDS)
