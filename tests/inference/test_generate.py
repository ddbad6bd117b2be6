"""Generation against golden tokens, against recomputing without a cache, and its bad input."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import DECODER, ENCODER

from cepe_jax.inference.generate import Sampling, generate, next_token, sample
from cepe_jax.weights.huggingface import load

GOLDEN = Path(__file__).parents[1] / "golden"
HOT = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=7)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [33]]


@pytest.fixture(scope="module")
def golden():
    """Name -> (model, arrays), each loaded once."""
    loaded = {}

    def golden(name: str):
        if list((GOLDEN / name).glob("*.bin")):
            pytest.importorskip("torch")
        if name not in loaded:
            loaded[name] = load(GOLDEN / name), dict(np.load(GOLDEN / name / "expected.npz"))
        return loaded[name]

    return golden


@pytest.fixture(scope="module")
def context():
    """Contexts of the three prompts, with holes and an absent chunk."""
    rng = np.random.default_rng(11)
    mask_BCL = rng.random((3, 2, 5)) < 0.8
    mask_BCL[1, 0] = False
    return rng.integers(0, ENCODER.vocab_size, (3, 2, 5)), mask_BCL


@pytest.fixture(scope="module")
def hot(cepe, context):
    """Twelve sampled tokens after each prompt."""
    return generate(cepe, PROMPTS, *context, max_new_tokens=12, sampling=HOT)


@pytest.fixture(scope="module")
def greedy(cepe, context):
    """Twelve greedy tokens after each prompt, from a cache with room to spare."""
    return generate(cepe, PROMPTS, *context, max_new_tokens=12, cache_slots=40)


def recompute(call, prompts, sampling: Sampling, steps: int) -> list[list[int]]:
    """The whole model anew for each token: no cache, no left padding; what stands after a token it cannot see."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.zeros((len(prompts), lengths.max() + steps), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for step, key in enumerate(jax.random.split(jax.random.key(sampling.seed), steps)):
        logits_BTV = call(tokens_BT)
        tokens_BT[rows, lengths + step] = sample(logits_BTV[rows, lengths + step - 1], sampling, key)
    return [tokens_BT[row, n : n + steps].tolist() for row, n in enumerate(lengths)]


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_golden_greedy(golden, name):
    model, arrays = golden(name)
    mask = arrays["encoder_attention_mask"].astype(bool)
    tokens = generate(model, arrays["input_ids"], arrays["encoder_input_ids"], mask, max_new_tokens=8)
    assert tokens == arrays["greedy"].tolist()


def unpadded(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[real.astype(bool)].tolist() for row, real in zip(tokens, mask, strict=True)]


def test_golden_greedy_left_padded(golden):
    model, arrays = golden("tiny_edge")
    prompts = unpadded(arrays["input_ids"], arrays["token_mask"])
    assert len({len(prompt) for prompt in prompts}) == 3
    tokens = generate(model, prompts, arrays["encoder_input_ids"], max_new_tokens=6)
    assert tokens == arrays["greedy_left_padded"].tolist()


def test_golden_left_padded_file(golden):
    model, _ = golden("tiny_mha")
    arrays = np.load(GOLDEN / "tiny_mha" / "left_padded.npz")
    prompts = unpadded(arrays["input_ids"], arrays["attention_mask"])
    mask = arrays["encoder_attention_mask"].astype(bool)
    assert generate(model, prompts, arrays["encoder_input_ids"], mask, max_new_tokens=6) == arrays["greedy"].tolist()


def test_cached_is_recomputed(cepe, context, hot, greedy, forward):
    """Token for token, also where they are drawn: a quarter of the vocabulary comes up, so a slip would show."""
    assert len({token for row in hot for token in row}) > 15
    assert hot == recompute(lambda tokens_BT: forward(cepe, tokens_BT, *context), PROMPTS, HOT, 12)
    assert greedy == recompute(lambda tokens_BT: forward(cepe, tokens_BT, *context), PROMPTS, Sampling(), 12)


def test_a_batch_is_each_prompt_alone(cepe, context, greedy):
    alone = generate(cepe, PROMPTS[1:2], *(part[1:2] for part in context), max_new_tokens=12)
    assert alone == greedy[1:2]


def test_a_plain_decoder(cepe, decoder, plain):
    """Without a context CEPE writes what its decoder writes."""
    tokens = generate(decoder, PROMPTS, max_new_tokens=12, sampling=HOT)
    assert tokens == recompute(lambda tokens_BT: plain(decoder, tokens_BT), PROMPTS, HOT, 12)
    for context_BCL in (None, np.zeros((3, 0, 5), np.int32)):
        without = generate(cepe, PROMPTS, context_BCL, max_new_tokens=1, sampling=HOT, cache_slots=19)
        assert without == [row[:1] for row in tokens]


