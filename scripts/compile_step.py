"""Compile a step for TPUs or GPUs that are not at hand, on a CPU, and print its memory and the time it allows.

    python scripts/compile_step.py --config configs/train_cepe.yaml --topology=v5e:4x4
    python scripts/compile_step.py --config configs/train_cepe.yaml --topology=h100:1x8 --step=decode --batch=16

All settings of train.py are settings here too. The exit status is 1 if the step does not fit.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the compiler's own devices are not at hand
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else the GPU's compiler tells what it cannot rematerialise

from cepe_jax.benchmarks.compiled import CompileConfig
from cepe_jax.benchmarks.steps import compile_and_print
from cepe_jax.commands import run_script

COMMANDS = {"": (CompileConfig, compile_and_print)}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
