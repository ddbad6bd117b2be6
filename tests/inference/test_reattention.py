"""ReAttention against its definition: selections as integers, and decoders in fp64 that read in pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cache_oracles import in_pieces_exactly, reattention
from support.cache_oracles import selection as oracle
from support.models import DECODER, ENCODER, float64, make_decoder, relative_error

from cepe_jax.inference import generate as generating
from cepe_jax.inference import scoring
from cepe_jax.inference.caches import CacheConfig, ReAttention, new_cache
from cepe_jax.inference.caches import reattention as module
from cepe_jax.inference.caches.reattention import largest, selection, spans
from cepe_jax.inference.generate import generate
from cepe_jax.inference.scoring import score
from cepe_jax.inference.session import Session
from cepe_jax.inference.text import load as load_text
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama

# No token twice: the keys of equal ones have equal products, whose order fp32 does not keep.
TEXT = np.random.default_rng(3).permutation(DECODER.vocab_size).tolist()
POLICY = ReAttention(sinks=2, recent=9, top_k=2, selected=3, span=4, piece=5)
decode = jax.jit(Llama.decode)


def settings(policy: ReAttention) -> tuple[int, ...]:
    return policy.sinks, policy.recent, policy.span, policy.top_k, policy.selected


def pieces(ids: list[int], size: int) -> list[list[int]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def exactly(decoder: Llama, parts: list[list[int]], policy: ReAttention = POLICY, **given) -> np.ndarray:
    return in_pieces_exactly(decoder, parts, reattention(decoder.config, *settings(policy)), **given)


def log_probs_of(logits_TV: np.ndarray, labels: list[int]) -> np.ndarray:
    log_probs = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return log_probs[np.arange(len(labels)), labels]


# --- selections ---


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("blocked", [False, True])
def test_selections_are_those_of_the_definition(monkeypatch, heads, blocked):
    """Queries and keys of small integers: products are exact, and many of them equal."""
    N, K = heads
    rng = np.random.default_rng(N + K)
    if blocked:
        monkeypatch.setattr(module, "PIECE_PAIRS", 1)  # blocks of GROUP keys
    monkeypatch.setattr(module, "GROUP", 16)
    for _ in range(4):
        top_k, selected, span = (int(rng.integers(1, most)) for most in (6, 9, 7))
        policy = ReAttention(int(rng.integers(1, 5)), int(rng.integers(6, 12)), top_k, selected, span, piece=6)
        T, slots = int(rng.integers(1, 6)), 70
        lengths, real = rng.integers(0, 60, 3), rng.integers(1, T + 1, 3)
        q = rng.integers(-2, 3, (3, T, N, 4)).astype(np.float32)
        k = rng.integers(-2, 3, (3, K, slots, 4)).astype(np.float32)
        real_BT = np.arange(T) < real[:, None]
        first_B = np.maximum(lengths + real - policy.recent, policy.sinks)

        @jax.jit
        def read(q, k, real_BT, first_B, policy=policy):
            found = selection(q, k, real_BT, policy.sinks, first_B, policy.top_k, policy.selected)
            return spans(found, policy.span, policy.sinks, first_B)

        slots_BX, read_BX = read(q, k, real_BT, first_B)
        for row in range(3):
            seen = lengths[row] + real[row]
            wanted = oracle(q[row, : real[row]], k[row].swapaxes(0, 1)[:seen], *settings(policy))
            assert np.asarray(slots_BX)[row][np.asarray(read_BX)[row]].tolist() == wanted


@pytest.mark.parametrize("size", [4, 128, 129, 1000])
def test_the_largest_of_equal_values_are_the_first(size):
    for dtype in (np.int32, np.float32):
        x = np.random.default_rng(size).integers(0, 7, (3, 2, size)).astype(dtype)
        values, places = largest(jnp.asarray(x), 4)
        wanted = np.argsort(-x, axis=-1, kind="stable")[..., :4]
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_array_equal(values, np.take_along_axis(x, wanted, axis=-1))


# --- decoders ---


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_text_in_pieces(kv_heads):
    """All at once, cut into pieces of five: the last one is not full."""
    config = dataclasses.replace(DECODER, num_heads=4, num_kv_heads=kv_heads)
    decoder = make_decoder(config)
    text = TEXT[:43]
    hidden_BTD, cache = decode(decoder, np.array([text]), None, new_cache(decoder, POLICY, 1, 48))
    assert relative_error(decoder.logits(hidden_BTD)[0], exactly(decoder, pieces(text, 5))) < 1e-5
    for token in TEXT[43:50]:
        hidden_BTD, cache = decode(decoder, np.array([[token]]), None, cache)
    wanted = exactly(decoder, [*pieces(text, 5), *([token] for token in TEXT[43:50])])
    assert relative_error(decoder.logits(hidden_BTD)[0, 0], wanted[-1]) < 1e-5


def test_a_scope_that_holds_the_text_is_full_attention(decoder, plain):
    """By the last tokens alone, and by a selection of all that stands between."""
    wanted = plain(decoder, np.array([TEXT]))[0]
    for policy in (
        ReAttention(2, 90, 1, 1, 1, piece=7),
        ReAttention(3, 9, top_k=90, selected=90, span=1, piece=7),
        ReAttention(3, 9, top_k=1, selected=2, span=200, piece=1),
    ):
        hidden_BTD, _ = decode(decoder, np.array([TEXT]), None, new_cache(decoder, policy, 1, 64))
        assert relative_error(decoder.logits(hidden_BTD)[0], wanted) < 1e-5


def test_positions_stay_within_the_scope(monkeypatch):
    """At a hundred times the scope, as for a short text."""
    tables = []
    table = module.rope_table
    monkeypatch.setattr(module, "rope_table", lambda *given: tables.append(given[2]) or table(*given))
    policy = ReAttention(sinks=1, recent=4, top_k=1, selected=2, span=3, piece=4)
    q = np.random.default_rng(0).standard_normal((1, 4, 4, 8), np.float32)
    config = dataclasses.replace(DECODER, num_heads=4, num_kv_heads=2, head_dim=8)
    cache = policy.create(config, "float32", 1, 1100)
    keys = np.random.default_rng(1).standard_normal(cache.k_ZBKSH.shape, np.float32)
    for length in (3, 900, 1100):
        cache = dataclasses.replace(cache, k_ZBKSH=jnp.asarray(keys), length_B=jnp.array([length]), empty=False)
        reading = cache.reading(config, np.ones((1, 4), bool))
        reading.attend(jnp.int32(0), q, q)
        tables.append(reading.positions_BT)
    assert max(int(positions.max()) for positions in tables) == policy.scope - 1 == 10
    assert min(int(positions.min()) for positions in tables) == 0


def test_no_token_sees_a_later_one_in_pieces_of_one(decoder):
    cache = new_cache(decoder, POLICY, 1, 48)
    for read, differs in ((cache.by_token(), False), (cache, True)):
        changed = [*TEXT[:38], (TEXT[38] + 1) % DECODER.vocab_size, TEXT[39]]
        hidden, other = (decode(decoder, np.array([ids]), None, read)[0] for ids in (TEXT[:40], changed))
        np.testing.assert_array_equal(hidden[:, :35], other[:, :35])
        assert (np.abs(hidden[0, 35:38] - other[0, 35:38]).max() > 0) == differs


def test_rows_of_different_lengths(decoder):
    """Generated together, each as by itself: the prompt in pieces, but for its last token, and then token by token."""
    prompts = [TEXT[:6], TEXT[10:51], [TEXT[63]]]
    rows = generate(decoder, prompts, max_new_tokens=9, policy=POLICY)
    for prompt, new in zip(prompts, rows, strict=True):
        parts = [*pieces(prompt[:-1], 5), *([token] for token in [prompt[-1], *new])]
        assert exactly(decoder, parts)[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    assert len({tuple(row) for row in rows}) == 3
    assert generate(decoder, prompts[::-1], max_new_tokens=9, policy=POLICY) == rows[::-1]
    assert [generate(decoder, [row], max_new_tokens=9, policy=POLICY)[0] for row in prompts] == rows


def test_scores(decoder):
    """The prompt in pieces, continuations token by token: none chooses for one before it."""
    prompt, continuations = TEXT[:42], [TEXT[42:49], [TEXT[60]], TEXT[50:52]]
    scores = score(decoder, prompt, continuations, policy=POLICY)
    for found, continuation in zip(scores, continuations, strict=True):
        parts = [*pieces(prompt[:-1], 5), *([token] for token in [prompt[-1], *continuation])]
        wanted = log_probs_of(exactly(decoder, parts)[len(prompt) - 1 : -1], continuation)
        np.testing.assert_allclose(found.log_probs, wanted, atol=2e-5)


def test_scores_read_each_token_once(decoder, monkeypatch):
    """A continuation of one token takes one step, not a bucket's; a long one is refused."""
    shapes, run = [], scoring.log_probs
    monkeypatch.setattr(scoring, "log_probs", lambda *given: shapes.append(given[1].shape) or run(*given))
    score(decoder, TEXT[:9], [[1], [2, 3, 4], [5]], policy=POLICY)
    assert shapes == [(1, 1), (1, 4)]
    with pytest.raises(ValueError, match="continuation 1 has 257 tokens.*at most 256"):
        score(decoder, TEXT[:9], [[1], [2] * 257], policy=POLICY)


