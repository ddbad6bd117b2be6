"""Rewards: what is counted, contexts that are inferred against enumerated Bayes, and a run from files to a report."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from support.models import CROSS_LAYERS, DECODER, ENCODER, filled
from support.tokenizers import write_chatml

import cepe_jax
from cepe_jax.config import ContextRewardConfig, RewardConfig
from cepe_jax.data.planted import LEVELS, OPPOSITE, QUALITIES, WORDS, PlantConfig, plant
from cepe_jax.data.preferences import IN_PROMPT, NEGATED, pairs_in
from cepe_jax.evaluation import rewards
from cepe_jax.evaluation.rewards import RewardsConfig, evaluate_rewards, infer, posterior, preference, read_pairs, right
from cepe_jax.model.reward import Reward
from cepe_jax.weights.source import save


def test_a_context_is_inferred_as_bayes_says():
    """Every set of labels enumerated: the posterior is that of the joint distribution, which sums to 1."""
    rng = np.random.default_rng(0)
    margins_ZN, prior_Z = rng.standard_normal((3, 4)) * 2, np.array([0.2, 0.5, 0.3])
    chances_ZN = 1 / (1 + np.exp(-margins_ZN))
    total = 0.0
    for labels in itertools.product((True, False), repeat=4):
        likelihood_Z = np.where(labels, chances_ZN, 1 - chances_ZN).prod(axis=1)
        joint_Z = prior_Z * likelihood_Z
        total += joint_Z.sum()
        found_Z = posterior(np.where(labels, margins_ZN, -margins_ZN), prior_Z)
        np.testing.assert_allclose(found_Z, joint_Z / joint_Z.sum(), rtol=1e-12)
    assert total == pytest.approx(1)
    np.testing.assert_allclose(preference(margins_ZN, prior_Z), prior_Z @ chances_ZN, rtol=1e-12)
    np.testing.assert_allclose(posterior(margins_ZN[:, :0], prior_Z), prior_Z)
    far = posterior(np.array([[-2000.0, -1.0], [-2000.0, -3.0]]), np.array([0.5, 0.5]))
    assert np.isfinite(far).all()


def test_the_error_of_a_preference_is_bounded_by_those_of_context_and_judgement():
    """|p - q| <= E_p |p(y|z) - q(y|z)| + TV(p(z), q(z)), for contexts and judgements drawn at random."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        p_Z, q_Z = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
        p_ZN, q_ZN = rng.standard_normal((2, 4, 5)) * 3
        chances_p, chances_q = (1 / (1 + np.exp(-x)) for x in (p_ZN, q_ZN))
        error_N = np.abs(preference(p_ZN, p_Z) - preference(q_ZN, q_Z))
        bound_N = p_Z @ np.abs(chances_p - chances_q) + 0.5 * np.abs(p_Z - q_Z).sum()
        assert (error_N <= bound_N + 1e-12).all()


def test_planted_answers_are_better_as_their_criteria_say(tmp_path):
    plant(PlantConfig(out=tmp_path / "planted", rows=300, test_rows=200, negations=0.3, seed=3))
    kinds = {name: (tmp_path / "planted" / name / "rows.jsonl").read_text().splitlines() for name in
             ("train", "held_out", "negated")}  # fmt: skip
    start, said = NEGATED.format(context=""), {name: set() for name in kinds}
    for name, lines in kinds.items():
        negations = 0
        for pair in (pair for line in lines for pair in pairs_in(json.loads(line))):
            negated = pair["context"].startswith(start)
            criterion = pair["context"].removeprefix(start)
            word, quality = criterion.split()
            asks = next(direction for direction, words in WORDS.items() if word in words)
            wanted = OPPOSITE[asks] if negated else asks
            levels = [
                next(n for n, level in enumerate(LEVELS) if f"{level}{quality}" in answer.split(", "))
                for answer in (pair["chosen"], pair["rejected"])
            ]
            assert levels[0] != levels[1]
            assert (levels[0] > levels[1]) == (wanted == "more")
            assert pair["category"] == wanted
            said[name].add(criterion)
            negations += negated
        assert negations / (2 * len(lines)) == pytest.approx(
            {"train": 0.3, "held_out": 0, "negated": 1}[name], abs=0.05
        )
    assert said["negated"] <= said["train"]
    assert not said["train"] & said["held_out"]
    assert [len(said[name]) for name in ("train", "held_out")] == [len(QUALITIES) * 2 * 2, len(QUALITIES) * 2]


class Knows:
    """A reward model that finds words of the context in the answer; `asked` are the texts that it was given."""

    def __init__(self):
        self.asked = []

    def scores(self, conversations, contexts=None, **how):
        self.asked += list(zip(conversations, contexts, strict=True))
        said = [(talk[-1]["content"].split(), context.split()) for talk, context in self.asked[-len(contexts) :]]
        return np.array([len({*answer} & {*context}) for answer, context in said], np.float32)


