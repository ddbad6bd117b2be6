"""What contexts buy on held-out documents: report.json, report.md, perplexity.png."""

from cepe_jax.cli import parse, run
from cepe_jax.evaluation.report import EvaluateConfig, evaluate

if __name__ == "__main__":
    run(lambda: evaluate(parse(EvaluateConfig)))
