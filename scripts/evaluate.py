"""Evaluate models on held-out text and on tasks, one by one or as a grid, and report the results.

perplexity: Measure the perplexity of one model after contexts of several lengths.
    python scripts/evaluate.py perplexity --model.path=cepe-7b --data=data/documents --out=out/perplexity \\
        --window=4096 --scored=256 --chunks="[0, 16, 112]"
    python scripts/evaluate.py perplexity --model.path=llama-2-7b --model.reads=decoder --data=data/documents \\
        --out=out/decoder --window=2048 --scored=256 --chunks="[0, 4]"

tasks: Ask one model the questions of one task.
    python scripts/evaluate.py tasks --model.path=cepe-7b --family=qa --data=nq.jsonl --axis="[0, 20]" --out=out/nq
    python scripts/evaluate.py tasks --model.path=cepe-7b --family=synthetic --axis="[4096, 32768]" --samples=50 \\
        --out=out/needle
    python scripts/evaluate.py tasks --model.path=cepe-7b --family=qa --data=questions.jsonl --out=out/retrieved \\
        --retrieve.corpus=data/documents --retrieve.k="[0, 1, 5, 20]" --retrieve.chunk=300

sweep: Evaluate every model on every set of data, and go on where an earlier run stopped.
    python scripts/evaluate.py sweep --config configs/eval_qa.yaml --out=out/qa
    python scripts/evaluate.py sweep --config configs/eval_perplexity.yaml --out=out/perplexity --mesh.tensor=2

harness: Ask a model the tasks of lm-evaluation-harness.
    python scripts/evaluate.py harness --model.path=cepe-7b --tasks=niah_single_2 --window=4096 --out=out/harness
    python scripts/evaluate.py harness --model.path=llama-2-7b --model.reads=decoder --tasks=hellaswag --window=2048 \\
        --limit=20 --out=out/hellaswag

rewards: Measure a reward model on pairs of answers, with and without their contexts.
    python scripts/evaluate.py rewards --model=runs/reward/model --data=rpr --out=out/rewards
    python scripts/evaluate.py rewards --model=runs/reward/model --data=rpr --out=out/rewards --labelled="[1, 2, 4]"

gains: Report how much contexts improve perplexity, over runs with several seeds.
    python scripts/evaluate.py gains --runs="[out/seed_0, out/seed_1]" --trained=16 --out=out/gains
    python scripts/evaluate.py gains --runs=out/seed_0 --trained=4 --out=out/gains --new_tokens=64

report: Write the tables and plots of an evaluation again from its stored results.
    python scripts/evaluate.py report --out=out/nq
    python scripts/evaluate.py report --out=out/perplexity
"""

from cepe_jax.commands import run_script
from cepe_jax.evaluation.gains import GainsConfig, gains
from cepe_jax.evaluation.harness import HarnessConfig, run_harness
from cepe_jax.evaluation.rewards import RewardsConfig, evaluate_rewards
from cepe_jax.evaluation.sweep.grid import PerplexityRun, SweepConfig, TaskRun
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.evaluation.sweep.run import run_sweep

COMMANDS = {
    "perplexity": (PerplexityRun, run_sweep),
    "tasks": (TaskRun, run_sweep),
    "sweep": (SweepConfig, run_sweep),
    "harness": (HarnessConfig, run_harness),
    "rewards": (RewardsConfig, evaluate_rewards),
    "gains": (GainsConfig, lambda config: print(gains(config))),
    "report": (ReportConfig, lambda config: print(report(config))),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
