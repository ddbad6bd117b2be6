"""The cache's seam: policies that this file alone has plug in without a line of the model that names them.

Each is compared with its definition in fp64, token by token.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, relative_error
from support.oracles import by_token_exactly, rotate

from cepe_jax.config import DecoderConfig
from cepe_jax.inference import caches
from cepe_jax.inference.caches import new_cache
from cepe_jax.inference.generate import Draws, Sampling, generate, next_token, right_padded
from cepe_jax.model import rope
from cepe_jax.model.attention import Mask, attend_partial, attend_to_cache, combine
from cepe_jax.model.layers import at
from cepe_jax.model.llama import Llama

TEXT = np.random.default_rng(0).integers(0, DECODER.vocab_size, 24)
GROUP = DECODER.num_heads // DECODER.num_kv_heads
decode = jax.jit(Llama.decode)


def rotated(x_SNH: np.ndarray, positions) -> np.ndarray:
    return rotate(x_SNH, np.asarray(positions), DECODER.rope.theta)


def by_token(decoder: Llama, cache) -> np.ndarray:
    logits = []
    for token in TEXT:
        hidden_BTD, cache = decode(decoder, np.array([[token]]), None, cache)
        logits.append(decoder.logits(hidden_BTD)[0, 0])
    return np.array(logits)


# --- a selection of each layer, from keys that are not rotated ---

SELECTED = 5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selecting:
    """All tokens; a layer reads those whose keys have the largest products with its queries, numbered anew."""

    k_ZBSKH: jax.Array
    v_ZBSKH: jax.Array
    length_B: jax.Array
    empty = False

    @classmethod
    def create(cls, config: DecoderConfig, slots: int) -> "Selecting":
        shape = config.num_layers, 1, slots, config.num_kv_heads, config.head_dim
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(1, int))

    def piece(self, rows: int, length: int, backend: str) -> int:
        return 1

    def grows_by(self, rows: int) -> bool:
        return rows == 1

    def repeated(self, rows: int) -> "Selecting":
        return self

    def reading(self, config: DecoderConfig, real_BT):
        return Selection(self, jnp.minimum(self.length_B, SELECTED)[:, None], config)

    def append(self, kept_Z, real_BT) -> "Selecting":
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(x, new, self.length_B[0], 2)
            for x, new in zip((self.k_ZBSKH, self.v_ZBSKH), kept_Z, strict=True)
        )
        return Selecting(k, v, self.length_B + real_BT.sum(axis=1))


class Selection(NamedTuple):
    cache: Selecting
    positions_BT: jax.Array
    config: DecoderConfig

    def attend(self, index, q_BTNH, rotated_BTNH):
        k_SKH, v_SKH = at(self.cache.k_ZBSKH, index)[0], at(self.cache.v_ZBSKH, index)[0]
        products_S = jnp.einsum("KGH,SKH->S", q_BTNH[0, 0].reshape(-1, GROUP, q_BTNH.shape[-1]), k_SKH)
        there_S = jnp.arange(len(k_SKH)) < self.cache.length_B
        chosen = jnp.sort(jax.lax.top_k(jnp.where(there_S, products_S, -jnp.inf), SELECTED)[1])
        # Those that are not there have the largest numbers where there are few, and come last.
        table = rope.rope_table(self.config.rope, self.config.head_dim, jnp.arange(SELECTED)[None])
        keys_BSKH = rope.rotate(k_SKH[chosen][None], table)
        return attend_partial(rotated_BTNH, keys_BSKH, v_SKH[chosen][None], Mask(valid_BS=there_S[chosen][None]))

    def keep(self, k_BTKH, rotated_BTKH, v_BTKH):
        return k_BTKH, v_BTKH


def select(index, q_NH, keys_SKH, values_SKH):
    before = keys_SKH[:-1]
    products_S = np.einsum("kgh,skh->s", q_NH.reshape(-1, GROUP, q_NH.shape[-1]), before)
    chosen = np.sort(np.argsort(-products_S)[:SELECTED]).astype(int)
    rows = [*chosen, len(keys_SKH) - 1]
    k_SKH = rotated(keys_SKH[rows], np.arange(len(rows)))
    q_NH = rotated(q_NH[None], [len(rows) - 1])[0]
    out = np.zeros(q_NH.shape)
    for n in range(len(q_NH)):
        weights = np.exp(k_SKH[:, n // GROUP] @ q_NH[n] / np.sqrt(q_NH.shape[-1]))
        out[n] = weights / weights.sum() @ values_SKH[rows, n // GROUP]
    return out


def test_a_selection_of_each_layer(decoder):
    ours = by_token(decoder, Selecting.create(DECODER, len(TEXT)))
    assert relative_error(ours, by_token_exactly(decoder, TEXT, select)) < 1e-5


# --- heads that keep all, of all layers in one array, and heads that keep a window and a weighted mean of the rest ---

RETRIEVAL = ((), (1,), (0, 1))  # of each of three layers
RECENT = 4


def numbers_of(wanted) -> np.ndarray:
    """(layers, heads): the place of each wanted head among all, -1 for the others."""
    places = np.full((DECODER.num_layers, DECODER.num_kv_heads), -1)
    for number, place in enumerate(wanted):
        places[place] = number
    return places


ALL = [(z, k) for z in range(DECODER.num_layers) for k in range(DECODER.num_kv_heads)]
WHOLE = [(z, k) for z, k in ALL if k in RETRIEVAL[z]]
SHORT = [place for place in ALL if place not in WHOLE]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Razor:
    """Rotated keys and values: of retrieval heads all, of the others the last ones and the sum of those dropped."""

    k_RBSH: jax.Array
    v_RBSH: jax.Array
    k_OBWH: jax.Array
    v_OBWH: jax.Array
    k_sum_OBH: jax.Array
    v_sum_OBH: jax.Array
    length_B: jax.Array
    empty = False

    @classmethod
    def create(cls, config: DecoderConfig, slots: int) -> "Razor":
        H = config.head_dim
        whole, short, sums = (len(WHOLE), 1, slots, H), (len(SHORT), 1, RECENT, H), (len(SHORT), 1, H)
        return cls(*(jnp.zeros(shape) for shape in (whole, whole, short, short, sums, sums)), jnp.zeros(1, int))

    def piece(self, rows: int, length: int, backend: str) -> int:
        return 1

    def grows_by(self, rows: int) -> bool:
        return rows == 1

    def repeated(self, rows: int) -> "Razor":
        return self

    def reading(self, config: DecoderConfig, real_BT):
        return RazorReading(self, self.length_B[:, None])

    def append(self, kept_Z, real_BT) -> "Razor":
        length = self.length_B[0]
        slot, full = length % RECENT, length >= RECENT

        def of(heads, new_ZBTKH):
            return jnp.stack([new_ZBTKH[z, :, 0, k] for z, k in heads])

        def written(x, new, slot):
            return jax.lax.dynamic_update_slice_in_dim(x, new[:, :, None], slot, 2)

        k, v = kept_Z
        gone_k, gone_v = (jax.lax.dynamic_index_in_dim(x, slot, 2, False) for x in (self.k_OBWH, self.v_OBWH))
        return Razor(
            written(self.k_RBSH, of(WHOLE, k), length),
            written(self.v_RBSH, of(WHOLE, v), length),
            written(self.k_OBWH, of(SHORT, k), slot),
            written(self.v_OBWH, of(SHORT, v), slot),
            self.k_sum_OBH + jnp.where(full, gone_k, 0),
            self.v_sum_OBH + jnp.where(full, gone_v, 0),
            self.length_B + real_BT.sum(axis=1),
        )


class RazorReading(NamedTuple):
    cache: Razor
    positions_BT: jax.Array

    def attend(self, index, q_BTNH, rotated_BTNH):
        cache, length = self.cache, self.cache.length_B
        whole_K, short_K = (jnp.asarray(numbers_of(heads))[index] for heads in (WHOLE, SHORT))

        def of(x, places_K):
            return jnp.moveaxis(x[jnp.maximum(places_K, 0)], 0, 1)  # (B, K, ...)

        def alone(part, places_K):
            """The part, nothing in heads that have no such place."""
            mine = (places_K >= 0)[:, None, None]
            lowest = jnp.finfo(jnp.float32).min
            return tuple(jnp.where(mine, x, fill) for x, fill in zip(part, (0, 0, lowest), strict=True))

        all_seen = Mask(valid_BS=jnp.arange(cache.k_RBSH.shape[2]) < length[:, None])
        last_seen = Mask(valid_BS=jnp.arange(RECENT) < length[:, None])
        whole = attend_to_cache(rotated_BTNH, of(cache.k_RBSH, whole_K), of(cache.v_RBSH, whole_K), all_seen)
        last = attend_to_cache(rotated_BTNH, of(cache.k_OBWH, short_K), of(cache.v_OBWH, short_K), last_seen)
        dropped = jnp.maximum(length - RECENT, 0)[:, None, None]  # one key for all of them, so many times
        mean_k, mean_v = (of(x, short_K) / jnp.maximum(dropped, 1) for x in (cache.k_sum_OBH, cache.v_sum_OBH))
        mean = attend_to_cache(rotated_BTNH, mean_k[:, :, None], mean_v[:, :, None], Mask())
        weight = dropped[..., None, None].astype(jnp.float32)
        rest = mean[0] * weight, mean[1] * weight, jnp.where(weight > 0, mean[2], jnp.finfo(jnp.float32).min)
        return combine(alone(whole, whole_K), alone(last, short_K), alone(rest, short_K))

    def keep(self, k_BTKH, rotated_BTKH, v_BTKH):
        return rotated_BTKH, v_BTKH


def razor(index, q_NH, keys_SKH, values_SKH):
    place = len(keys_SKH) - 1
    k_SKH, q_NH = rotated(keys_SKH, np.arange(place + 1)), rotated(q_NH[None], [place])[0]
    out = np.zeros(q_NH.shape)
    for n in range(len(q_NH)):
        k, v, counts = k_SKH[:, n // GROUP], values_SKH[:, n // GROUP], np.ones(place + 1)
        dropped = place - RECENT
        if n // GROUP not in RETRIEVAL[index] and dropped > 0:
            k, v = (np.concatenate([x[:dropped].mean(0, keepdims=True), x[dropped:]]) for x in (k, v))
            counts = np.array([dropped, *np.ones(RECENT + 1)])
        weights = counts * np.exp(k @ q_NH[n] / np.sqrt(q_NH.shape[-1]))
        out[n] = weights / weights.sum() @ v
    return out


def test_heads_of_all_layers_in_one_array(decoder):
    cache = Razor.create(DECODER, len(TEXT))
    numbers = 2 * DECODER.head_dim * (3 * len(TEXT) + 3 * RECENT + 3)
    assert sum(x.size for x in jax.tree.leaves(dataclasses.replace(cache, length_B=None))) == numbers
    assert relative_error(by_token(decoder, cache), by_token_exactly(decoder, TEXT, razor)) < 1e-5


# --- rows that come and go ---

POLICIES = (
    caches.FULL,
    caches.Rolling(9, 2),
    caches.ReAttention(2, 5, 2, 2, 3, piece=4),
    caches.Razor(2, 4, 2, heads=((0, 1), (2, 0), (2, 1))),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_rows_join_and_leave(decoder, policy):
    """Row 1 begins five steps after row 0, which then gets another text: each text is the one it is alone."""
    prompts = [TEXT[:5].tolist(), TEXT[5:12].tolist(), TEXT[12:15].tolist()]
    samplings = [Sampling(1.5, seed=seed) for seed in (3, 4, 5)]
    begins = {0: (0, 0), 5: (1, 1), 9: (0, 2)}  # step: (row, text)
    cache, text_of, drawn = new_cache(decoder, policy, 2, 32), {}, {text: [] for text in range(3)}
    for step in range(18):
        fresh = {}
        if step in begins:
            row, text = begins[step]
            text_of[row] = text
            fresh = {row: prompts[text]}
            cache = cache.emptied(np.arange(2) == row)
        given = [fresh.get(row) or drawn[text_of[row]][-1:] if row in text_of else [] for row in range(2)]
        tokens_BT, mask_BT = right_padded(given, 8 if fresh else 1)
        draws = Draws.of([samplings[text_of.get(row, 0)] for row in range(2)])
        draws = draws._replace(number_B=np.array([len(drawn[text_of.get(row, 0)]) for row in range(2)], np.int32))
        tokens_B1, cache = next_token(decoder, tokens_BT, mask_BT, None, cache, draws)
        for row, text in text_of.items():
            drawn[text].append(int(tokens_B1[row, 0]))
    assert [len(tokens) for tokens in drawn.values()] == [9, 13, 9]
    for text, tokens in drawn.items():
        alone = {"max_new_tokens": len(tokens), "sampling": [samplings[text]], "policy": policy}
        assert generate(decoder, [prompts[text]], **alone) == [tokens]
