"""Score the heads of a decoder and write the scores beside it, for --cache.kind=razor.

python scripts/calibrate.py llama-2-7b --dtype=bfloat16
python scripts/calibrate.py --model=smollm2 --block=1000
"""

from cepe_jax.commands import run_script
from cepe_jax.inference.calibration import CalibrateConfig, calibrate

COMMANDS = {"": (CalibrateConfig, calibrate)}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
