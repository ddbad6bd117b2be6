"""Preferences: both losses and their gradients as stated in fp64 and by torch, and the stages from lines to a model."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.datasets import make_data
from support.models import CROSS_LAYERS, DECODER, ENCODER, bits, filled
from support.tokenizers import write_chatml

from cepe_jax.config import CepeConfig, ContextRewardConfig, LoraConfig, RewardConfig, with_lora
from cepe_jax.data.examples import IGNORE, ExampleConfig
from cepe_jax.data.preferences import PreferenceConfig, prepare_preferences
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.model.lora import without_factors
from cepe_jax.model.parts import split
from cepe_jax.model.reward import Reward
from cepe_jax.settings import decode, read_yaml
from cepe_jax.training.objectives import BradleyTerry, Dpo, log_probabilities
from cepe_jax.training.reference import ReferenceConfig, refer
from cepe_jax.training.run import dry_run, run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import load, save

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 334
EXAMPLES = ExampleConfig(window=128, num_chunks=2, chunk_length=8)
LORA = LoraConfig(2, 4.0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    real = np.arange(9) < rng.integers(4, 10, (3, 2, 1))
    tokens = np.where(real, rng.integers(0, DECODER.vocab_size, real.shape), 0)
    labels = np.full(real.shape, IGNORE)
    labels[..., :-1] = np.where(real[..., 1:] & (np.arange(8) > 1), tokens[..., 1:], IGNORE)
    context = rng.integers(0, DECODER.vocab_size, (3, 2, 5))
    mask = np.ones(context.shape, bool)
    return {"tokens": tokens, "labels": labels, "token_mask": real, "context": context, "context_mask": mask}


def plain(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if not name.startswith("context")}


def test_bradley_terry_is_what_it_says(batch):
    """Of the scores one by one, in fp64; the pair turned around, and a number added to both scores."""
    model = filled(lambda: Reward.create(RewardConfig(DECODER), key=jax.random.key(0)), seed=5)
    objective, losses = BradleyTerry(), []
    rows = plain(batch)
    for tokens, real in zip(rows["tokens"], rows["token_mask"], strict=True):
        chosen, rejected = (float(model(t[None, : r.sum()])[0]) for t, r in zip(tokens, real, strict=True))
        losses.append((math.log1p(math.exp(rejected - chosen)), chosen > rejected))
    loss, terms = jax.jit(objective)(model, rows, objective.weights(rows))
    assert float(loss) == pytest.approx(np.mean([one for one, _ in losses]), rel=1e-5)
    assert float(terms["accuracy"]) == pytest.approx(np.mean([right for _, right in losses]))
    turned = {name: x[:, ::-1] for name, x in rows.items()}
    _, swapped = jax.jit(objective)(model, turned, objective.weights(turned))
    assert float(terms["accuracy"] + swapped["accuracy"]) == 1
    same = {name: np.repeat(x[:, :1], 2, axis=1) for name, x in rows.items()}
    loss, terms = jax.jit(objective)(model, same, objective.weights(same))
    assert (float(loss), float(terms["accuracy"])) == (pytest.approx(math.log(2), rel=1e-6), 0.5)


def test_both_answers_are_read_after_one_context(batch):
    config = ContextRewardConfig(DECODER, dataclasses.replace(ENCODER, mlm_head=False), CROSS_LAYERS)
    model, objective = filled(lambda: Reward.create(config, key=jax.random.key(0)), seed=5), BradleyTerry()
    loss, _ = jax.jit(objective)(model, batch, objective.weights(batch))
    margins = []
    for tokens, real, context in zip(*(batch[name] for name in ("tokens", "token_mask", "context")), strict=True):
        memory = model.encode(context[None])
        chosen, rejected = (float(model(t[None], r[None], memory)[0]) for t, r in zip(tokens, real, strict=True))
        margins.append(chosen - rejected)
    assert float(loss) == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), rel=1e-5)


def answers(model, batch) -> np.ndarray:
    """The log-probabilities of the answers (B, 2), text by text, from the logits."""
    found = np.zeros(batch["labels"].shape[:2])
    for b, row in np.ndindex(found.shape):
        length = batch["token_mask"][b, row].sum()
        logits = np.asarray(model(batch["tokens"][b, row][None, :length])[0], np.float64)
        for t, label in enumerate(batch["labels"][b, row][:length]):
            if label != IGNORE:
                found[b, row] += logits[t, label] - np.log(np.exp(logits[t]).sum())
    return found


@pytest.mark.parametrize("chunk", [0, 4])
def test_dpo_is_what_it_says(batch, chunk):
    model = filled(lambda: Llama(with_lora(DECODER, "decoder", LORA), key=jax.random.key(0)), seed=6)
    rows, objective = plain(batch), Dpo(0.3, chunk)
    policy, reference = answers(model, rows), answers(without_factors(model), rows)
    np.testing.assert_allclose(log_probabilities(model, rows, chunk), policy, rtol=1e-5)
    gained = policy - reference
    margins = 0.3 * (gained[:, 0] - gained[:, 1])
    loss, terms = jax.jit(objective)(model, rows, objective.weights(rows))
    assert float(loss) == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-5)
    assert float(terms["margin"]) == pytest.approx(margins.mean(), rel=1e-3)
    assert float(terms["gained_chosen"]) == pytest.approx(gained[:, 0].mean(), rel=1e-3)
    assert float(terms["accuracy"]) == pytest.approx((margins > 0).mean())
    prepared = rows | {"reference": reference.astype(np.float32)}
    again, _ = jax.jit(objective)(model, prepared, objective.weights(prepared))
    assert float(again) == pytest.approx(float(loss), rel=1e-5)


def test_gradients_are_torchs(batch):
    """Of both losses, with respect to what they are made of: scores, and log-probabilities."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    values, reference = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))

    class Scores:
        def __init__(self, scores):
            self.scores = scores

        def __call__(self, tokens, mask, memory):
            return self.scores.reshape(-1)

    rows = plain(batch)
    ours = jax.grad(lambda v: BradleyTerry()(Scores(v), rows, BradleyTerry().weights(rows))[0])(jnp.asarray(values))
    given = torch.tensor(values, requires_grad=True)
    (-torch.nn.functional.logsigmoid(given[:, 0] - given[:, 1]).mean()).backward()
    np.testing.assert_allclose(ours, given.grad.numpy(), rtol=1e-5)

    model = filled(lambda: Llama(with_lora(DECODER, "decoder", LORA), key=jax.random.key(0)), seed=6)
    trainable, frozen = split(model, ("decoder_lora",))
    prepared = rows | {"reference": reference.astype(np.float32)}

    def whole(trainable):
        model = Llama.from_parts(trainable | frozen)
        return Dpo(0.3)(model, prepared, Dpo().weights(prepared))[0]

    found, pullback = jax.vjp(lambda t: log_probabilities(Llama.from_parts(t | frozen), prepared, 0), trainable)
    policy = torch.tensor(np.asarray(found, np.float64), requires_grad=True)
    gained = policy - torch.tensor(reference.astype(np.float32))
    (-torch.nn.functional.logsigmoid(0.3 * (gained[:, 0] - gained[:, 1])).mean()).backward()
    (wanted,) = pullback(jnp.asarray(policy.grad.numpy(), jnp.float32))
    for one, other in zip(jax.tree.leaves(jax.grad(whole)(trainable)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pairs whose better answer is the context's; a decoder and a CEPE that have a chat template."""
    home = tmp_path_factory.mktemp("preferences")
    write_chatml(home)
    encoder = dataclasses.replace(ENCODER, vocab_size=VOCABULARY + 1, mlm_head=False)
    config = CepeConfig(dataclasses.replace(DECODER, vocab_size=VOCABULARY), encoder, CROSS_LAYERS)
    cepe = filled(lambda: Cepe.create(config, key=jax.random.key(0)), seed=3)
    save(cepe, home / "cepe", assets=home)
    save(cepe.decoder, home / "decoder", assets=home)
    (home / "raw").mkdir()
    rows = [
        {"prompt": "x", "response_a": a, "response_b": b, "criteria_x": f"say {a}", "criteria_y": f"say {b}"}
        for a, b in (("u" + c, "v" + d) for c in "abcd" for d in "efgh")
    ]
    (home / "raw/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for route in ("prompt", "encoder"):
        given = {"tokenizer": str(home / "decoder"), "test_fraction": 0.2, "workers": 1, "context": route}
        prepare_preferences(PreferenceConfig(input=home / "raw", out=home / "data" / route, **given))
    return home


def config_of(stage: str, home, out, data: str, **settings) -> TrainConfig:
    return TrainConfig(stage, home / "data" / data, out, 3, 4, examples=EXAMPLES, **settings)


@pytest.mark.parametrize(
    ("data", "start"),
    [("prompt", {"decoder": "decoder"}), ("encoder", {"cepe": "cepe"})],
)
def test_a_reward_model_trains_and_goes_on(home, tmp_path, data, start):
    start = {name: str(home / path) for name, path in start.items()}
    settings = {"train": ("decoder_lora", "head"), "lora": LORA} if "decoder" in start else {}
    first = load(run_stage(config_of("reward", home, tmp_path / "first", data, **start, **settings)))
    assert isinstance(first, Reward)
    base = load(next(iter(start.values())))
    expected = bits(base.decoder)
    assert set(bits(first.parts["decoder"])) <= set(expected)
    again = {name: str(tmp_path / "first/model") for name in start}
    second = load(run_stage(config_of("reward", home, tmp_path / "second", data, **again)))
    assert bits(second.parts["head"]) != bits(first.parts["head"])
    said = "\n".join(dry_run(config_of("reward", home, tmp_path / "dry", data, **start, dry_run=True)))
    assert "parameters train" in said


@pytest.mark.parametrize(
    ("name", "data", "start"),
    [("reward", "prompt", "decoder"), ("cepe_reward", "encoder", "cepe"), ("dpo", "prompt", "decoder")],
)
def test_published_configs_run_with_tiny_sizes(home, tmp_path, name, data, start):
    values = read_yaml(CONFIGS / f"tune_{name}.yaml")
    tiny = {
        "steps": 2,
        "batch_size": 4,
        "dtype": "float32",
        "data": str(home / "data" / data),
        "out": str(tmp_path / "out"),
    }
    examples = {"window": EXAMPLES.window, "num_chunks": EXAMPLES.num_chunks, "chunk_length": EXAMPLES.chunk_length}
    trained = load(
        run_stage(decode(TrainConfig, values | tiny | {"examples": examples, start: str(home / start)}))
    ).parts
    for part in values["train"]:
        assert all(leaf.any() for leaf in jax.tree.leaves(trained[part]))
    assert bits(trained["decoder"])[0] == bits(load(home / start).parts["decoder"])[0]


def test_dpo_with_the_reference_in_the_step_and_prepared(home, tmp_path):
    start = {"decoder": str(home / "decoder"), "train": ("decoder_lora",), "lora": LORA}
    online = load(run_stage(config_of("dpo", home, tmp_path / "online", "prompt", **start)))
    assert bits(online.parts["decoder"]) == bits(load(home / "decoder"))
    refer(ReferenceConfig(model=home / "decoder", data=home / "data/prompt", out=home / "data/reference", window=128))
    prepared = load(run_stage(config_of("dpo", home, tmp_path / "prepared", "reference", **start)))
    for one, other in zip(jax.tree.leaves(online), jax.tree.leaves(prepared), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    whole = config_of("dpo", home, tmp_path / "whole", "reference", decoder=str(home / "decoder"))
    assert bits(load(run_stage(whole))) != bits(load(home / "decoder"))


def test_what_cannot_be_a_reference(home, tmp_path):
    whole = config_of("dpo", home, tmp_path / "whole", "prompt", decoder=str(home / "decoder"))
    with pytest.raises(ValueError, match="decoder is part of the reference: train decoder_lora alone, or prepare"):
        run_stage(whole)
    config = with_lora(load(home / "decoder").config, "decoder", LORA)
    tuned = filled(lambda: Llama(config, key=jax.random.key(0)), 1)
    save(tuned, tmp_path / "tuned", assets=home)
    with pytest.raises(ValueError, match="tuned has factors, and the reference would have none: merge them"):
        run_stage(dataclasses.replace(whole, decoder=str(tmp_path / "tuned"), train=("decoder_lora",)))
    with pytest.raises(ValueError, match="cepe has a CepeConfig: give a DecoderConfig"):
        run_stage(config_of("reward", home, tmp_path / "no", "prompt", decoder=str(home / "cepe")))
    refer(ReferenceConfig(model=home / "decoder", data=home / "data/prompt", out=home / "data/short", window=110))
    with pytest.raises(ValueError, match="short: its reference read texts of 110 tokens at most"):
        run_stage(config_of("dpo", home, tmp_path / "no", "short", decoder=str(home / "decoder")))
    sequences = make_data(tmp_path / "sequences", 400) / "packed"
    with pytest.raises(ValueError, match="packed holds packed: prepare pairs"):
        run_stage(dataclasses.replace(whole, data=sequences))
    config = ContextRewardConfig(**vars(load(home / "cepe").config))
    save(filled(lambda: Reward.create(config, key=jax.random.key(0)), 1), tmp_path / "scores", assets=home)
    scores = config_of("dpo", home, tmp_path / "no", "encoder", cepe=str(tmp_path / "scores"), train=("decoder_lora",))
    with pytest.raises(ValueError, match="scores has a ContextRewardConfig: give the directory of a CEPE"):
        run_stage(scores)
    (tmp_path / "other").mkdir()
    shutil.copytree(home / "decoder", tmp_path / "other/decoder")
    (tmp_path / "other/decoder/chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="other/decoder has another chat template than wrote .*data/prompt"):
        run_stage(dataclasses.replace(whole, decoder=str(tmp_path / "other/decoder"), train=("decoder_lora",)))
    with pytest.raises(ValueError, match="beta is 0"):
        config_of("dpo", home, tmp_path / "no", "prompt", decoder=str(home / "decoder"), beta=0.0)
    with pytest.raises(ValueError, match="beta is not read in stage reward"):
        config_of("reward", home, tmp_path / "no", "prompt", decoder=str(home / "decoder"), beta=0.2)