def test_beside_a_memory(cepe):
    memory = Memory(np.random.default_rng(1).standard_normal((1, 7, ENCODER.width)).astype(np.float32))
    text = TEXT[:33]
    wanted = exactly(cepe.decoder, pieces(text, 5), cross=float64(cepe.cross), memory_ME=memory.states_BME[0])
    cache = new_cache(cepe.decoder, POLICY, 1, 48)
    hidden_BTD, _ = jax.jit(Cepe.decode)(cepe, np.array([text]), memory, cache)
    assert relative_error(cepe.decoder.logits(hidden_BTD)[0], wanted) < 1e-5


def test_texts_longer_than_the_positions(home, tmp_path):
    """`load` reads what a window refuses, a chat keeps all that is said, and nothing is there to move."""
    policy = dataclasses.replace(POLICY, recent=30)
    text = load_text(home, cache=policy)
    prompt = "def f(x):\n" * 9
    ids = [text.tokenizer.bos_id, *text.tokenizer.encode(prompt)]
    assert len(ids) > 48
    (new,) = generate(text.model, [ids], max_new_tokens=4, policy=policy)
    assert text.generate(prompt, max_new_tokens=4) == text.tokenizer.decode(new)
    with pytest.raises(ValueError, match="overflow is truncate_left, .*leave overflow out"):
        text.generate(prompt, max_new_tokens=4, overflow="truncate_left")
    with pytest.raises(ValueError, match="overflow is truncate_left, .*leave overflow out"):
        text.chat(overflow="truncate_left")


