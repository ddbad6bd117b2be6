"""RazorAttention against its definition: a decoder in fp64, token by token, and the scores of heads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cache_oracles import attention_maps, head_scores, in_pieces_exactly, razor
from support.cache_oracles import retrieval_heads as oracle_heads
from support.models import DECODER, ENCODER, float64, make_decoder, relative_error

from cepe_jax.inference import calibration
from cepe_jax.inference.caches import Razor, new_cache
from cepe_jax.inference.caches import razor as module
from cepe_jax.inference.caches.razor import RazorCache
from cepe_jax.inference.caches.retrieval_heads import FILE, read_scores, retrieval_heads
from cepe_jax.inference.generate import generate
from cepe_jax.inference.scoring import score
from cepe_jax.inference.text import load as load_text
from cepe_jax.model.attention import merge
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.weights.source import save

TEXT = np.random.default_rng(3).integers(0, DECODER.vocab_size, 90).tolist()
ALL = tuple((z, k) for z in range(DECODER.num_layers) for k in range(DECODER.num_kv_heads))
HEADS = ((0, 1), (2, 0), (2, 1))  # of three layers with two key heads: one, none and all
POLICY = Razor(sinks=2, recent=8, compression=4, heads=HEADS)
decode = jax.jit(Llama.decode)


def exactly(decoder: Llama, ids: list[int], policy: Razor = POLICY, **given) -> np.ndarray:
    attend = razor(decoder.config, set(policy.heads), policy.sinks, policy.recent, policy.compression)
    return in_pieces_exactly(decoder, [ids], attend, **given)


def log_probs_of(logits_TV: np.ndarray, labels: list[int]) -> np.ndarray:
    log_probs = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return log_probs[np.arange(len(labels)), labels]


@pytest.fixture(scope="module")
def expected(decoder) -> np.ndarray:
    return exactly(decoder, TEXT)


@pytest.mark.parametrize("sizes", [[90], [33, 5, 1, 1, 8, 24, 7, 1], [1] * 90], ids=["whole", "bits", "tokens"])
@pytest.mark.parametrize("block", [1 << 14, 7], ids=["", "in blocks"])
def test_a_text_however_it_comes(decoder, expected, monkeypatch, sizes, block):
    """Pieces are as long as no token leaves in them; the window, a fourth of the text, grows from 8 tokens to 22."""
    monkeypatch.setattr(module, "BLOCK", block)
    cache, first = new_cache(decoder, POLICY, 1, 90), 0
    run = jax.jit(Llama.decode)  # traced anew: the block is no argument
    for size in sizes:
        hidden_BTD, cache = run(decoder, np.array([TEXT[first : first + size]]), None, cache)
        first += size
        assert relative_error(decoder.logits(hidden_BTD)[0], expected[first - size : first]) < 1e-5


def test_it_is_not_what_a_window_or_full_attention_reads(decoder, expected, plain):
    assert relative_error(plain(decoder, np.array([TEXT]))[0, :10], expected[:10]) < 1e-5
    assert relative_error(plain(decoder, np.array([TEXT]))[0, 30:], expected[30:]) > 1e-2
    attend = razor(decoder.config, set(HEADS), 2, 8, 4, weighted=False)
    assert relative_error(in_pieces_exactly(decoder, [TEXT], attend)[30:], expected[30:]) > 1e-3


@pytest.mark.parametrize(
    "policy", [dataclasses.replace(POLICY, heads=ALL), Razor(2, 88, heads=HEADS), Razor(2, 8, 1, heads=())]
)
def test_all_heads_or_a_window_for_all_is_full_attention(decoder, plain, policy):
    hidden_BTD, _ = decode(decoder, np.array([TEXT]), None, new_cache(decoder, policy, 1, 90))
    assert relative_error(decoder.logits(hidden_BTD)[0], plain(decoder, np.array([TEXT]))[0]) < 1e-5


def test_equal_tokens_that_left_count_as_they_did():
    """Full attention to 1e-12 in fp64, by the weight alone: their mean is each of them."""
    with jax.enable_x64(True):
        rng, config = np.random.default_rng(0), dataclasses.replace(DECODER, num_layers=1, num_kv_heads=2)
        policy = Razor(sinks=2, recent=4, compression=50, heads=((0, 0),))
        k, v = rng.standard_normal((2, 1, 1, 40, 2, DECODER.head_dim))
        k[:, :, 2:37], v[:, :, 2:37] = k[:, :, 2:3], v[:, :, 2:3]  # of 41 tokens the last four stay
        cache = policy.create(config, "float64", 1, 64)
        for first in range(0, 40, 4):
            some = tuple(jnp.asarray(x[:, :, first : first + 4]) for x in (k, v))
            cache = cache.append(some, np.ones((1, 4), bool))
        q = jnp.asarray(rng.standard_normal((1, 1, DECODER.num_heads, DECODER.head_dim)))
        found = merge(cache.reading(config, np.ones((1, 1), bool)).attend(jnp.int32(0), q, q))
        group = DECODER.num_heads // 2
        for n in range(DECODER.num_heads):
            weights = np.exp(k[0, 0, :, n // group] @ np.asarray(q)[0, 0, n] / np.sqrt(DECODER.head_dim))
            wanted = weights / weights.sum() @ v[0, 0, :, n // group]
            np.testing.assert_allclose(found[0, 0, n], wanted, rtol=0, atol=1e-12)


def test_rows_of_different_lengths(decoder):
    prompts = [TEXT[:5], TEXT[20:71], [33]]
    rows = generate(decoder, prompts, max_new_tokens=9, policy=POLICY)
    for prompt, new in zip(prompts, rows, strict=True):
        assert exactly(decoder, prompt + new)[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    assert generate(decoder, prompts[::-1], max_new_tokens=9, policy=POLICY) == rows[::-1]


def test_scores(decoder):
    """Continuations that read one cache together, and one that is alone."""
    prompt, continuations = TEXT[:49], [[5, 9, 3, 8, 1, 0], [7], TEXT[50:52]]
    for given in (continuations, continuations[:1]):
        for found, continuation in zip(score(decoder, prompt, given, policy=POLICY), given, strict=True):
            wanted = log_probs_of(exactly(decoder, prompt + continuation)[len(prompt) - 1 : -1], continuation)
            np.testing.assert_allclose(found.log_probs, wanted, atol=2e-5)


def test_beside_a_memory(cepe):
    memory = Memory(np.random.default_rng(1).standard_normal((1, 7, ENCODER.width)).astype(np.float32))
    text = TEXT[:40]
    wanted = exactly(cepe.decoder, text, cross=float64(cepe.cross), memory_ME=memory.states_BME[0])
    hidden_BTD, _ = jax.jit(Cepe.decode)(cepe, np.array([text]), memory, new_cache(cepe.decoder, POLICY, 1, 48))
    assert relative_error(cepe.decoder.logits(hidden_BTD)[0], wanted) < 1e-5


def test_memory(decoder):
    """The arguments of a step are what the formula says, and its temporaries do not grow with the text."""

    def compiled(slots: int):
        cache = jax.eval_shape(lambda: dataclasses.replace(POLICY.create(DECODER, "float32", 1, slots), empty=False))
        return decode.lower(decoder, jnp.zeros((1, 1), int), None, cache).compile().memory_analysis(), cache

    (short, cache), (long, _) = compiled(1 << 16), compiled(1 << 18)
    H, whole, others = DECODER.head_dim, len(HEADS), len(ALL) - len(HEADS)
    for slots, analysis in ((1 << 16, short), (1 << 18, long)):
        formula = 2 * 4 * H * (whole * slots + others * (2 + slots // 4 + 1) + others) + 4  # and the length
        weights = sum(x.nbytes for x in jax.tree.leaves(decoder)) - decoder.head[...].nbytes  # no logits are asked for
        assert analysis.argument_size_in_bytes == formula + weights + 4  # and the token
    assert long.temp_size_in_bytes == short.temp_size_in_bytes
    assert isinstance(cache, RazorCache)


def test_a_short_text_takes_no_room_for_a_long_one(decoder, plain):
    """Of 4,000 recent tokens there are as many slots as the text has tokens."""
    policy = dataclasses.replace(POLICY, recent=4000)
    cache = new_cache(decoder, policy, 1, 24)
    assert cache.k_BOWH.shape[2] == 24 + 1
    hidden_BTD, _ = decode(decoder, np.array([TEXT[:24]]), None, cache)
    assert relative_error(decoder.logits(hidden_BTD)[0], plain(decoder, np.array([TEXT[:24]]))[0]) < 1e-5
    assert new_cache(decoder, policy, 1, 1).k_BOWH.shape[2] == policy.sinks + 2


# --- scores of heads ---


def test_scores_of_heads():
    """Against attention maps in fp64. A key head has the largest of its query heads."""
    config = dataclasses.replace(DECODER, num_heads=4, num_kv_heads=2)
    decoder, block = make_decoder(config), 9
    tokens = np.array([1, *np.tile(np.arange(5, 5 + block), 4)], np.int32)
    found = calibration.head_scores(decoder, tokens, block)
    maps_ZNTT = attention_maps(decoder, tokens)[:, :, 1:, 1:]
    wanted = [head_scores(maps_NTT, block) for maps_NTT in maps_ZNTT]
    for ours, theirs in zip(found, zip(*wanted, strict=True), strict=True):
        np.testing.assert_allclose(ours, np.array(theirs), rtol=1e-5)


def test_selected_heads():
    rng = np.random.default_rng(0)
    for shares in ((0.14, 0.01), (0.5, 0.2), (0, 1), (0, 0)):
        induction, echo = rng.integers(0, 9, (2, 7, 5)) / 8  # many are equal
        found = retrieval_heads(induction, echo, *shares)
        assert set(found) == oracle_heads(induction, echo, 1, *shares)
        assert list(found) == sorted(found)


@pytest.fixture
def plain_home(home, tmp_path):
    path = tmp_path / "plain"
    save(load_text(home).model.decoder, path, home)
    return path


def test_calibrated_models(plain_home, capsys):
    calibration.calibrate(calibration.CalibrateConfig(plain_home))
    assert f"{plain_home / FILE}: {len(ALL)} heads" in capsys.readouterr().out
    written = json.loads((plain_home / FILE).read_text())
    assert written["block"] == 11  # four of these and BOS in 48 positions
    text = load_text(plain_home, cache=Razor(recent=8, induction=0.5, echo=0))
    induction = np.array(written["induction"])
    assert len(text.cache.heads) == 3
    assert {induction[place] for place in text.cache.heads} == set(np.sort(induction, axis=None)[-3:])
    prompt = "def f(x):\n" * 2
    ids = [text.tokenizer.bos_id, *text.tokenizer.encode(prompt)]
    (new,) = generate(text.model, [ids], max_new_tokens=4, policy=text.cache, stop_ids=text.stop_ids)
    assert text.generate(prompt, max_new_tokens=4) == text.tokenizer.decode(new)
    with pytest.raises(ValueError, match="window of 48"):
        text.generate("def f(x):\n" * 9, max_new_tokens=4)


def test_bad_input(plain_home, home):
    with pytest.raises(ValueError, match=f"{plain_home} has no {FILE}.*scripts/calibrate.py"):
        load_text(plain_home, cache=Razor())
    with pytest.raises(ValueError, match="block is 12: give at most 11"):
        calibration.calibrate(calibration.CalibrateConfig(plain_home, block=12))
    calibration.calibrate(calibration.CalibrateConfig(plain_home, block=3))
    written = json.loads((plain_home / FILE).read_text())
    for changes, said in [
        ({"base": "0"}, "belongs to another model: run scripts/calibrate.py"),
        ({"echo": [[0.5]]}, "echo has no number for each of 3 x 2 heads: run scripts/calibrate.py"),
        ({"induction": written["induction"][:-1] + [["a", 1]]}, FILE),
    ]:
        (plain_home / FILE).write_text(json.dumps(written | changes))
        with pytest.raises(ValueError, match=said):
            read_scores(plain_home, DECODER)
    with pytest.raises(ValueError, match="its heads are not known"):
        generate(load_text(plain_home).model, [[1, 2]], max_new_tokens=1, policy=Razor())
    assert load_text(plain_home, cache=POLICY).cache == POLICY
    for given, said in [
        ({"recent": 4}, "recent is 4: .*sinks, which is 4"),
        ({"sinks": 0}, "sinks is 0"),
        ({"recent": "9"}, "recent is '9': "),
        ({"compression": 0}, "compression is 0"),
        ({"induction": 1.5}, "induction is 1.5: .*0 to 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            Razor(**given)
