"""Files of text to a tokenised dataset, with a tokenizer trained on them or given."""

from cepe_jax.cli import parse, run
from cepe_jax.data.corpus import PrepareConfig, prepare

if __name__ == "__main__":
    run(lambda: prepare(parse(PrepareConfig)))
