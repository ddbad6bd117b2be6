"""Prefill and decode through the cache equal the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, computed, relative_error

from cepe_jax.inference.caches import FULL, new_cache
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory


@jax.jit
def step(model, tokens, memory, cache, token_mask):
    hidden, cache = Cepe.decode(model, tokens, memory, cache, token_mask)
    return model.decoder.logits(hidden), cache


def run(model, tokens_BT, mask_BT, memory, sizes, slots):
    """Logits of all tokens, fed in pieces of these sizes; and the cache after them."""
    cache, start, pieces = new_cache(model.decoder, FULL, tokens_BT.shape[0], slots), 0, []
    for size in sizes:
        part = slice(start, start + size)
        mask = None if mask_BT is None else mask_BT[:, part]
        logits, cache = step(model, tokens_BT[:, part], memory, cache, mask)
        pieces.append(np.asarray(logits))
        start += size
    return np.concatenate(pieces, axis=1), cache


@pytest.fixture(scope="module")
def memory(cepe, context_BCL, context_mask_BCL):
    return jax.jit(Cepe.encode)(cepe, context_BCL, context_mask_BCL)


@pytest.fixture(scope="module")
def holes_BT(token_mask_BT):
    """Left padding in row 1; row 0 has ended after its fifth token, and a prompt token is missing from its middle."""
    mask = token_mask_BT.copy()
    mask[0, 1] = mask[0, 5] = False
    return mask


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("reading", [False, True], ids=["plain", "memory"])
def test_prefill_and_decode_equal_the_full_pass(
    sizes, masked, reading, cepe, forward, tokens_BT, holes_BT, memory, context_BCL, context_mask_BCL
):
    mask = holes_BT if masked else None
    context = (context_BCL, context_mask_BCL) if reading else (None, None)
    wanted = np.asarray(forward(cepe, tokens_BT, *context, mask))
    ours, _ = run(cepe, tokens_BT, mask, memory if reading else None, sizes, slots=9)
    real = np.ones_like(holes_BT) if mask is None else mask
    assert relative_error(ours[real], wanted[real]) < 1e-5


def test_what_the_cache_holds(cepe, tokens_BT, holes_BT, memory):
    _, whole = run(cepe, tokens_BT, holes_BT, memory, (7,), slots=9)
    _, pieces = run(cepe, tokens_BT, holes_BT, memory, (4, 2, 1), slots=9)
    for cache in (whole, pieces):
        assert not cache.empty
        assert cache.slots == 9
        assert not cache.k_ZBKSH[:, :, :, 7:].any()
    assert whole.length_B.tolist() == [7, 7]
    np.testing.assert_array_equal(whole.valid_BS, np.pad(holes_BT, ((0, 0), (0, 2))))
    # Row 0's second piece ended with a hole, and the next token took its slot.
    assert pieces.length_B.tolist() == [6, 7]
    assert pieces.valid_BS[0].nonzero()[0].tolist() == [0, 2, 3, 4, 5]
    for name in ("k_ZBKSH", "v_ZBKSH"):
        for row in range(2):
            ours, wanted = (
                np.asarray(getattr(c, name))[:, row][:, :, np.asarray(c.valid_BS)[row]] for c in (pieces, whole)
            )
            assert relative_error(ours, wanted) < 1e-5


def test_padding_on_the_right_costs_no_slots(cepe, tokens_BT, memory, forward, context_BCL, context_mask_BCL):
    """A prompt of 3 and one of 5 in 7 slots, then two more tokens of each, which follow the row's own.

    The slots that padding took are written again, and the logits are those of each row alone.
    """
    prompts, mask = [5, 3], np.arange(7) < np.array([[5], [3]])
    cache = FullCache.create(DECODER, "float32", 2, 7)
    first, cache = step(cepe, tokens_BT, memory, cache, mask)
    assert cache.length_B.tolist() == [5, 3]
    second, cache = step(cepe, tokens_BT[:, :1], memory, cache, None)
    third, cache = step(cepe, tokens_BT[:, 1:2], memory, cache, None)
    assert cache.length_B.tolist() == [7, 5]
    np.testing.assert_array_equal(cache.valid_BS, np.arange(7) < np.array([[7], [5]]))
    for row, count in enumerate(prompts):
        tokens = np.concatenate([tokens_BT[row, :count], tokens_BT[row, :2], np.zeros(5 - count, int)])
        wanted = forward(cepe, tokens[None], context_BCL[row : row + 1], context_mask_BCL[row : row + 1])[0]
        ours = np.stack([first[row, count - 1], second[row, 0], third[row, 0]])
        assert relative_error(ours, wanted[count - 1 : count + 2]) < 1e-5


def test_nothing_real_takes_no_slot(cepe, tokens_BT, memory):
    _, cache = run(cepe, tokens_BT, None, memory, (4,), slots=9)
    nothing = np.zeros((2, 2), bool)
    _, same = step(cepe, tokens_BT[:, :2], memory, cache, nothing)
    assert same.length_B.tolist() == [4, 4]
    np.testing.assert_array_equal(same.valid_BS, cache.valid_BS)


def test_a_cache_of_one_row_is_read_by_all(cepe, tokens_BT, memory):
    """And written to by none: the logits are those of a copy of it for each row."""
    own = jax.tree.map(lambda x: x[:1], memory)
    both = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), own)
    mask = np.array([[True, True, True], [True, False, False]])
    _, cache = run(cepe, tokens_BT[:1, :4], None, own, (4,), slots=5)  # no room for more
    _, copies = run(cepe, np.repeat(tokens_BT[:1, :4], 2, axis=0), None, both, (4,), slots=7)
    wanted, _ = step(cepe, tokens_BT[:, 4:], both, copies, mask)
    ours, same = step(cepe, tokens_BT[:, 4:], both, cache, mask)
    assert relative_error(ours[mask], wanted[mask]) < 1e-6
    for now, before in zip(jax.tree.leaves(same), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(now, before)


def test_empty_is_a_statement_about_the_program(cepe, tokens_BT):
    """A new cache is empty and is not attended to; one whose slots are all invalid gives the same numbers."""
    new = FullCache.create(DECODER, "float32", 2, 9)
    assert new.empty
    assert jax.tree.structure(new) != jax.tree.structure(dataclasses.replace(new, empty=False))
    first, _ = step(cepe, tokens_BT[:, :4], None, new, None)
    attended, cache = step(cepe, tokens_BT[:, :4], None, dataclasses.replace(new, empty=False), None)
    assert relative_error(attended, first) < 1e-6
    assert cache.length_B.tolist() == [4, 4]


def test_cache_has_the_dtype_of_activations(cepe, tokens_BT):
    narrow = computed(cepe.decoder, dtype="bfloat16")
    cache = new_cache(narrow, FULL, 2, 9)
    assert cache.k_ZBKSH.dtype == jnp.bfloat16
    assert cache.k_ZBKSH.shape == (3, 2, 2, 9, 10)
    hidden, cache = jax.jit(lambda model, tokens, cache: model.decode(tokens, None, cache))(
        narrow, tokens_BT[:, :4], cache
    )
    assert {hidden.dtype, cache.k_ZBKSH.dtype, cache.v_ZBKSH.dtype} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("reading", [False, True], ids=["plain", "memory"])
def test_only_the_last_layers_read_the_memory(reading, cepe, tokens_BT, memory):
    """Layer 1 of 3 is the first that reads, so the keys of layers 0 and 1 do not know of the memory; layer 2's do."""
    other = Memory(memory.states_BME + 1, memory.valid_BM)
    _, cache = run(cepe, tokens_BT, None, memory if reading else None, (7,), slots=7)
    _, changed = run(cepe, tokens_BT, None, other, (7,), slots=7)
    assert relative_error(changed.k_ZBKSH[:2], cache.k_ZBKSH[:2]) < 1e-6
    assert relative_error(changed.k_ZBKSH[2], cache.k_ZBKSH[2]) > 1e-2


def test_a_full_cache_says_so(decoder):
    """Never are the last slots written over: known from the shapes alone, or from how many are used."""
    cache = FullCache.create(DECODER, "float32", 1, 4)
    with pytest.raises(ValueError, match=r"\b5 .* 0 .* 4 "):
        jax.eval_shape(decoder.decode, jnp.zeros((1, 5), int), None, cache)
    _, cache = decoder.decode(jnp.zeros((1, 3), int), None, cache)
    with pytest.raises(ValueError, match=r"\b2 .* 3 .* 4 "):
        decoder.decode(jnp.zeros((1, 2), int), None, cache)
