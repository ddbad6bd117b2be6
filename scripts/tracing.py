"""Trace what a model has from its corpus: memorisation against generalisation (arXiv 2407.14985).

index: Index the words of a corpus, to count n-grams and the documents that hold them.
    python scripts/tracing.py index --data=data/documents --out=out/index
    python scripts/tracing.py index --data=data/documents --out=out/index --splits="[train, retrieval]"

table: Make the table of a task: related n-grams of prompts and answers, with their counts in the corpus.
    python scripts/tracing.py table --examples=trivia.jsonl --index=out/index --out=out/trivia3 --n=3 \\
        --encoder=sentences:encode --gamma=0.75
    python scripts/tracing.py table --examples=trivia.jsonl --index=out/index --out=out/trivia5 --n=5 \\
        --encoder=sentences:encode --gamma=0.65 --whole_answer=true

correlate: Correlate a model's probabilities with those of its corpus, with controls.
    python scripts/tracing.py correlate --model=runs/decoder/model --index=out/index --tables=out/trivia3 \\
        --out=out/correlations
    python scripts/tracing.py correlate --model=runs/decoder/model --index=out/index --out=out/correlations \\
        --tables="[out/trivia3, out/trivia5]" --unit=answer --adjustment=benjamini-hochberg

influence: Compare the influence of documents that hold a pair with that of documents that hold its answer alone.
    python scripts/tracing.py influence --models=runs/decoder/model --data=data/documents --index=out/index \\
        --table=out/trivia3 --out=out/influence
    python scripts/tracing.py influence --models="[runs/early/model, runs/decoder/model]" --data=data/documents \\
        --index=out/index --table=out/trivia3 --out=out/influence --parameters="[layers.mlp]"

overlap: Measure how many n-grams of a model's continuations occur in a corpus, which is not tracing.
    python scripts/tracing.py overlap --model=smollm2 --index=out/index --data=data/documents --out=out/overlap
    python scripts/tracing.py overlap --model=smollm2 --index=out/index --data=data/documents --out=out/overlap \\
        --lengths="[1, 5, 13]" --temperatures="[0.7]"

plant: Write a corpus with facts by Zipf's law and a rule, and the tasks that ask for them.
    python scripts/tracing.py plant --out=planted
    python scripts/tracing.py plant --out=planted --examples=300 --filler=1000000
"""

from cepe_jax.commands import run_script
from cepe_jax.tracing.correlate import CorrelateConfig, correlate
from cepe_jax.tracing.index import IndexConfig, build_index
from cepe_jax.tracing.influence import InfluenceConfig, influence
from cepe_jax.tracing.overlap import OverlapConfig, overlap
from cepe_jax.tracing.planted import PlantConfig, plant
from cepe_jax.tracing.table import TableConfig, make_table

COMMANDS = {
    "index": (IndexConfig, build_index),
    "table": (TableConfig, make_table),
    "correlate": (CorrelateConfig, correlate),
    "influence": (InfluenceConfig, influence),
    "overlap": (OverlapConfig, overlap),
    "plant": (PlantConfig, plant),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
