"""What reward models learn of contexts: in the prompt, and read by CEPE's encoder; planted pairs, three seeds.

27 CPU-minutes: these say that a context is used as it should be, on models that learn it from random weights.
"""

import json
from itertools import islice

import jax
import optax
import pytest

from cepe_jax.config import ContextRewardConfig, CrossLayers, DecoderConfig, EncoderConfig, RewardConfig, RopeConfig
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.planted import PlantConfig, plant
from cepe_jax.data.preferences import IN_PROMPT, NEGATED, PreferenceConfig, prepare_preferences
from cepe_jax.data.recipes import PairsOfAnswers
from cepe_jax.data.tokenizer_training import train
from cepe_jax.evaluation.rewards import RewardsConfig, evaluate_rewards
from cepe_jax.model.parts import split
from cepe_jax.model.reward import Reward
from cepe_jax.training.objectives import BradleyTerry
from cepe_jax.training.trainer import init_state, make_train_step
from cepe_jax.weights.source import save

pytestmark = pytest.mark.slow
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
WIDTH, PAIRS, RATE = 64, 64, 1e-3
STEPS = {"encoder": 1000, "prompt": 1800}
WINDOWS = {"encoder": 16, "prompt": 40}
# The tests' environment turns LLVM's optimisations off, without which a step takes two to three times as long.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def sizes(vocab_size: int, layers: int) -> dict:
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": WIDTH // 4, "mlp_width": 2 * WIDTH}
    return {"vocab_size": vocab_size, "width": WIDTH, "num_layers": layers, "rope": RopeConfig(theta=1000.0)} | heads


def learnt(route: str, seed: int, home, negations: float = 0.3) -> dict[str, dict[str, float]]:
    """Return accuracies after training on 20,000 rows: of criteria that training lacks, and of negated ones."""
    plant(PlantConfig(out=home / "raw", rows=20_000, test_rows=300, negations=negations, seed=seed))
    rows = [json.loads(line) for line in (home / "raw/train/rows.jsonl").read_text().splitlines()[:2000]]
    said = IN_PROMPT.format(prompt=rows[0]["prompt"], context=NEGATED.format(context=""))
    train([*(value for row in rows for value in row.values()), *[said] * 2000], 420, home / "tokenizer.model")
    settings = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (home / "tokenizer_config.json").write_text(json.dumps(settings))
    given = {"input": home / "raw/train", "out": home / "data", "tokenizer": str(home), "context": route}
    prepare_preferences(PreferenceConfig(**given))

    recipe = PairsOfAnswers(ExampleConfig(WINDOWS[route], num_chunks=1, chunk_length=16), route == "encoder")
    sources = open_mix(home / "data", {}, recipe)
    vocabulary = sources[0].records.tokenizer.vocab_size
    decoder = DecoderConfig(**sizes(vocabulary, 2))
    config = RewardConfig(decoder)
    if route == "encoder":
        config = ContextRewardConfig(decoder, EncoderConfig(**sizes(vocabulary + 1, 1)), CrossLayers("last", 2))
    model = jax.jit(lambda key: Reward.create(config, key=key))(jax.random.key(seed))
    trainable, frozen = split(model, tuple(model.parts))
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, 100, STEPS[route])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    step = make_train_step(BradleyTerry(), optimizer, Reward).__wrapped__
    step = jax.jit(step, donate_argnums=0, compiler_options=OPTIMIZED)
    state = init_state(trainable, optimizer)
    data = examples(sources, [1.0], recipe, seed)
    for batch in islice(batches(data, PAIRS), STEPS[route]):
        state, metrics = step(state, frozen, batch)
    print(route, seed, "the last step's", {name: round(float(x), 3) for name, x in metrics.items()})
    save(Reward.from_parts(state.trainable | frozen), home / "model", assets=home)
    found = {}
    for name in ("held_out", "negated"):
        places = {"model": home / "model", "data": home / "raw" / name, "out": home / name}
        labelled = (1, 2, 4, 8) if name == "held_out" else ()
        evaluate_rewards(RewardsConfig(**places, labelled=labelled, batch_size=64, chunk_length=16))
        result = json.loads((home / name / "rewards.json").read_text())
        found[name] = {key: one["mean"] for part in ("accuracy", "inferred")
                       for key, one in result[part].items()}  # fmt: skip
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("route", ["encoder", "prompt"])
def test_a_context_decides(route, seed, tmp_path):
    found = learnt(route, seed, tmp_path)
    print(route, seed, found)
    held_out, negated = found["held_out"], found["negated"]
    assert held_out["no context"] == 0.5  # both pairs of every row, of which one is right
    assert held_out["its context"] > 0.95
    assert held_out["negated, the worse answer right"] > 0.9
    assert negated["its context"] > 0.9
    assert 0.4 < held_out["nonsense"] < 0.6
    assert held_out["1"] < held_out["8"] > held_out["known"] - 0.05


def test_without_negations_in_training_a_negated_criterion_is_mostly_read_as_the_plain_one(tmp_path):
    found = learnt("encoder", 0, tmp_path, negations=0.0)
    print("no negations", found)
    assert found["held_out"]["its context"] > 0.95
    pairs = 600
    error = (0.25 / pairs) ** 0.5  # of a share that is by chance a half; the words of a negation are new, and disturb
    assert found["negated"]["its context"] < 0.5 - 5 * error
