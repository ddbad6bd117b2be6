"""Every reader behind the seam: against the uncached model over what it is said to read."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from support.refusals import one_line
from support.tokenizers import WINDOW

from cepe_jax.evaluation.readers.language_model import LanguageModel, Prompt, generate
from cepe_jax.evaluation.readers.models import ModelConfig, check_model, load_model
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.inference.scoring import Score
from cepe_jax.model.llama import Llama
from cepe_jax.model.rope import rope_table
from cepe_jax.weights.source import load, save

BOS, STOPS = 0, (1, 3)
LENGTH = 96  # that texts are filled up to: one program
PROMPTS = [
    Prompt([BOS, 11, 23, 59, 40, 7], [[91, 92, 93, 94, 95], [200, 201]]),
    Prompt([BOS, 300, 12], [[17, 18, 19]]),
    Prompt([64, 65, 66]),
]
CONTINUATIONS = [[5, 4, 9], [7], [22, 180, 6, 33, 21, 250]]

Logits = Callable[[Sequence[int]], np.ndarray]  # (T, V) of a text


def filled(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.pad(ids, (0, LENGTH - len(ids)))[None], np.arange(LENGTH)[None] < len(ids)


@pytest.fixture(scope="module")
def weights(home):
    return load(home)


@pytest.fixture(scope="module")
def plain_logits(weights, plain) -> Logits:
    return lambda ids: np.asarray(plain(weights.decoder, *filled(ids)))[0, : len(ids)]


@pytest.fixture(scope="module")
def cepe_logits(weights, forward):
    """Logits beside contexts, of which there are three of eight tokens at most."""

    def beside(contexts: Sequence[Sequence[int]]) -> Logits:
        context_BCL, mask_BCL = np.zeros((1, 3, 8), np.int32), np.zeros((1, 3, 8), bool)
        for row, context in enumerate(contexts):
            context_BCL[0, row, : len(context)], mask_BCL[0, row, : len(context)] = context, True

        def logits(ids: Sequence[int]) -> np.ndarray:
            tokens_BT, real_BT = filled(ids)
            return np.asarray(forward(weights, tokens_BT, context_BCL, mask_BCL, real_BT))[0, : len(ids)]

        return logits

    return beside


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check_scores(scores: list[Score], logits: Logits, ids: Sequence[int]) -> None:
    """The scores of CONTINUATIONS are what the logits say, given `ids`."""
    assert len(scores) == len(CONTINUATIONS)
    for score, continuation in zip(scores, CONTINUATIONS, strict=True):
        rows = log_softmax(logits([*ids, *continuation]))[len(ids) - 1 : -1]
        np.testing.assert_allclose(score.log_probs, rows[np.arange(len(rows)), continuation], atol=2e-5)
        assert score.greedy == bool((rows.argmax(-1) == continuation).all())


def greedy(logits: Logits, ids: Sequence[int], count: int) -> list[int]:
    new: list[int] = []
    while len(new) < count and (token := int(logits([*ids, *new])[-1].argmax())) not in STOPS:
        new.append(token)
    return new


def rows_of(model: LanguageModel, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    return [[i for i in row if i is not None] for row in zip(*model.stream(prompts, count), strict=True)]


@pytest.fixture(scope="module")
def encoder_reads(home) -> LanguageModel:
    return load_model(ModelConfig(home))


@pytest.fixture(scope="module")
def decoder_reads(home) -> LanguageModel:
    return load_model(ModelConfig(home, "decoder"))


def test_cepe(encoder_reads, cepe_logits):
    """Each prompt reads its own contexts, each a chunk; alone and in a batch.

    6 CPU-seconds: each kind of prompt compiles a program.
    """
    expected = [greedy(cepe_logits(prompt.contexts), prompt.ids, 9) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 3
    assert rows_of(encoder_reads, PROMPTS, 9) == expected
    first, second, _ = expected
    assert rows_of(encoder_reads, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], 9) == [first, second, first]
    for prompt in PROMPTS:
        check_scores(encoder_reads.score(prompt, CONTINUATIONS), cepe_logits(prompt.contexts), prompt.ids)


def test_one_memory_for_prompts_of_the_same_contexts(encoder_reads, cepe_logits):
    contexts = PROMPTS[0].contexts
    expected = [greedy(cepe_logits(contexts), prompt.ids, 9) for prompt in PROMPTS]
    assert rows_of(encoder_reads, [Prompt(prompt.ids, contexts) for prompt in PROMPTS], 9) == expected
    assert expected[1:] != [greedy(cepe_logits(prompt.contexts), prompt.ids, 9) for prompt in PROMPTS][1:]


def test_cepe_cuts_long_contexts(encoder_reads, cepe_logits):
    """As long as the prompt says, whatever a prompt beside it says."""
    ids, contexts = PROMPTS[0].ids, PROMPTS[0].contexts
    cut = [contexts[0][:3], contexts[0][3:], contexts[1]]
    prompt = Prompt(ids, contexts, chunk_length=3)
    check_scores(encoder_reads.score(prompt, CONTINUATIONS), cepe_logits(cut), ids)
    found = np.asarray(encoder_reads._memory([prompt, PROMPTS[0], prompt]).states_BME)
    whole = encoder_reads._memory([PROMPTS[0]]).states_BME
    np.testing.assert_allclose(found[1], np.asarray(whole)[0], atol=1e-5)
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_a_plain_decoder(decoder_reads, plain_logits):
    """Contexts stand before the prompt and after its BOS."""
    texts = [[BOS, 91, 92, 93, 94, 95, 200, 201, 11, 23, 59, 40, 7], [BOS, 17, 18, 19, 300, 12], [64, 65, 66]]
    assert rows_of(decoder_reads, PROMPTS, 9) == [greedy(plain_logits, text, 9) for text in texts]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        check_scores(decoder_reads.score(prompt, CONTINUATIONS), plain_logits, text)


def test_a_decoder_reads_the_end_of_a_long_text(decoder_reads, plain_logits, home):
    """As much as leaves room for what follows: BOS, and the last tokens. A larger window holds all of it."""
    context, ids = list(range(100, 160)), [BOS, 11, 23, 59]
    new = max(map(len, CONTINUATIONS))
    text = [BOS, *context, 11, 23, 59]
    room = WINDOW - (new - 1)  # the last token is not read
    check_scores(decoder_reads.score(Prompt(ids, [context]), CONTINUATIONS), plain_logits, [BOS, *text[-(room - 1) :]])
    without = decoder_reads.score(Prompt(ids[1:], [context]), CONTINUATIONS)
    check_scores(without, plain_logits, text[-room:])
    (row,) = rows_of(decoder_reads, [Prompt(ids, [context])], 9)
    assert row == greedy(plain_logits, [BOS, *text[-(WINDOW - 8 - 1) :]], 9)
    full = dataclasses.replace(decoder_reads, window=len(text) + new - 1)
    check_scores(full.score(Prompt(ids, [context]), CONTINUATIONS), plain_logits, text)


def test_texts(encoder_reads, cepe_logits):
    prompts, tokenizer = PROMPTS[:2], encoder_reads.tokenizer
    ids = [greedy(cepe_logits(prompt.contexts), prompt.ids, 9) for prompt in prompts]
    whole = [
        tokenizer.decode([*prompt.ids, *new]).removeprefix(tokenizer.decode(prompt.ids))
        for prompt, new in zip(prompts, ids, strict=True)
    ]
    assert generate(encoder_reads, prompts, 9) == whole
    stop = whole[0][4:6]
    assert generate(encoder_reads, prompts, 9, [stop]) == [text.split(stop)[0] for text in whole]


@pytest.mark.parametrize(("rope", "factor"), [("linear", 4.0), ("yarn", 2.5)])
def test_scaled_positions(home, rope, factor):
    """Of a decoder that was trained without: against transformers, in its own words."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = load_model(ModelConfig(home, "decoder", rope=rope, factor=factor))
    assert model.window == WINDOW * factor
    scaling = {"rope_type": rope, "factor": factor} | (
        {"original_max_position_embeddings": WINDOW} if rope == "yarn" else {}
    )
    config, ids = model.model.config, np.arange(30, 30 + LENGTH)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=config.width,
            head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            max_position_embeddings=int(WINDOW * factor),
            rope_parameters={"rope_theta": config.rope.theta} | scaling,
        )
    )
    cos, sin = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    ours = rope_table(config.rope, config.head_dim, np.arange(LENGTH)[None])
    half = config.head_dim // 2
    np.testing.assert_allclose(np.asarray(ours[0])[0, :, 0], cos[0, :, :half], atol=1e-6)
    np.testing.assert_allclose(np.asarray(ours[1])[0, :, 0], sin[0, :, :half], atol=1e-6)
    logits = np.asarray(jax.jit(Llama.__call__)(model.model, *filled(ids)))[0]
    (score,) = model.score(Prompt(ids[:80].tolist()), [ids[80:].tolist()])
    np.testing.assert_allclose(score.log_probs, log_softmax(logits)[np.arange(79, LENGTH - 1), ids[80:]], atol=2e-5)