def test_a_conversation_makes_its_cache_longer(home, monkeypatch):
    """Nothing is read anew, and what is drawn is what a cache that was long enough draws."""
    text = load_text(home, cache=dataclasses.replace(POLICY, recent=30))
    said, read = [], []
    append = generating.append
    monkeypatch.setattr(generating, "append", lambda *given: read.append(int(given[2].sum())) or append(*given))
    take = Session._take_slots
    for slots in (0, 4000):
        monkeypatch.setattr(Session, "_take_slots", lambda self, count, slots=slots: take(self, max(count, slots)))
        chat = text.chat()
        said.append(["".join(chat.say("x" * 90, max_new_tokens=6)) for _ in range(4)])
        assert chat.session.tokens == chat.session.ids
        assert len(chat.session.ids) > 400
        assert sum(read) < len(chat.session.ids)
        read.clear()
    assert said[0] == said[1]


def test_bad_settings(home):
    for given, said in [
        ({"sinks": 0}, "sinks is 0"),
        ({"top_k": 10**12}, "top_k is 1000000000000: "),
        ({"top_k": 1.5}, "top_k is 1.5: .*whole number"),
        ({"selected": 1 << 20, "span": 1 << 20}, "reads .* tokens: lower"),
        ({"recent": 256}, "piece is 512: .*recent, which is 256"),
        ({"window": 9}, "cache.window is for cache.kind rolling"),
        ({"compression": 2}, "cache.compression is for cache.kind razor"),
    ]:
        with pytest.raises(ValueError, match=said):
            CacheConfig("reattention", **given)
    with pytest.raises(ValueError, match="reads 8,192 tokens .*has 48 positions"):
        load_text(home, cache=ReAttention())
    with pytest.raises(ValueError, match="window is 20: .*leave it out"):
        load_text(home, window=20, cache=dataclasses.replace(POLICY, recent=30))
    with pytest.raises(ValueError, match="cache is 'razor': give a policy"):
        load_text(home, cache="razor")
