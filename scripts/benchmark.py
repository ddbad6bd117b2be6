"""Speeds of one part, as a table and as JSON.

python scripts/benchmark.py data --input=documents --tokenizer=llama-2-7b --out=out/benchmark
"""

from cepe_jax.cli import run_command
from cepe_jax.data.benchmark import DataBenchmarkConfig, benchmark

COMMANDS = {"data": (DataBenchmarkConfig, benchmark)}

if __name__ == "__main__":
    run_command(COMMANDS)