def test_bad_input(home, encoder_reads, decoder_reads, tmp_path):
    long = Prompt([BOS, *range(100, 147)])
    for call, message in [
        (lambda: ModelConfig(home, "both"), "reads is 'both': .*encoder, decoder, replug"),
        (lambda: ModelConfig(home, window=1), "window is 1: .* 2 "),
        (lambda: ModelConfig(home, "decoder", window=9, cache=CacheConfig("rolling")), "cache.kind is rolling.*window"),
        (
            lambda: ModelConfig(home, "replug", cache=CacheConfig("rolling")),
            "cache.kind is rolling",
        ),
        (lambda: ModelConfig(home, "decoder", temperature=2.0), "temperature is 2.0, .*decoder.*leave it out"),
        (lambda: ModelConfig(home, rope="ntk"), "rope is 'ntk': .*trained, linear, yarn"),
        (lambda: ModelConfig(home, rope="linear"), "rope linear .* 1.0: "),
        (lambda: ModelConfig(home, factor=2.0), "rope trained .* 2.0: "),
        (lambda: encoder_reads.stream([long], 2), " 48 tokens and 2 .*window of 48: "),
        (lambda: encoder_reads.score(long, [[5, 6], [7]]), " 48 tokens and 2 .*window"),
        (lambda: decoder_reads.stream([long], 49), "49 new tokens .*window's 48"),
        (lambda: encoder_reads.stream([Prompt([BOS], [[]])], 2), "passage 0 .*no tokens"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        one_line(caught)


def test_windows_above_the_positions(home):
    """Are refused where positions are those of the text; rope scaling gives more, and a rolling cache needs none."""
    for reads in "encoder", "decoder", "replug":
        with pytest.raises(ValueError, match=f"window is 49: .* 48, .*{home.name} "):
            check_model(ModelConfig(home, reads, window=WINDOW + 1))
    with pytest.raises(ValueError, match="window is 97: .* 96"):
        check_model(ModelConfig(home, "decoder", window=2 * WINDOW + 1, rope="linear", factor=2.0))
    assert load_model(ModelConfig(home, "decoder", window=2 * WINDOW, rope="linear", factor=2.0)).window == 2 * WINDOW
    rolling = CacheConfig("rolling", window=WINDOW + 1)
    assert load_model(ModelConfig(home, "decoder", cache=rolling)).cache.window == WINDOW + 1
    assert load_model(ModelConfig(home, "decoder", cache=CacheConfig("rolling"))).cache.window == WINDOW


def test_directories_that_cannot_be_read_so(home, weights, tmp_path):
    """No weight is looked at."""
    save(weights.decoder, tmp_path / "plain", home)
    (tmp_path / "plain" / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="plain .*--model.reads=decoder"):
        check_model(ModelConfig(tmp_path / "plain"))
    mistral = {"max_position_embeddings": 64, "model_type": "mistral", "sliding_window": 40}
    for said, changes in [
        ("plain sees 40 of its 64 positions at once", {"huggingface": mistral}),
        ("max_position_embeddings, .*rope yarn", {"huggingface": {}}),
        ("rope scaling linear", {"scaling": "linear", "factor": 2.0}),
    ]:
        written = json.loads((tmp_path / "plain" / "config.json").read_text())
        written |= {"huggingface": changes.pop("huggingface", written["huggingface"])}
        written["decoder"]["rope"] |= changes
        (tmp_path / "plain" / "config.json").write_text(json.dumps(written))
        with pytest.raises(ValueError, match=said):
            check_model(ModelConfig(tmp_path / "plain", "decoder", rope="yarn", factor=2.0))
    with pytest.raises(ValueError, match="positions .*cache.window"):
        check_model(ModelConfig(tmp_path / "plain", "decoder", cache=CacheConfig("rolling")))
