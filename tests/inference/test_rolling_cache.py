"""StreamingLLM against its definition: a rolling cache in fp64, token by token."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import pytest
from support.models import DECODER, ENCODER, computed, float64, relative_error
from support.oracles import by_token_exactly, rotate

from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.readers.models import ModelConfig, load_model
from cepe_jax.inference.caches import CacheConfig, Rolling, new_cache
from cepe_jax.inference.generate import generate
from cepe_jax.inference.scoring import score
from cepe_jax.inference.text import load as load_text
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.weights.source import load, save

WINDOW, SINKS = 11, 3
TEXT = np.random.default_rng(0).integers(0, DECODER.vocab_size, 60).tolist()
ROLLING = Rolling(WINDOW, SINKS)
decode = jax.jit(Llama.decode)


def rolling(
    decoder: Llama, ids: Sequence[int], window: int = WINDOW, sinks: int = SINKS, cross=None, memory_ME=None
) -> np.ndarray:
    """Logits (T, V). Each layer keeps keys that are not rotated, and rotates them by their place in the cache.

    `cross`: in the last layers, which read the memory too.
    """

    def attend(index, q_NH, keys_SKH, values_SKH):
        count = len(keys_SKH)
        rows = [i for i in range(count) if i < sinks or i >= count - (window - sinks)]
        k_SKH = rotate(keys_SKH[rows], np.arange(len(rows)), decoder.config.rope.theta)
        q_NH = rotate(q_NH[None], np.array([len(rows) - 1]), decoder.config.rope.theta)[0]
        out, group = np.zeros(q_NH.shape), len(q_NH) // k_SKH.shape[1]
        for n in range(len(q_NH)):
            weights = np.exp(k_SKH[:, n // group] @ q_NH[n] / np.sqrt(q_NH.shape[-1]))
            out[n] = weights / weights.sum() @ values_SKH[rows, n // group]
        return out

    return by_token_exactly(decoder, ids, attend, cross, memory_ME)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def expected(decoder) -> np.ndarray:
    return rolling(decoder, TEXT)


def test_a_text_in_pieces(decoder, expected):
    """All at once, which is cut into pieces of eight, the ring's length."""
    hidden_BTD, _ = decode(decoder, np.array([TEXT]), None, new_cache(decoder, ROLLING, 1, 0))
    assert relative_error(decoder.logits(hidden_BTD)[0], expected) < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 30, [2, 3, 1, 5, 8, 7, 1, 1, 6], [40, 9]])
def test_a_text_bit_by_bit(decoder, expected, sizes):
    """However it comes: also where the sinks are not all there at first."""
    cache, first = new_cache(decoder, ROLLING, 1, 0), 0
    for size in sizes:
        hidden_BTD, cache = decode(decoder, np.array([TEXT[first : first + size]]), None, cache)
        first += size
        assert relative_error(decoder.logits(hidden_BTD)[0], expected[first - size : first]) < 1e-5
    assert cache.k_ZBSKH.shape[2] == WINDOW


@pytest.mark.parametrize("changes", [{}, {"mlp_chunk": 3}, {"remat": "full"}], ids=str)
def test_beside_a_memory(cepe, changes):
    """Cross-attention reads as ever, and what else the decoder is told of computing holds."""
    decoder = computed(cepe.decoder, **changes)
    run = partial(jax.jit(Cepe.decode), Cepe(decoder, cepe.encoder, cepe.cross))
    memory = Memory(np.random.default_rng(1).standard_normal((1, 7, ENCODER.width)).astype(np.float32))
    expected = rolling(cepe.decoder, TEXT[:30], cross=float64(cepe.cross), memory_ME=memory.states_BME[0])
    cache = new_cache(decoder, ROLLING, 1, 0)
    hidden_BTD, cache = run(np.array([TEXT[:25]]), memory, cache)
    assert relative_error(decoder.logits(hidden_BTD)[0], expected[:25]) < 1e-5
    hidden_BTD, _ = run(np.array([TEXT[25:30]]), memory, cache)
    assert relative_error(decoder.logits(hidden_BTD)[0], expected[25:]) < 1e-5