@pytest.fixture
def rows(tmp_path):
    """Answers that name two of four things; criteria that ask for one of them."""
    (tmp_path / "raw").mkdir()
    made = [
        {"prompt": "?", "response_a": f"{a} {c}", "response_b": f"{b} {d}", "criteria_x": a, "criteria_y": b,
         "category_x": "first", "category_y": "second"}
        for a, b, c, d in itertools.permutations(["ant", "bee", "cow", "dog"])
    ]  # fmt: skip
    (tmp_path / "raw/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return tmp_path


def test_accuracies_with_and_without_contexts(rows, monkeypatch, capsys):
    model = Knows()
    monkeypatch.setattr(rewards, "load_reward", lambda *given, **how: model)
    config = RewardsConfig(model=rows / "m", data=rows / "raw", out=rows / "out", labelled=(1, 4), candidates=4)
    evaluate_rewards(config)
    found = json.loads((rows / "out/rewards.json").read_text())
    accuracy = {name: one["mean"] for name, one in found["accuracy"].items()}
    assert accuracy["its context"] == 1
    assert accuracy["no context"] == 0.5
    assert accuracy["negated, the worse answer right"] == 0  # it does not know the words of a negation
    assert accuracy["nonsense"] == 0.5
    assert {name: one["records"] for name, one in found["categories"].items()} == {"first": 24, "second": 24}
    assert found["inferred"]["known"]["mean"] == 1
    assert 0.5 < found["inferred"]["1"]["mean"] <= found["inferred"]["4"]["mean"] <= 1
    assert "| its context | 48 | 100.0 ± 0.0 |" in capsys.readouterr().out
    contexts = {context for _, context in model.asked}
    assert contexts >= {"ant", "", NEGATED.format(context="ant")}


def test_more_labelled_pairs_approach_the_known_context(rows):
    config = RewardsConfig(model=rows, data=rows / "raw", out=rows / "out", labelled=(1, 2, 6), candidates=4)
    judged, model = read_pairs(config), Knows()
    found = infer(lambda pairs, contexts: rewards.margins(model, pairs, contexts), judged, config)
    assert found["1"].mean < found["6"].mean + 1e-9
    assert found["6"].mean > 0.9
    with pytest.raises(ValueError, match="no context has more than 40 pairs"):
        infer(None, judged, dataclasses.replace(config, labelled=(40,)))


def test_ties_count_half():
    assert right(np.array([0.0, -1.0, 2.0])).tolist() == [0.5, 0.0, 1.0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Reward models with random weights and a chat template: of a decoder, and of a CEPE."""
    home = tmp_path_factory.mktemp("models")
    write_chatml(home)
    decoder = dataclasses.replace(DECODER, vocab_size=334)
    encoder = dataclasses.replace(ENCODER, vocab_size=335, mlm_head=False)
    for name, config in (
        ("plain", RewardConfig(decoder)),
        ("reads", ContextRewardConfig(decoder, encoder, CROSS_LAYERS)),
    ):
        save(filled(lambda config=config: Reward.create(config, key=jax.random.key(0)), 4), home / name, assets=home)
    return home


def talk(answer: str) -> list[dict]:
    return [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", ["plain", "reads"])
def test_a_score_depends_on_its_text_and_context_alone(home, name):
    model = cepe_jax.load_reward(home / name)
    assert model.route == {"plain": "prompt", "reads": "encoder"}[name]
    talks = [talk("Yes."), talk("No, and here is a long reason why " * 4), talk("Yes.")]
    contexts = ["be brief", "be brief", ""]
    together = model.scores(talks, contexts, batch_size=2, chunk_length=8)
    for n in range(3):
        alone = model.scores(talks[n : n + 1], contexts[n : n + 1], batch_size=1, chunk_length=8)
        assert alone[0] == pytest.approx(together[n], abs=1e-4)
    assert abs(together[0] - together[2]) > 1e-3
    assert model.scores(talks[2:])[0] == pytest.approx(together[2], abs=1e-4)
    if name == "plain":
        written = [{"role": "user", "content": IN_PROMPT.format(prompt="Well?", context="be brief")}, talks[0][1]]
        assert model.scores([written])[0] == pytest.approx(together[0], abs=1e-4)


def test_models_that_score_nothing(home, tmp_path):
    save(filled(lambda: Reward.create(RewardConfig(DECODER), key=jax.random.key(0)), 4).decoder, tmp_path / "decoder")
    with pytest.raises(ValueError, match="decoder has no head that scores"):
        cepe_jax.load_reward(tmp_path / "decoder")
    with pytest.raises(ValueError, match="plain has no encoder: give route prompt"):
        cepe_jax.load_reward(home / "plain", route="encoder")
    with pytest.raises(ValueError, match="reads is a reward model, which writes no text"):
        cepe_jax.load(home / "reads")
    with pytest.raises(ValueError, match="the last message, .*, is no answer"):
        cepe_jax.load_reward(home / "plain").scores([talk(" ")])
