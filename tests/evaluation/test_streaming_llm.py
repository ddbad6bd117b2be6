"""StreamingLLM against its definition: a rolling cache in fp64, token by token."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from support.models import DECODER, float64, relative_error
from support.oracles import heads, layer, rms_norm, rotate

from cepe_jax.evaluation.language_model import Prompt
from cepe_jax.evaluation.models import ModelConfig, load_model
from cepe_jax.evaluation.streaming_llm import StreamingLlama
from cepe_jax.inference.generate import generate, new_cache
from cepe_jax.inference.scoring import score
from cepe_jax.model.llama import Llama
from cepe_jax.weights.huggingface import load

WINDOW, SINKS = 11, 3
TEXT = np.random.default_rng(0).integers(0, DECODER.vocab_size, 60).tolist()
decode = jax.jit(StreamingLlama.decode)


def rolling(decoder: Llama, ids: Sequence[int], window: int = WINDOW, sinks: int = SINKS) -> np.ndarray:
    """Logits (T, V). Each layer keeps keys as they were before they were turned, and turns them by where they lie."""
    w, config, theta = float64(decoder), decoder.config, decoder.config.rope.theta
    kept = [([], []) for _ in range(config.num_layers)]
    out = []
    for token in ids:
        x_1D = w["embed"][[token]]
        for index, (keys, values) in enumerate(kept):
            of_layer = layer(w["layers"], index)
            a, y_1D = of_layer["attention"], rms_norm(x_1D, of_layer["attention_norm"], config.norm_eps)
            keys.append(heads(y_1D, a["k"])[0])
            values.append(heads(y_1D, a["v"])[0])
            if len(keys) > window:  # the oldest one that is no sink
                del keys[sinks], values[sinks]
            positions = np.arange(len(keys))
            k_SKH, v_SKH = rotate(np.array(keys), positions, theta), np.array(values)
            q_1NH = rotate(heads(y_1D, a["q"]), positions[-1:], theta)
            group = config.num_heads // config.num_kv_heads
            for head in range(config.num_heads):
                weights = np.exp(k_SKH[:, head // group] @ q_1NH[0, head] / np.sqrt(config.head_dim))
                x_1D = x_1D + weights / weights.sum() @ v_SKH[:, head // group] @ a["o"][head]
            y_1D = rms_norm(x_1D, of_layer["mlp_norm"], config.norm_eps)
            gate_1F = y_1D @ of_layer["mlp"]["gate"]
            up_1F = y_1D @ of_layer["mlp"]["up"]
            x_1D = x_1D + (gate_1F / (1 + np.exp(-gate_1F)) * up_1F) @ of_layer["mlp"]["down"]
        out.append(rms_norm(x_1D, w["norm"], config.norm_eps)[0] @ w["head"].T)
    return np.array(out)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def streaming(decoder) -> StreamingLlama:
    return StreamingLlama(decoder, WINDOW, SINKS)


@pytest.fixture(scope="module")
def expected(decoder) -> np.ndarray:
    return rolling(decoder, TEXT)


def test_a_text_in_blocks(streaming, expected):
    """All at once, which is cut into blocks of eight, the ring's length."""
    logits = np.asarray(jax.jit(StreamingLlama.__call__)(streaming, np.array([TEXT])))[0]
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 30, [2, 3, 1, 5, 8, 7, 1, 1, 6], [40, 9]])
def test_a_text_bit_by_bit(streaming, expected, sizes):
    """However it comes: also where the sinks are not all there at first."""
    cache, first = new_cache(streaming, 1, 0), 0
    for size in sizes:
        hidden_BTD, cache = decode(streaming, np.array([TEXT[first : first + size]]), None, cache)
        first += size
        assert relative_error(streaming.logits(hidden_BTD)[0], expected[first - size : first]) < 1e-5
    assert cache.k_ZBSKH.shape[2] == WINDOW


def test_a_short_text_is_the_decoders(streaming, decoder, plain, expected):
    assert relative_error(plain(decoder, np.array([TEXT[:WINDOW]]))[0], expected[:WINDOW]) < 1e-5
    after = np.asarray(plain(decoder, np.array([TEXT[: 2 * WINDOW]])))[0, WINDOW:]
    assert relative_error(after, expected[WINDOW : 2 * WINDOW]) > 1e-2


def test_rows_of_different_lengths(streaming, decoder):
    """Generated together, each as by itself; without a bound."""
    prompts = [TEXT[:5], TEXT[20:50], [33]]
    rows = generate(streaming, prompts, max_new_tokens=14)
    for prompt, new in zip(prompts, rows, strict=True):
        logits = rolling(decoder, prompt + new)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    assert len({tuple(row) for row in rows}) == 3


def test_scores(streaming, decoder):
    """Continuations beside each other, shorter and longer than a block, after one prompt that they share."""
    prompt, continuations = TEXT[:19], [[5, 9, 3, 8, 1, 0], [7], TEXT[30:52]]
    scores = score(streaming, prompt, continuations[:2]) + score(streaming, prompt, continuations)[2:]
    for found, continuation in zip(scores, continuations, strict=True):
        log_probs = log_softmax(rolling(decoder, prompt + continuation))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(found.log_probs, log_probs[np.arange(len(continuation)), continuation], atol=2e-5)


def test_behind_the_seam(home):
    """Contexts and prompt are one text, of any length."""
    model = load_model(ModelConfig(home, "streaming", window=WINDOW, sinks=SINKS))
    context, ids, continuation = list(range(100, 160)), [0, 11, 23, 59], [7, 9, 22]
    (found,) = model.score(Prompt(ids, [context]), [continuation])
    text = [0, *context, *ids[1:], *continuation]
    log_probs = log_softmax(rolling(load(home).decoder, text))[-4:-1]
    np.testing.assert_allclose(found.log_probs, log_probs[range(3), continuation], atol=2e-5)
    for changes, said in [
        ({"window": 4}, "sinks is 4 .*window 4: .*larger window"),
        ({"sinks": 0}, "sinks is 0 .*window 48: .* 1 "),
    ]:
        with pytest.raises(ValueError, match=said):
            load_model(ModelConfig(home, "streaming", **changes))