def test_a_short_text_is_the_decoders(decoder, plain, expected):
    assert relative_error(plain(decoder, np.array([TEXT[:WINDOW]]))[0], expected[:WINDOW]) < 1e-5
    after = np.asarray(plain(decoder, np.array([TEXT[: 2 * WINDOW]])))[0, WINDOW:]
    assert relative_error(after, expected[WINDOW : 2 * WINDOW]) > 1e-2


def test_rows_of_different_lengths(decoder):
    """Generated together, each as by itself; without a bound."""
    prompts = [TEXT[:5], TEXT[20:50], [33]]
    rows = generate(decoder, prompts, max_new_tokens=14, policy=ROLLING)
    for prompt, new in zip(prompts, rows, strict=True):
        logits = rolling(decoder, prompt + new)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    assert len({tuple(row) for row in rows}) == 3


def test_scores(decoder):
    """Continuations beside each other, shorter and longer than a piece, after one prompt that they share."""
    prompt, continuations = TEXT[:19], [[5, 9, 3, 8, 1, 0], [7], TEXT[30:52]]
    scores = score(decoder, prompt, continuations[:2], policy=ROLLING)
    scores += score(decoder, prompt, continuations, policy=ROLLING)[2:]
    for found, continuation in zip(scores, continuations, strict=True):
        log_probs = log_softmax(rolling(decoder, prompt + continuation))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(found.log_probs, log_probs[np.arange(len(continuation)), continuation], atol=2e-5)


def test_behind_the_seam(home):
    """Contexts and prompt are one text, of any length."""
    model = load_model(ModelConfig(home, "decoder", cache=CacheConfig("rolling", WINDOW, SINKS)))
    context, ids, continuation = list(range(100, 160)), [0, 11, 23, 59], [7, 9, 22]
    (found,) = model.score(Prompt(ids, [context]), [continuation])
    text = [0, *context, *ids[1:], *continuation]
    log_probs = log_softmax(rolling(load(home).decoder, text))[-4:-1]
    np.testing.assert_allclose(found.log_probs, log_probs[range(3), continuation], atol=2e-5)
    for given, said in [
        (("rolling", 4), "sinks is 4 .*window 4: .*larger window"),
        (("rolling", 48, 0), "sinks is 0: .* 1 "),
        (("full", 48), "window .*kind rolling"),
        (("last",), "kind is 'last': .*full, rolling, reattention or razor"),
    ]:
        with pytest.raises(ValueError, match=said):
            CacheConfig(*given)


def test_texts_longer_than_the_positions(home):
    """`load` with a rolling cache reads what a window refuses; the encoder gets what overflow moves."""
    text, full = load_text(home, cache=ROLLING), load_text(home)
    prompt = "def f(x):\n" * 9
    with pytest.raises(ValueError, match="window of 48"):
        full.generate(prompt, max_new_tokens=4)
    ids = [text.tokenizer.bos_id, *text.tokenizer.encode(prompt)]
    (new,) = generate(text.model, [ids], max_new_tokens=4, policy=ROLLING)
    assert text.generate(prompt, max_new_tokens=4) == text.tokenizer.decode(new)
    assert len(ids) > WINDOW
    with pytest.raises(ValueError, match="window is 20: .*cache.window"):
        load_text(home, window=20, cache=ROLLING)


def test_who_takes_what_leaves_the_cache_in_a_chat(home, tmp_path):
    """With an encoder it is encoded, without one it goes and the conversation has no end."""
    cepe = load_text(home, cache=Rolling(40, SINKS))
    save(cepe.model.decoder, tmp_path / "plain", home)
    plain = load_text(tmp_path / "plain", cache=Rolling(40, SINKS))
    chats = [model.chat(chunk_length=8) for model in (cepe, plain)]
    for chat in chats:
        for number in range(4):
            "".join(chat.say(f"{number} and more of it", max_new_tokens=6))
    moved, endless = (chat.session for chat in chats)
    assert len(moved.context) == moved.moved > 2
    assert len(moved.tokens) < 40
    assert endless.tokens == endless.ids
    assert len(endless.ids) > 48
