"""The model against the method in fp64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import (
    DECODER,
    ENCODER,
    computed,
    filled,
    float64,
    make_decoder,
    make_encoder,
    relative_error,
    with_config,
)
from support.oracles import NONE, method

from cepe_jax.config import CrossLayers
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.parts import split


@pytest.mark.parametrize("case", ["all real", "holes, padding and an absent chunk", "no context", "all masked"])
@pytest.mark.parametrize("left_padded", [False, True], ids=["full rows", "left-padded rows"])
def test_logits_are_the_methods(
    case, left_padded, cepe, forward, tokens_BT, context_BCL, context_mask_BCL, token_mask_BT
):
    context, mask, given = {
        "all real": (context_BCL, np.ones_like(context_mask_BCL), (context_BCL, None)),
        "holes, padding and an absent chunk": (context_BCL, context_mask_BCL, (context_BCL, context_mask_BCL)),
        "no context": (NONE, NONE.astype(bool), (None, None)),
        "all masked": (NONE, NONE.astype(bool), (context_BCL, np.zeros_like(context_mask_BCL))),
    }[case]
    keep_BT = token_mask_BT if left_padded else np.ones_like(token_mask_BT)
    ours = np.asarray(forward(cepe, tokens_BT, *given, token_mask_BT if left_padded else None))
    assert ours.dtype == np.float32
    weights = float64(cepe)
    for row, keep in enumerate(keep_BT):
        wanted = method(weights, cepe.config, tokens_BT[row, keep], context[row], mask[row])
        assert relative_error(ours[row, keep], wanted) < 1e-5


FOUR = dataclasses.replace(DECODER, num_layers=4)
READERS = [
    (CrossLayers("last", 2), (2, 3)),
    (CrossLayers("first", 1), (0,)),
    (CrossLayers("first", 3), (0, 1, 2)),
    (CrossLayers("every", 2), (1, 3)),
    (CrossLayers("every", 1), (3,)),
]


def four_layers(layers: CrossLayers, remat: str = "none") -> Cepe:
    decoder = computed(make_decoder(FOUR), remat=remat)

    def cross():
        return cross_from_self_attention(decoder, ENCODER, layers, "normal", key=jax.random.key(0))

    return Cepe(decoder, make_encoder(), filled(cross, seed=3))


@pytest.mark.parametrize(("layers", "readers"), READERS, ids=str)
def test_the_layers_that_are_named_read(layers, readers, forward, tokens_BT, context_BCL, context_mask_BCL):
    """At once, and token by token through a cache."""
    cepe = four_layers(layers)
    weights = float64(cepe)
    given = tokens_BT[0], context_BCL[0], context_mask_BCL[0]
    wanted = method(weights, cepe.config, *given, readers)
    assert relative_error(forward(cepe, *(x[None] for x in given))[0], wanted) < 1e-5
    memory = cepe.encode(context_BCL[:1], context_mask_BCL[:1])
    cache, logits = FullCache.create(FOUR, "float32", 1, tokens_BT.shape[1]), []
    step = jax.jit(lambda token, cache: cepe.decode(token, memory, cache))
    for token in tokens_BT[0]:
        hidden_BTD, cache = step(token[None, None], cache)
        logits.append(cepe.decoder.logits(hidden_BTD)[0, 0])
    assert relative_error(jnp.stack(logits), wanted) < 1e-5


@pytest.mark.parametrize("distinct", [2, 3])
def test_chunks_have_the_positions_that_the_method_gives_them(
    distinct, cepe, forward, tokens_BT, context_BCL, context_mask_BCL
):
    cepe = Cepe(cepe.decoder, with_config(cepe.encoder, chunk_positions=distinct), cepe.cross)
    weights, ours = float64(cepe), forward(cepe, tokens_BT, context_BCL, context_mask_BCL)
    for row in range(2):
        wanted = method(weights, cepe.config, tokens_BT[row], context_BCL[row], context_mask_BCL[row])
        assert relative_error(ours[row], wanted) < 1e-5


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(("layers", "readers"), READERS[1:4:2], ids=str)
def test_gradients_reach_the_layers_that_are_named(layers, readers, remat, tokens_BT, context_BCL, context_mask_BCL):
    """Central differences of the fp64 method along a random direction of cross-attention's queries and the encoder."""
    cepe, rng = four_layers(layers, remat), np.random.default_rng(5)
    trainable, frozen = split(cepe, ("cross", "encoder"))
    given = tokens_BT[:1], context_BCL[:1], context_mask_BCL[:1]
    weight_TV = rng.standard_normal((tokens_BT.shape[1], FOUR.vocab_size))
    loss = jax.jit(lambda trainable: (Cepe.from_parts(trainable | frozen)(*given)[0] * weight_TV).sum())
    grads = {name: float64(part) for name, part in jax.grad(loss)(trainable).items()}
    weights, eps = float64(cepe), 1e-5
    for part, path in (("cross", ("q",)), ("encoder", ("layers", "mlp", "up"))):
        grad, at = grads[part], weights[part]
        for name in path[:-1]:
            grad, at = grad[name], at[name]
        grad, value = grad[path[-1]], at[path[-1]]
        direction, ends = rng.standard_normal(value.shape), []
        for sign in (1, -1):
            at[path[-1]] = value + sign * eps * direction
            ends.append((method(weights, cepe.config, *(x[0] for x in given), readers) * weight_TV).sum())
        at[path[-1]] = value
        assert float((grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-4)
