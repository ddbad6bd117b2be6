"""Compile steps for TPUs or GPUs that are not at hand, on a CPU. All settings of train.py are settings here too.

step: Print a step's memory and the time it allows; the exit status is 1 if it does not fit.
    python scripts/compile_step.py --config configs/train_cepe.yaml --topology=v5e:4x4
    python scripts/compile_step.py --config configs/train_cepe.yaml --topology=h100:1x8 --step=decode --batch=16

longest: Search for the longest window that a chip can train, by what is kept of the forward pass.
    python scripts/compile_step.py longest --config configs/tune_sft.yaml --decoder=llama3_8b --topology=h100:1x1 \\
        --examples.window=8192
    python scripts/compile_step.py longest --stage=lm --decoder=llama3_8b --steps=1 --batch_size=1 --dtype=bfloat16 \\
        --topology=v5p:2x2x1 --examples.window=8192
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the compiler's own devices are not at hand
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else the GPU's compiler tells what it cannot rematerialise

from cepe_jax.benchmarks.compiled import CompileConfig
from cepe_jax.benchmarks.memory import LongestConfig, search_and_print
from cepe_jax.benchmarks.steps import compile_and_print
from cepe_jax.commands import run_script

COMMANDS = {
    "": (CompileConfig, compile_and_print),
    "step": (CompileConfig, compile_and_print),
    "longest": (LongestConfig, search_and_print),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
