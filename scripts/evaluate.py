"""What contexts buy: models on held-out text and on tasks, one by one or as a grid; and the report of what was kept.

    python scripts/evaluate.py perplexity --model.path=cepe-7b --data=data/documents --out=out/perplexity \\
        --window=4096 --scored=256 --chunks="[0, 16, 112]"
    python scripts/evaluate.py tasks --model.path=cepe-7b --family=qa --data=nq.jsonl --axis="[0, 20]" --out=out/nq
    python scripts/evaluate.py harness --model.path=cepe-7b --tasks=niah_single_2 --window=4096 --out=out/harness
    python scripts/evaluate.py report --out=out/nq
    python scripts/evaluate.py gains --runs="[out/seed_0, out/seed_1]" --trained=16 --out=out/gains
"""

from cepe_jax.cli import run_command
from cepe_jax.evaluation.gains import GainsConfig, gains
from cepe_jax.evaluation.harness import HarnessConfig, run_harness
from cepe_jax.evaluation.sweep.grid import PerplexityRun, SweepConfig, TaskRun
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.evaluation.sweep.run import run_sweep

COMMANDS = {
    "perplexity": (PerplexityRun, run_sweep),
    "tasks": (TaskRun, run_sweep),
    "sweep": (SweepConfig, run_sweep),
    "harness": (HarnessConfig, run_harness),
    "gains": (GainsConfig, lambda config: print(gains(config))),
    "report": (ReportConfig, lambda config: print(report(config))),
}

if __name__ == "__main__":
    run_command(COMMANDS)
