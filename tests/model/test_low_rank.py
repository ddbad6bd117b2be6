"""Low-rank factors beside weights of the decoder: a part that this file alone has, and no line of the model names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models import computed, relative_error

from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama

RANK = 2


class Factored(nnx.Module):
    """A stack of weights (Z, D, K, H) and what is added to each: the product of (Z, D, R) and (Z, R, K, H)."""

    def __init__(self, weight: nnx.Variable, rng: np.random.Generator):
        Z, D, *heads = weight.shape
        self.weight = weight
        self.down = nnx.Param(jnp.asarray(rng.standard_normal((Z, D, RANK)) * 0.1, jnp.float32))
        self.up = nnx.Param(jnp.asarray(rng.standard_normal((Z, RANK, *heads)), jnp.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, index):
        return (self.weight[...] + jnp.einsum("...DR,...RKH->...DKH", self.down[...], self.up[...]))[index]


def with_factors(decoder: Llama) -> Llama:
    made, rng = jax.tree.map(lambda x: x, decoder), np.random.default_rng(0)
    for name in "qv":
        setattr(made.layers.attention, name, Factored(getattr(made.layers.attention, name), rng))
    return made


def merged(decoder: Llama) -> Llama:
    made = jax.tree.map(lambda x: x, decoder)
    for name in "qv":
        setattr(made.layers.attention, name, nnx.Param(getattr(made.layers.attention, name)[...]))
    return made


@pytest.mark.parametrize("remat", ["none", "full"])
def test_factors_are_added_and_train_alone(cepe, tokens_BT, context_BCL, remat):
    decoder = with_factors(computed(cepe.decoder, remat=remat))
    model = Cepe(decoder, cepe.encoder, cepe.cross)
    whole = Cepe(merged(decoder), cepe.encoder, cepe.cross)
    run = jax.jit(Cepe.__call__)
    logits = run(model, tokens_BT, context_BCL)
    assert relative_error(logits, run(whole, tokens_BT, context_BCL)) < 1e-5
    assert relative_error(logits, run(cepe, tokens_BT, context_BCL)) > 1e-2

    others = {name: part for name, part in model.parts.items() if name != "decoder"}

    def loss(down: jax.Array) -> jax.Array:
        attention = jax.tree.map(lambda x: x, decoder)
        attention.layers.attention.q.down = nnx.Param(down)
        return (Cepe.from_parts(others | {"decoder": attention})(tokens_BT, context_BCL) ** 2).mean()

    down, direction = decoder.layers.attention.q.down[...], np.random.default_rng(1).standard_normal((3, 24, RANK))
    slope = (jax.jit(jax.grad(loss))(down) * direction).sum()
    with jax.enable_x64(True):
        ends = [loss(jnp.asarray(down, jnp.float64) + sign * 1e-4 * direction) for sign in (1, -1)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=1e-2)
