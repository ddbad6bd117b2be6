"""Generation against golden tokens, against recomputing without a cache, and its bad input."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import DECODER, ENCODER, with_leaf
from support.oracles import recompute
from support.refusals import one_line

from cepe_jax.inference import generate as module
from cepe_jax.inference.caches import FULL, full
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.inference.generate import Draws, Sampling, bucket, generate, next_token, stream
from cepe_jax.inference.session import Session
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import abstract_mesh
from cepe_jax.weights.source import load

GOLDEN = Path(__file__).parents[1] / "golden"
HOT = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=7)
EACH = [HOT.for_row(row) for row in range(3)]  # what HOT for all three rows is
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [33]]
MIXED = [Sampling(temperature=2.0, seed=8), Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=8)]


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


encode = jax.jit(Cepe.encode)


def rows_of(memory, rows: slice):
    return jax.tree.map(lambda x: x[rows], memory)


@pytest.fixture(scope="module")
def memory(cepe, context):
    return encode(cepe, *context)


@pytest.fixture(scope="module")
def hot(cepe, memory):
    """Twelve sampled tokens after each prompt."""
    return generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT)


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_golden_greedy(golden, name):
    model, arrays = golden(name)
    memory = encode(model, arrays["encoder_input_ids"], arrays["encoder_attention_mask"].astype(bool))
    assert generate(model, arrays["input_ids"], memory, max_new_tokens=8) == arrays["greedy"].tolist()


def unpadded(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[real.astype(bool)].tolist() for row, real in zip(tokens, mask, strict=True)]


def test_golden_greedy_left_padded(golden):
    model, arrays = golden("tiny_edge")
    prompts = unpadded(arrays["input_ids"], arrays["token_mask"])
    assert len({len(prompt) for prompt in prompts}) == 3
    tokens = generate(model, prompts, encode(model, arrays["encoder_input_ids"]), max_new_tokens=6)
    assert tokens == arrays["greedy_left_padded"].tolist()


def test_golden_left_padded_file(golden):
    model, _ = golden("tiny_mha")
    arrays = np.load(GOLDEN / "tiny_mha" / "left_padded.npz")
    prompts = unpadded(arrays["input_ids"], arrays["attention_mask"])
    memory = encode(model, arrays["encoder_input_ids"], arrays["encoder_attention_mask"].astype(bool))
    assert generate(model, prompts, memory, max_new_tokens=6) == arrays["greedy"].tolist()


@pytest.mark.parametrize("samplings", [[HOT] * 3, [Sampling()] * 3, MIXED], ids=["hot", "greedy", "mixed"])
def test_cached_is_recomputed(cepe, context, memory, forward, samplings):
    """Token for token, also where they are drawn, each row in its own way."""
    tokens = generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=samplings)
    assert tokens == recompute(lambda tokens_BT: forward(cepe, tokens_BT, *context), PROMPTS, samplings, 12)


def test_a_quarter_of_the_vocabulary_comes_up(hot):
    """So a slip would show."""
    assert len({token for row in hot for token in row}) > 15


def test_a_batch_is_each_prompt_alone(cepe, memory, hot):
    for row, prompt in enumerate(PROMPTS):
        own = rows_of(memory, slice(row, row + 1))
        assert generate(cepe, [prompt], own, max_new_tokens=12, sampling=EACH[row]) == hot[row : row + 1]


def test_a_seed_for_each_row(cepe, memory):
    """Of equal prompts equal seeds draw equal tokens, others others."""
    shared = rows_of(memory, slice(1))
    seeds = [Sampling(1.5, seed=seed) for seed in (7, 8, 7)]
    first, second, third = generate(cepe, PROMPTS[:1] * 3, shared, max_new_tokens=12, sampling=seeds)
    assert first == third != second


def test_rows_of_one_sampling_differ(cepe, memory):
    """Of equal prompts too; the first row is drawn from the seed itself, and the call repeats."""
    prompts, shared = [PROMPTS[0]] * 3, rows_of(memory, slice(1))
    rows = generate(cepe, prompts, shared, max_new_tokens=12, sampling=HOT)
    assert len(set(map(tuple, rows))) == 3
    assert generate(cepe, prompts, shared, max_new_tokens=12, sampling=HOT) == rows
    assert generate(cepe, prompts[:1], shared, max_new_tokens=12, sampling=HOT) == rows[:1]
    seeds = {Sampling(1.0, seed=seed).for_row(row).seed for seed in range(20) for row in range(20)}
    assert len(seeds) == 400


def test_rows_without_a_seed_differ(cepe, memory):
    """From each other and from call to call, together or each with a sampling of its own."""
    prompts, shared = [PROMPTS[0]] * 3, rows_of(memory, slice(1))
    texts = []
    for sampling in (Sampling(1.5), Sampling(1.5), [Sampling(1.5)] * 3):
        texts += map(tuple, generate(cepe, prompts, shared, max_new_tokens=12, sampling=sampling))
    assert len(set(texts)) == 9


def test_a_shared_memory_is_a_copy_for_each_row(cepe, memory, hot):
    shared = rows_of(memory, slice(1))
    copies = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), shared)
    tokens = generate(cepe, PROMPTS, shared, max_new_tokens=12, sampling=HOT)
    assert tokens == generate(cepe, PROMPTS, copies, max_new_tokens=12, sampling=HOT) != hot
    assert tokens[0] == hot[0]


def test_a_plain_decoder(cepe, decoder, plain):
    """Without a context CEPE writes what its decoder writes."""
    tokens = generate(decoder, PROMPTS, max_new_tokens=12, sampling=HOT)
    assert tokens == recompute(lambda tokens_BT: plain(decoder, tokens_BT), PROMPTS, EACH, 12)
    assert generate(cepe, PROMPTS, max_new_tokens=12, sampling=HOT) == tokens


def test_long_prompts_are_read_in_pieces(cepe, context, memory, forward, monkeypatch):
    """No scores of a whole prompt exist. Rows end in different pieces, and what each ends with is drawn from there."""
    rng = np.random.default_rng(0)
    lengths = 300, 20, 128, 140, 256, 60
    prompts = [rng.integers(0, DECODER.vocab_size, count).tolist() for count in lengths]
    decode, widths = Llama._decode, []
    monkeypatch.setattr(Llama, "_decode", lambda *given: widths.append(given[1].shape[1]) or decode(*given))
    monkeypatch.setattr(full, "PIECE_PAIRS", 6 * 256 * 384)
    shared, own = rows_of(memory, slice(1)), [part[:1] for part in context]
    tokens = generate(cepe, prompts, shared, max_new_tokens=2, sampling=HOT)
    assert set(widths) == {128, 1}  # no more than 256 would do, and 384 is three times 128
    repeated, samplings = [np.repeat(part, 6, axis=0) for part in own], [HOT.for_row(row) for row in range(6)]
    assert tokens == recompute(lambda tokens_BT: forward(cepe, tokens_BT, *repeated), prompts, samplings, 2)


@pytest.mark.parametrize(
    ("attention", "empty", "rows", "length", "piece"),
    [
        *(("xla", True, 1, 2048, 2048), ("xla", True, 2, 2048, 256), ("xla", True, 1, 8192, 512)),
        *(("xla", False, 1, 512, 512), ("xla", False, 1, 1280, 256), ("xla", True, 64, 8192, 128)),
        *(("splash", True, 1, 8192, 8192), ("cudnn", False, 1, 8192, 512)),
    ],
)
def test_how_much_is_read_at_once(attention, empty, rows, length, piece):
    """About 2 ** 22 pairs of a token and a slot of 8,192; all of a prompt where a kernel reads it."""
    slots = jax.ShapeDtypeStruct((1, 1, 1, 8192, 8), np.float32)
    cache = FullCache(slots, slots, None, None, empty)
    assert cache.piece(rows, length, attention) == piece
    mesh = abstract_mesh(data=2, fsdp=4)
    with jax.sharding.use_abstract_mesh(mesh):  # 8 times the rows on 8 devices are as many on each
        assert cache.piece(8 * rows, length, attention) == piece


def test_the_context_matters(cepe, context, hot):
    context_BCL, mask_BCL = context
    other = np.where(mask_BCL, (context_BCL + 1) % ENCODER.vocab_size, context_BCL)
    assert generate(cepe, PROMPTS, encode(cepe, other, mask_BCL), max_new_tokens=12, sampling=HOT) != hot
    unseen = np.where(mask_BCL, context_BCL, (context_BCL + 1) % ENCODER.vocab_size)
    assert generate(cepe, PROMPTS, encode(cepe, unseen, mask_BCL), max_new_tokens=12, sampling=HOT) == hot


@pytest.mark.parametrize("step", [1, 5], ids=["none", "multiples of 5"])
def test_buckets_change_nothing(cepe, memory, hot, monkeypatch, step):
    monkeypatch.setattr(module, "bucket", lambda count: -(-count // step) * step)
    assert generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT) == hot


def test_buckets():
    """Ascending, never too short, at most a fifth too long, few: four per doubling."""
    counts = range(1, 5000)
    found = [bucket(count) for count in counts]
    assert found == sorted(found)
    assert sorted(set(found)) == [
        *(128, 256, 384, 512), *(640, 768, 896, 1024), *(1280, 1536, 1792, 2048), *(2560, 3072, 3584, 4096), 5120
    ]  # fmt: skip
    assert all(length >= count and bucket(length) == length for count, length in zip(counts, found, strict=True))
    assert bucket(2**20) == 2**20


def test_stream(cepe, memory, hot):
    """Step by step; a row that has ended gives None, and the steps end with the last row."""
    stop_ids = [hot[0][4], hot[1][0], hot[2][9]]
    ends = [next((i for i, t in enumerate(row) if t in stop_ids), 12) for row in hot]
    assert len(set(ends)) == 3
    steps = stream(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT, stop_ids=stop_ids)
    wanted = [[row[i] if i < end else None for row, end in zip(hot, ends, strict=True)] for i in range(max(ends))]
    assert list(steps) == wanted


def test_a_stream_that_is_left(cepe, memory, hot):
    """Who stops listening has taken nothing from others."""
    left, other = (stream(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT) for _ in range(2))
    assert next(left) == next(other) == [row[0] for row in hot]
    left.close()
    assert [next(other) for _ in range(11)] == [list(step) for step in zip(*hot, strict=True)][1:]
    assert generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT) == hot


def test_stops(cepe, memory, hot):
    """A row ends before its first stop token, the others go on; the call ends with the last."""
    for stop_ids in ([hot[0][4]], [hot[0][4], hot[1][0], hot[2][9]], [hot[0][0], hot[1][0], hot[2][0]], []):
        expected = [row[: next((i for i, t in enumerate(row) if t in stop_ids), 12)] for row in hot]
        assert generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT, stop_ids=stop_ids) == expected
    assert expected == hot


def test_it_ends_with_the_last_row(cepe, memory, hot, monkeypatch):
    """One step is under way while the tokens before it are looked at; none follows the last."""
    steps, step = [], module.next_token
    monkeypatch.setattr(module, "next_token", lambda *args: steps.append(1) or step(*args))
    generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT, stop_ids=[row[2] for row in hot])
    assert len(steps) == 4
    steps.clear()
    generate(cepe, PROMPTS, memory, max_new_tokens=5, sampling=HOT)
    assert len(steps) == 5


def test_programs(cepe, memory, hot):
    """Two for a bucket, whatever the lengths in it and however is drawn; fewer tokens are the first ones."""
    compiled = next_token._cache_size()
    assert generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=MIXED) != hot
    assert generate(cepe, PROMPTS, memory, max_new_tokens=5, sampling=HOT) == [row[:5] for row in hot]
    longer = [[5] * 100, [6], [7] * 3]
    generate(cepe, longer, memory, max_new_tokens=28)
    assert next_token._cache_size() == compiled
    generate(cepe, longer, memory, max_new_tokens=29)  # another bucket of the cache
    assert next_token._cache_size() == compiled + 2


def test_greedy_steps_do_not_sort(cepe, memory):
    """What sorts stands in a branch that is taken where a row is drawn."""
    cache = module.new_cache(cepe.decoder, FULL, 3, 128)
    given = cepe, np.zeros((3, 1), int), None, memory, cache, Draws.of(MIXED)
    jaxpr = jax.make_jaxpr(next_token.__wrapped__)(*given).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert "sort" not in names
    assert "cond" in names


BAD = {
    "no prompt": ({"prompts": []}, "empty prompt"),
    "an empty prompt": ({"prompts": [[1], []]}, "empty prompt: .*begin-of-sequence"),
    "id too large": ({"prompts": [[1], [DECODER.vocab_size]]}, "id 64, .*vocabulary .* 64"),
    "id negative": ({"prompts": [[1], [-1]]}, "id -1, .*vocabulary .* 64"),
    "no integers": ({"prompts": [[1], [1.5]]}, r"prompt is float64\[1\]: .*integers"),
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    "new tokens as text": ({"max_new_tokens": "5"}, "max_new_tokens is '5'"),
    "more new tokens than memory": ({"max_new_tokens": 10**9}, "2 texts of 1,0.* GiB of cache, .*max_new_tokens"),
    "more new tokens than an int32": ({"max_new_tokens": 10**12}, "2 texts of 1,.* GiB of cache, .*max_new_tokens"),
    "samplings": ({"sampling": [Sampling()] * 3}, "3 samplings for 2 prompts"),
    "memory rows": ({"memory": Memory(np.zeros((3, 3, 16)))}, r"\[3, 3, 16\].* want \[.*2, M, 16\]"),
    "mask shape": (
        {"memory": Memory(np.zeros((2, 3, 16)), np.ones((2, 4), bool))},
        r"valid_BM is bool\[2, 4\]: .*\[2, 3\]",
    ),
    "mask dtype": (
        {"memory": Memory(np.zeros((2, 3, 16)), np.ones((2, 3), int))},
        "valid_BM is int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cepe, case):
    changes, said = BAD[case]
    with pytest.raises(ValueError, match=said) as error:
        generate(cepe, **{"prompts": [[1, 2], [3]], "max_new_tokens": 4} | changes)
    one_line(error)


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(decoder, sampling, bad):
    """The most probable of such logits would be some token, and its text would look like an answer."""
    damaged = with_leaf(decoder, "norm.scale", np.full(decoder.config.width, bad, np.float32))
    with pytest.raises(ValueError, match="logits are not finite") as error:
        generate(damaged, [[1, 2], [3]], max_new_tokens=4, sampling=sampling)
    one_line(error)
    session = Session(damaged, 100, 0, 4, None, drops=True)
    session.replace([1, 2])
    with pytest.raises(ValueError, match="logits are not finite"):
        session.next(sampling)


def test_bad_input_is_seen_before_the_first_step(decoder):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        stream(decoder, [[1]], max_new_tokens=0)


def test_a_context_for_a_plain_decoder(decoder):
    with pytest.raises(ValueError, match="context .*CEPE .*plain decoder"):
        generate(decoder, [[1]], Memory(np.zeros((1, 3, 16))), max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", -0.1), ("temperature", float("nan")), ("temperature", 1e-38), ("temperature", 1e39)),
        *(("top_k", -1), ("top_k", 2**31), ("top_p", 0.0), ("top_p", 1.1), ("top_p", 1e-40)),
        *(("seed", -1), ("seed", 2**32), ("seed", 10**30), ("seed", 0.5)),
        *(("temperature", [1]), ("temperature", True), ("top_k", 5.5), ("top_p", None)),
    ],
)
def test_bad_sampling(name, value):
    """Where it is made: no program meets it."""
    with pytest.raises(ValueError, match=f"^{name} is ({re.escape(str(value))}|a list of 1): "):
        Sampling(**{name: value})


def test_scalars_of_numpy_are_numbers():
    assert Sampling(np.float32(0.5), np.int64(3)) == Sampling(0.5, 3)