def test_the_context_matters(cepe, context, hot):
    context_BCL, mask_BCL = context
    other = np.where(mask_BCL, (context_BCL + 1) % ENCODER.vocab_size, context_BCL)
    assert generate(cepe, PROMPTS, other, mask_BCL, max_new_tokens=12, sampling=HOT) != hot
    unseen = np.where(mask_BCL, context_BCL, (context_BCL + 1) % ENCODER.vocab_size)
    assert generate(cepe, PROMPTS, unseen, mask_BCL, max_new_tokens=12, sampling=HOT) == hot


def test_stops(cepe, context, hot):
    """A row ends before its first stop token, the others go on; the call ends with the last."""
    for stop_ids in ([hot[0][4]], [hot[0][4], hot[1][0], hot[2][9]], [hot[0][0], hot[1][0], hot[2][0]], []):
        expected = [row[: next((i for i, t in enumerate(row) if t in stop_ids), 12)] for row in hot]
        assert generate(cepe, PROMPTS, *context, max_new_tokens=12, sampling=HOT, stop_ids=stop_ids) == expected
    assert expected == hot


def test_it_ends_with_the_last_row(cepe, context, hot, monkeypatch):
    from cepe_jax.inference import generate as module

    steps, step = [], module.next_token
    monkeypatch.setattr(module, "next_token", lambda *args: steps.append(1) or step(*args))
    stop_ids = [row[2] for row in hot]
    generate(cepe, PROMPTS, *context, max_new_tokens=12, sampling=HOT, stop_ids=stop_ids)
    assert len(steps) <= 3


def test_seeds(cepe, context, hot):
    """Equal seeds give equal tokens, another one others without compiling anew; fewer tokens are the first ones."""
    assert generate(cepe, PROMPTS, *context, max_new_tokens=12, sampling=HOT) == hot
    compiled = next_token._cache_size()
    other = Sampling(HOT.temperature, HOT.top_k, HOT.top_p, seed=8)
    assert generate(cepe, PROMPTS, *context, max_new_tokens=12, sampling=other) != hot
    fewer = generate(cepe, PROMPTS, *context, max_new_tokens=5, sampling=HOT, cache_slots=19)
    assert fewer == [row[:5] for row in hot]
    assert next_token._cache_size() == compiled


BAD = {
    "no prompt": ({"prompts": []}, "an empty prompt"),
    "an empty prompt": ({"prompts": [[1], []]}, "an empty prompt: start it with"),
    "id too large": ({"prompts": [[1], [DECODER.vocab_size]]}, "id 64, outside the vocabulary of 64"),
    "id negative": ({"prompts": [[1], [-1]]}, "id -1, outside the vocabulary of 64"),
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens is 0: give 1 or more"),
    "cache too short": ({"cache_slots": 5}, "2 tokens and 4 new ones exceed the cache of 5 slots: shorten"),
    "context id": ({"context_BCL": np.full((2, 1, 3), ENCODER.vocab_size)}, "id 65, outside the vocabulary of 65"),
    "context axes": ({"context_BCL": np.zeros((2, 3), int)}, r"context_BCL is int64\[2, 3\]"),
    "context dtype": ({"context_BCL": np.zeros((2, 1, 3))}, r"context_BCL is float64\[2, 1, 3\]"),
    "context rows": ({"context_BCL": np.zeros((3, 1, 3), int)}, r"\[3, 3, 16\].* want \[2, M, 16\]"),
    "mask shape": (
        {"context_BCL": np.zeros((2, 1, 3), int), "context_mask_BCL": np.ones((2, 3), bool)},
        r"context_mask_BCL is bool\[2, 3\]: give booleans of shape \[2, 1, 3\]",
    ),
    "mask dtype": (
        {"context_BCL": np.zeros((2, 1, 3), int), "context_mask_BCL": np.ones((2, 1, 3), int)},
        "context_mask_BCL is int",
    ),
    "mask alone": ({"context_mask_BCL": np.ones((2, 1, 3), bool)}, "came without its context_BCL"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cepe, case):
    changes, said = BAD[case]
    with pytest.raises(ValueError, match=said) as error:
        generate(cepe, **{"prompts": [[1, 2], [3]], "max_new_tokens": 4} | changes)
    assert "\n" not in str(error.value)


def test_a_context_for_a_plain_decoder(decoder):
    with pytest.raises(ValueError, match="a context needs a CEPE model: this one is a plain decoder"):
        generate(decoder, [[1]], np.zeros((1, 1, 3), int), max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("temperature", float("nan"))],
)
def test_bad_sampling(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: give"):
        Sampling(**{name: value})
