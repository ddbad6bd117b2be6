"""Compiles a step for TPUs that are not at hand, on a CPU: whether it fits, and what time it allows.

    python scripts/compile_tpu.py --config configs/train_cepe.yaml --topology=v5e:4x4
    python scripts/compile_tpu.py --config configs/train_cepe.yaml --topology=v5e:4x4 --stage=decode --batch=16

All settings of train.py are settings here too; sizes are the paper's where the configuration names no model. The exit
status is 1 where the step does not fit. It needs `jax[tpu]`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the compiler's own devices are not at hand

from cepe_jax.benchmarks.compiled import CompileConfig, check_fits, compile_step, table, train_step, without_files
from cepe_jax.benchmarks.steps import STEPS
from cepe_jax.cli import parse, run, take
from cepe_jax.training.settings import TrainConfig


def main() -> None:
    what = take(CompileConfig)
    result = compile_step(what, parse(TrainConfig, without_files), STEPS.get(what.stage, train_step))
    check_fits(result)
    print(table(result))


if __name__ == "__main__":
    run(main)
