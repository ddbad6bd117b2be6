"""Memorisation and generalisation in a toy: facts by Zipf's law are traced to their documents, a rule is not.

A decoder is trained from random weights on a planted corpus, and everything after it is what the commands do. Three
seeds take some minutes: a command by itself, `pytest -m slow -s tests/tracing/test_toy_tracing.py`.
"""

import json
from itertools import islice

import jax
import optax
import pytest

from cepe_jax.config import DecoderConfig, RopeConfig
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.recipes import Windows
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.tracing.correlate import CorrelateConfig, correlate
from cepe_jax.tracing.index import IndexConfig, build_index
from cepe_jax.tracing.influence import InfluenceConfig, influence
from cepe_jax.tracing.planted import PlantConfig, plant
from cepe_jax.tracing.table import TableConfig, make_table
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.trainer import init_state, make_train_step
from cepe_jax.weights.source import save

pytestmark = pytest.mark.slow
WINDOW, ROWS, STEPS, RATE = 64, 32, 900, 2e-3
CHECKPOINTS = 300, 600, 900  # steps
SIZES = {"width": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 24, "mlp_width": 256}
ENCODER = "cepe_jax.tracing.spelling:trigrams"
# The tests' environment turns LLVM's optimisations off, without which a step takes two to three times as long.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def trained(home, seed: int) -> None:
    """Write a planted corpus and checkpoints of a decoder that is trained on it."""
    plant(PlantConfig(out=home / "planted", seed=seed))
    shares = {"retrieval_fraction": 0.0, "test_fraction": 0.01, "seed": seed}
    prepare(PrepareConfig(input=home / "planted/documents", out=home / "data", vocab_size=512, workers=1, **shares))
    sample(SampleConfig(data=home / "data", out=home / "packed", kind="packed", length=WINDOW, workers=1, seed=seed))
    recipe = Windows(ExampleConfig(WINDOW, num_chunks=1, chunk_length=1))
    sources = open_mix(home / "packed", {}, recipe)
    config = DecoderConfig(vocab_size=sources[0].records.tokenizer.vocab_size, rope=RopeConfig(theta=1000.0), **SIZES)
    model = jax.jit(lambda key: Llama(config, key=key))(jax.random.key(seed))
    trainable, frozen = split(model, ("decoder",))
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, 100, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    step = make_train_step(NextToken(), optimizer, Llama).__wrapped__
    step = jax.jit(step, donate_argnums=0, compiler_options=OPTIMIZED)
    state = init_state(trainable, optimizer)
    data = examples(sources, [1.0], recipe, seed)
    for number, batch in enumerate(islice(batches(data, ROWS), STEPS), 1):
        state, metrics = step(state, frozen, batch)
        if number in CHECKPOINTS:
            print(f"step {number}", {name: round(float(x), 3) for name, x in metrics.items()})
            save(Llama.from_parts(state.trainable), home / f"step{number}", assets=home / "data")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_facts_are_traced_and_a_rule_is_not(seed, tmp_path):
    trained(tmp_path, seed)
    build_index(IndexConfig(data=tmp_path / "data", out=tmp_path / "index"))
    found, model = {}, tmp_path / f"step{CHECKPOINTS[-1]}"
    for task in ("facts", "rule"):
        places = {"examples": tmp_path / f"planted/{task}.jsonl", "index": tmp_path / "index", "out": tmp_path / task}
        make_table(TableConfig(**places, encoder=ENCODER, gamma=-0.01, n=2))
        settings = {"model": model, "index": tmp_path / "index", "tables": (tmp_path / task,)}
        for unit in ("pair", "answer"):
            out = tmp_path / f"{task}_{unit}"
            correlate(CorrelateConfig(out=out, **settings, resamples=400, unit=unit))
            found[task, unit] = json.loads((out / "correlate.json").read_text())["correlations"][0]
    models = tuple(tmp_path / f"step{number}" for number in CHECKPOINTS)
    places = {"models": models, "data": tmp_path / "data", "index": tmp_path / "index", "table": tmp_path / "facts"}
    influence(InfluenceConfig(**places, out=tmp_path / "influence", targets=40, documents=50, batch_size=10))
    result = json.loads((tmp_path / "influence/influence.json").read_text())
    difference = result["means"]["difference"]
    for unit in ("pair", "answer"):
        facts, rule = found["facts", unit], found["rule", unit]
        assert facts["rho"] > 0.4
        assert facts["adjusted_p"] < 0.01
        assert facts["permuted_p"] < 0.01
        low, high = facts["permuted"]
        assert -0.2 < low < 0 < high < 0.2
        assert rule["rho_p"] > 0.05
    assert difference["mean"] > 3 * difference["stderr"]
    assert result["larger"] > 0.9
