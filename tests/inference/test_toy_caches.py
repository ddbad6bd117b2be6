"""How far a decoder with induction heads sees with each policy, and with which heads; three seeds.

6 CPU-minutes: these say that the policies do what they are for, on decoders that were trained on texts of 64 tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from support.cache_oracles import in_pieces_exactly
from support.cache_oracles import razor as razor_oracle
from support.toys import LENGTH, TOY, needles, repeats, trained

from cepe_jax.inference.caches import FULL, Policy, Razor, ReAttention, Rolling, new_cache
from cepe_jax.inference.caches.retrieval_heads import retrieval_heads
from cepe_jax.inference.calibration import head_scores
from cepe_jax.inference.generate import GREEDY, Draws, read
from cepe_jax.model.llama import Llama

pytestmark = pytest.mark.slow
NEEDLES = 200
SCOPE = {"sinks": 4, "recent": 24}
POLICIES = {
    "full": FULL,
    "rolling": Rolling(28, 4),
    "reattention": ReAttention(**SCOPE, top_k=4, selected=4, span=4, piece=8),
}
BLOCK = 15  # tokens, of which four and BOS are as long as a text of training


@pytest.fixture(scope="module", params=[0, 1, 2])
def toy(request) -> Llama:
    return trained(request.param)


def found(toy: Llama, policy: Policy, length: int) -> int:
    """Return how many needles are found, of NEEDLES in texts of this length."""
    prompts, values = needles(length, NEEDLES, length)
    cache = new_cache(toy, policy, NEEDLES, 2 * LENGTH if length < 2 * LENGTH else 1024)
    drawn_B1, _ = read(toy, prompts.tolist(), None, cache, Draws.of([GREEDY] * NEEDLES), policy)
    return int((np.asarray(drawn_B1)[:, 0] == values).sum())


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927)."""
    share = hits / count
    middle, wide = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - wide) / (1 + z**2 / count), (middle + wide) / (1 + z**2 / count)


@pytest.mark.parametrize("length", [4 * LENGTH, 8 * LENGTH])
def test_reattention_sees_further_than_it_was_trained(toy, length):
    low, high = {}, {}
    for name, policy in POLICIES.items():
        hits = found(toy, policy, length)
        print(f"{length} tokens, {name}: {hits} of {NEEDLES}")
        low[name], high[name] = wilson(hits, NEEDLES)
    assert low["reattention"] > max(high["full"], high["rolling"]) + 0.05


def test_razor_needs_its_heads(toy):
    """Four of eight heads have an induction score. They are what full attention needs, and two of them are too few."""
    tokens = np.array([0, *np.tile(np.random.default_rng(1).permutation(TOY.vocab_size)[:BLOCK], 4)], np.int32)
    induction_ZK, echo_ZK = map(np.asarray, head_scores(toy, tokens, BLOCK))
    own = retrieval_heads(induction_ZK, echo_ZK, 0.5, 0)
    wrong = retrieval_heads(-induction_ZK, echo_ZK, 0.5, 0)
    texts_BT, predicted_BT = repeats(np.random.default_rng(7))
    predicted_BT = predicted_BT[:, 1:]

    def share(logits_BTV: np.ndarray) -> float:
        return float((logits_BTV.argmax(-1)[:, :-1] == texts_BT[:, 1:])[predicted_BT].mean())

    def of(policy: Policy) -> float:
        cache = new_cache(toy, policy, len(texts_BT), LENGTH)
        hidden_BTD, _ = jax.jit(Llama.decode)(toy, texts_BT, None, cache)
        return share(np.asarray(toy.logits(hidden_BTD)))

    def unweighted(heads: Sequence[tuple[int, int]]) -> float:
        attend = razor_oracle(TOY, set(heads), 4, 8, 64, weighted=False)
        return share(np.array([in_pieces_exactly(toy, [text], attend) for text in texts_BT.tolist()]))

    policy = Razor(sinks=4, recent=8, compression=64, heads=own)
    shares = {"full": of(FULL), "own": of(policy), "wrong": of(dataclasses.replace(policy, heads=wrong))}
    three, two = (retrieval_heads(induction_ZK, echo_ZK, count / 8, 0) for count in (3, 2))
    shares |= {"three": of(dataclasses.replace(policy, heads=three)), "two": of(dataclasses.replace(policy, heads=two))}
    shares["two, plain mean"] = unweighted(two)
    print(own, shares)
    others, lowest = np.sort(induction_ZK, axis=None)[3:5]
    assert lowest > 10 * others
    assert shares["own"] > shares["full"] - 0.02
    assert shares["wrong"] < shares["full"] - 0.3
    assert shares["two"] >= shares["two, plain mean"]
