"""Measure the speed of one part, as a table and as JSON.

data: Time the preparation and the loading of data, beside the bare loops that bound them.
    python scripts/benchmark.py data --input=documents --tokenizer=llama-2-7b --out=out/benchmark
    python scripts/benchmark.py data --input=documents --tokenizer=llama-2-7b --out=out/benchmark --workers=8

train: Time a step of training on random weights and tokens, with all settings of train.py.
    python scripts/benchmark.py train --config configs/train_cepe.yaml
    python scripts/benchmark.py train --config configs/train_cepe.yaml --decoder=tiny --encoder=tiny --batch_size=8 \\
        --dtype=float32 --examples.window=128 --examples.chunk_length=64

inference: Time four ways to read a context, or a cache policy, on random weights and tokens.
    python scripts/benchmark.py inference
    python scripts/benchmark.py inference --decoder=llama2_7b --encoder=mlm_large --chunk_length=256 --dtype=bfloat16
    python scripts/benchmark.py inference --cache.kind=razor
"""

from cepe_jax.benchmarks.data import DataBenchmarkConfig, benchmark
from cepe_jax.benchmarks.inference import InferenceBenchmarkConfig, benchmark_inference
from cepe_jax.benchmarks.training import TrainBenchmarkConfig, benchmark_train
from cepe_jax.commands import run_script

COMMANDS = {
    "data": (DataBenchmarkConfig, benchmark),
    "train": (TrainBenchmarkConfig, benchmark_train),
    "inference": (InferenceBenchmarkConfig, benchmark_inference),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
