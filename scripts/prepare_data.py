"""Datasets for training: tokenised documents, then sequences sampled from them, then passages found for those.

python scripts/prepare_data.py --input=documents --out=data/documents --tokenizer=llama-2
python scripts/prepare_data.py sample --config configs/sample_filtered.yaml --data=data/documents --out=data/filtered
"""

import sys

from cepe_jax.cli import parse, run
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.sampling import SampleConfig, sample

COMMANDS = {"documents": (PrepareConfig, prepare), "sample": (SampleConfig, sample)}


def main() -> None:
    word = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "documents"
    if word not in COMMANDS:
        raise ValueError(f"unknown command {word}: give one of {', '.join(COMMANDS)}")
    config_class, command = COMMANDS[word]
    command(parse(config_class))


if __name__ == "__main__":
    run(main)
