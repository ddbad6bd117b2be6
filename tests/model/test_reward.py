"""Reward models against transformers' classifier, and what padding and contexts do to a score."""

import dataclasses

import jax
import numpy as np
import pytest
from support.models import CROSS_LAYERS, DECODER, ENCODER, bits, filled, relative_error

from cepe_jax.config import CepeConfig, ContextRewardConfig, RewardConfig
from cepe_jax.model.reward import Reward
from cepe_jax.weights.convert import to_hf
from cepe_jax.weights.source import load, open_model, save

PAD = 7
TOKENS = np.array([[3, 9, 20, 4, 11, PAD, PAD], [5, 5, 60, 1, 33, 2, 8]])
READING = ContextRewardConfig(DECODER, dataclasses.replace(ENCODER, mlm_head=False), CROSS_LAYERS)
score = jax.jit(Reward.__call__)


def make(config) -> Reward:
    return filled(lambda: Reward.create(config, key=jax.random.key(0)), seed=5)


def left(tokens: np.ndarray) -> np.ndarray:
    """The rows with their padding on the other side."""
    return np.stack([np.roll(row, (row == PAD).sum()) for row in tokens])


def test_scores_are_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_labels=1, pad_token_id=PAD, initializer_range=0.3
    )
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours", assets=tmp_path / "theirs")
    to_hf(tmp_path / "ours", tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert again.config.num_labels == 1
    for tokens in (TOKENS, left(TOKENS)):
        mask = tokens != PAD
        for model in (theirs, again):
            with torch.no_grad():
                wanted = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()[:, 0]
            assert relative_error(score(ours, tokens, mask), wanted) < 1e-5


def test_padding_changes_no_score():
    model = make(RewardConfig(DECODER))
    mask = TOKENS != PAD
    wanted = score(model, TOKENS, mask)
    assert relative_error(score(model, left(TOKENS), left(TOKENS) != PAD), wanted) < 1e-5
    assert relative_error(score(model, TOKENS[:1, :5]), wanted[:1]) < 1e-5
    assert relative_error(score(model, TOKENS[1:]), wanted[1:]) < 1e-5


def test_a_context_is_read_by_the_encoder(tmp_path, context_BCL):
    model = make(READING)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert bits(again) == bits(model)
    memory = model.encode(context_BCL[:2])
    plain, read = score(model, TOKENS), score(model, TOKENS, None, memory)
    assert relative_error(read, plain) > 1e-3
    base = Reward(model.decoder, model.head)
    assert relative_error(score(base, TOKENS), plain) < 1e-6
    with pytest.raises(ValueError, match="no class"):
        to_hf(tmp_path / "model", tmp_path / "hf")


def test_a_classifier_of_several_classes_is_refused(tmp_path):
    save(make(RewardConfig(DECODER)), tmp_path / "model")
    to_hf(tmp_path / "model", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(path.read_text().replace('"0": "LABEL_0"', '"0": "LABEL_0", "1": "LABEL_1"'))
    with pytest.raises(ValueError, match="a head of 2 numbers"):
        open_model(tmp_path / "hf")


def test_its_decoder_has_no_head_for_tokens():
    assert make(RewardConfig(dataclasses.replace(DECODER, tied_head=False))).config == RewardConfig(DECODER)
    assert "head" not in dict(vars(make(RewardConfig(DECODER)).decoder))
    assert isinstance(CepeConfig(**vars(READING)), CepeConfig)
