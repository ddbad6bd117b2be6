"""RePlug against the reference's numbers, and behind the seam against the plain decoder read anew for each context."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.models import relative_error
from support.refusals import one_line

from cepe_jax.evaluation.readers import replug as module
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.readers.models import ModelConfig, load_model
from cepe_jax.evaluation.readers.replug import RePlug, log_weights, mixture
from cepe_jax.inference.caches import full
from cepe_jax.weights.source import load

GOLDEN = Path(__file__).parents[1] / "golden"
BOS, STOPS, TEMPERATURE = 0, (1, 3), 0.5
PROMPT = Prompt([BOS, 11, 23, 59], [[91, 92, 93, 94, 95], [200, 201], [17, 18, 19]], [0.1, 1.0, -0.4])
CONTINUATIONS = [[5, 4, 9], [7]]


class PaddingIsCounted:
    """A cache that keeps nothing, and gives a token its place in the row for a position."""

    empty = True

    def piece(self, rows: int, length: int, backend: str) -> int:
        return length

    def grows_by(self, rows: int) -> bool:
        return False

    def reading(self, config, real_BT) -> SimpleNamespace:
        return SimpleNamespace(positions_BT=np.arange(real_BT.shape[1])[None])


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_the_references_numbers(name):
    """Right padding stands between chunk and input there: it is not seen, and it is counted."""
    if list((GOLDEN / name).glob("*.bin")):
        pytest.importorskip("torch")
    decoder, golden = load(GOLDEN / name).decoder, np.load(GOLDEN / name / "expected.npz")
    tokens_BT, mask_BCL = golden["input_ids"], golden["encoder_attention_mask"].astype(bool)
    assert not mask_BCL.all()
    T, (C, L) = tokens_BT.shape[1], mask_BCL.shape[1:]
    for row, tokens_T in enumerate(tokens_BT):
        read_CS = np.concatenate([golden["encoder_input_ids"][row], np.tile(tokens_T, (C, 1))], axis=1)
        mask_CS = np.concatenate([mask_BCL[row], np.ones((C, T), bool)], axis=1)
        hidden_CSD, _ = decoder.decode(read_CS, cache=PaddingIsCounted(), token_mask_BT=mask_CS)
        weights_C = log_weights(golden["replug_scores"][row], float(golden["replug_temperature"]))
        log_probs_TV = mixture(decoder.logits(hidden_CSD[:, L:]), weights_C)
        assert relative_error(log_probs_TV, golden["replug_log_probs"][row, -T:]) <= 1e-4


@pytest.fixture(scope="module")
def reader(home) -> RePlug:
    return load_model(ModelConfig(home, "replug", temperature=TEMPERATURE))


@pytest.fixture(scope="module")
def mixed(reader, plain):
    """log p (T, V) of the mixture over BOS, a context and the rest of the ids, in fp64, uncached."""

    def mixed(prompt: Prompt, more: list[int]) -> np.ndarray:
        weights = np.exp(np.array(prompt.scores) / TEMPERATURE)
        total = 0
        for context, weight in zip(prompt.contexts, weights / weights.sum(), strict=True):
            row = [BOS, *context, *prompt.ids[1:], *more]
            logits_TV = np.asarray(plain(reader.model, np.pad(row, (0, 48 - len(row)))[None]), np.float64)[0]
            p_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
            last = len(row) - len(more) - 1
            total = total + weight * (p_TV / p_TV.sum(-1, keepdims=True))[last : len(row)]
        return np.log(total)

    return mixed


def check(reader, mixed, prompt, continuations):
    for score, continuation in zip(reader.score(prompt, continuations), continuations, strict=True):
        expected_TV = mixed(prompt, continuation)[:-1]
        picked = expected_TV[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(score.log_probs, picked, atol=2e-5)
        assert score.greedy == (expected_TV.argmax(-1).tolist() == continuation)


def greedy(mixed, prompt: Prompt, count: int) -> list[int]:
    new: list[int] = []
    while len(new) < count and (token := int(mixed(prompt, new)[-1].argmax())) not in STOPS:
        new.append(token)
    return new


@pytest.mark.parametrize("group", [8, 2])
def test_scores(reader, mixed, monkeypatch, group):
    """Of rows of different lengths, also in groups; with the continuation that it would write itself."""
    monkeypatch.setattr(module, "GROUP", group)
    check(reader, mixed, PROMPT, [*CONTINUATIONS, greedy(mixed, PROMPT, 4)])


def test_stream(reader, mixed, monkeypatch):
    """Prompts side by side, each mixed from its own contexts."""
    monkeypatch.setattr(module, "GROUP", 2)
    other = Prompt(PROMPT.ids, PROMPT.contexts[1:], [3.0, 0.0])
    bare = Prompt([BOS], PROMPT.contexts, PROMPT.scores)  # then each row ends with its own token
    steps = list(reader.stream([PROMPT, other, bare], 8))
    rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert rows == [greedy(mixed, prompt, 8) for prompt in (PROMPT, other, bare)]
    assert len({tuple(row) for row in rows}) == 3


def test_long_continuations_in_pieces(reader, plain, monkeypatch):
    """Of one context the mixture is the decoder."""
    monkeypatch.setattr(full, "PIECE_PAIRS", 0)
    reader = module.RePlug(reader.model, reader.tokenizer, (), None, 1.0)
    rng = np.random.default_rng(0)
    context, ids, continuation = (rng.integers(4, 330, count).tolist() for count in (100, 60, 260))
    (score,) = reader.score(Prompt(ids, [context], [5.0]), [continuation])
    logits = np.asarray(plain(reader.model, np.array([context + ids + continuation])), np.float64)[0, 159:-1]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(score.log_probs, log_probs[np.arange(260), continuation], atol=2e-5)


def test_without_contexts(reader, mixed):
    """The plain decoder, whatever the scores."""
    bare = Prompt(PROMPT.ids)
    (score,) = reader.score(bare, CONTINUATIONS[:1])
    nothing = Prompt(PROMPT.ids, [[]], [1.0])
    np.testing.assert_allclose(score.log_probs, mixed(nothing, CONTINUATIONS[0])[range(3), CONTINUATIONS[0]], atol=2e-5)


def test_bad_input(home, reader):
    ids, contexts = PROMPT.ids, PROMPT.contexts
    long = Prompt([BOS, *range(4, 47)], [[5, 6]], [1.0])
    for call, message in [
        (lambda: ModelConfig(home, "replug", temperature=0.0), "temperature is 0.0"),
        (lambda: reader.score(Prompt(ids, contexts), [[1]]), " 0 came .* 3 contexts"),
        (lambda: reader.stream([Prompt(ids, contexts, [1.0])], 4), " 1 came .* 3 contexts"),
        (lambda: reader.stream([long], 4), " 46 tokens, and 4 .*window of 48: "),
        (lambda: reader.stream([PROMPT], 0), "^0 tokens .* 1 "),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        one_line(caught)
