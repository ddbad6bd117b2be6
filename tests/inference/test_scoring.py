"""Scores against the uncached forward pass, and their bad input."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from support.models import DECODER, ENCODER

from cepe_jax.benchmarks.hlo import arrays
from cepe_jax.inference import scoring as module
from cepe_jax.inference.caches import FULL, full, new_cache
from cepe_jax.inference.generate import generate
from cepe_jax.inference.scoring import score
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama

PROMPT = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def context():
    """Two chunks with holes."""
    rng = np.random.default_rng(11)
    return rng.integers(0, ENCODER.vocab_size, (1, 2, 5)), rng.random((1, 2, 5)) < 0.8


@pytest.fixture(scope="module")
def memory(cepe, context):
    return jax.jit(Cepe.encode)(cepe, *context)


CONTINUATIONS = [[5], [1, 2, 3], [63, 0], [9] * 21, [4, 4, 4, 4]]


@pytest.fixture(scope="module")
def scored(cepe, memory):
    """With a continuation that the model would write itself."""
    (greedy,) = generate(cepe, [PROMPT], memory, max_new_tokens=6)
    continuations = [*CONTINUATIONS, greedy, [*greedy[:-1], (greedy[-1] + 1) % DECODER.vocab_size]]
    return continuations, score(cepe, PROMPT, continuations, memory)


def expected_score(logits_TV, prompt: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
    """In fp64 from the logits of prompt and continuation."""
    logits_TV = np.asarray(logits_TV, np.float64)[len(prompt) - 1 :][: len(continuation)]
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    picked = log_probs_TV[np.arange(len(continuation)), continuation]
    return picked, logits_TV.argmax(axis=-1).tolist() == continuation


def test_score_is_that_of_the_whole_pass(cepe, context, scored, forward):
    """log softmax of the uncached forward pass over prompt and continuation."""
    assert len(scored[0]) == len(scored[1])
    for continuation, found in zip(*scored, strict=True):
        tokens_BT = np.zeros((1, 40), np.int32)
        tokens_BT[0, : len(PROMPT) + len(continuation)] = PROMPT + continuation
        log_probs, greedy = expected_score(forward(cepe, tokens_BT, *context)[0], PROMPT, continuation)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-5)
        np.testing.assert_allclose(found.total, log_probs.sum(), atol=1e-4)
        assert found.greedy == greedy
        assert found.log_probs.dtype == np.float32
    assert [found.greedy for found in scored[1]][-2:] == [True, False]


def test_scores_do_not_depend_on_the_group(cepe, memory, scored, monkeypatch):
    continuations, found = scored
    (alone,) = score(cepe, PROMPT, continuations[3:4], memory)
    np.testing.assert_allclose(alone.log_probs, found[3].log_probs, atol=1e-5)
    monkeypatch.setattr(module, "SCORED_ROWS", 3)
    for in_threes, at_once in zip(score(cepe, PROMPT, continuations, memory), found, strict=True):
        np.testing.assert_allclose(in_threes.log_probs, at_once.log_probs, atol=1e-5)
        assert in_threes.greedy == at_once.greedy


def test_long_continuations_are_read_in_pieces(cepe, context, memory, forward, monkeypatch):
    """One by one, each after the prompt's own cache; short ones beside them as ever."""
    rng = np.random.default_rng(0)
    prompt, *continuations = (rng.integers(0, DECODER.vocab_size, count).tolist() for count in (260, 200, 3, 150, 4))
    read, shapes = (module.log_probs, module.log_probs_onwards), []

    def noted(run, *given):
        shapes.append(given[1].shape)
        return run(*given)

    monkeypatch.setattr(module, "log_probs", partial(noted, read[0]))
    monkeypatch.setattr(module, "log_probs_onwards", partial(noted, read[1]))
    monkeypatch.setattr(module, "PIECE_PAIRS", 2**16)
    monkeypatch.setattr(full, "PIECE_PAIRS", 2**16)
    decode, widths = Llama._decode, []
    monkeypatch.setattr(Llama, "_decode", lambda *given: widths.append(given[1].shape[1]) or decode(*given))
    scores = score(cepe, prompt, continuations, memory)
    assert shapes == [(2, 4), (1, 256), (1, 256)]
    assert max(widths) == 128
    for continuation, found in zip(continuations, scores, strict=True):
        tokens_BT = np.zeros((1, 460), np.int32)
        tokens_BT[0, : len(prompt) + len(continuation)] = prompt + continuation
        log_probs, greedy = expected_score(forward(cepe, tokens_BT, *context)[0], prompt, continuation)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=2e-5)
        assert found.greedy == greedy


def test_score_after_one_token(decoder, plain):
    """Nothing is left to read before the continuations."""
    (found, other) = score(decoder, [33], [[1, 2], [3]])
    logits_BTV = plain(decoder, np.array([[33, 1, 2], [33, 3, 0]]))
    np.testing.assert_allclose(found.log_probs, expected_score(logits_BTV[0], [33], [1, 2])[0], atol=1e-5)
    np.testing.assert_allclose(other.log_probs, expected_score(logits_BTV[1], [33], [3])[0], atol=1e-5)
    assert score(decoder, [33], []) == []
    (long,) = score(decoder, [33], [[1, 2] * 70])  # longer than the cache of the prompt
    np.testing.assert_allclose(long.log_probs[:2], found.log_probs, atol=1e-5)


def test_logits_of_few_positions_exist_at_once(decoder):
    """No array of a scoring program is as large as all logits of a group."""
    rows, length = 16, 512
    given = [np.zeros((rows, length), kind) for kind in (int, int, bool)]
    cache = dataclasses.replace(new_cache(decoder, FULL, 1, 128), empty=False)
    program = module.log_probs.lower(decoder, *given, None, cache).compile().as_text()
    logits = [shape for _, shape in arrays(program) if DECODER.vocab_size in shape]
    assert logits
    assert max(math.prod(shape) for shape in logits) <= rows * 16 * DECODER.vocab_size


def test_a_context_for_a_plain_decoder(decoder):
    with pytest.raises(ValueError, match="context .*CEPE .*plain decoder"):
        score(decoder, [1], [[2]], np.zeros((1, 3, 16)))


@pytest.mark.parametrize(
    ("prompt", "continuations", "said"),
    [
        ([], [[1]], "empty prompt: .*begin-of-sequence"),
        ([1], [[1], []], "continuation 1 .*empty"),
        ([1], [[1], [64]], "continuation 1 .* 64, .*vocabulary .* 64"),
    ],
)
def test_bad_scores(decoder, prompt, continuations, said):
    with pytest.raises(ValueError, match=said):
        score(decoder, prompt, continuations)
