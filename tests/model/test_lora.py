"""Low-rank factors beside the weights: the arithmetic of merged weights, and what trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import CROSS_LAYERS, DECODER, ENCODER, bits, computed, filled, relative_error

from cepe_jax.config import PRODUCTS, CepeConfig, LoraConfig, with_lora, without_lora
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.trainer import init_state, make_train_step

LORA = LoraConfig(rank=3, alpha=5.0)
CEPE = CepeConfig(DECODER, dataclasses.replace(ENCODER, mlm_head=False), CROSS_LAYERS)


def adapted(lora: LoraConfig = LORA) -> Cepe:
    """A CEPE whose decoder and encoder have factors, with weights that matter."""
    config = with_lora(with_lora(CEPE, "decoder", lora), "encoder", lora)
    return filled(lambda: Cepe.create(config, key=jax.random.key(0)), seed=4)


def merged(model: Cepe) -> Cepe:
    """The CEPE of the same function without factors: their products, taken in fp64, are in its weights."""
    parts = {name: part for name, part in model.parts.items() if not name.endswith("_lora")}
    for name in ("decoder", "encoder"):
        lora, stack = model.parts[f"{name}_lora"], jax.tree.map(lambda leaf: leaf, parts[name])
        for module, product in ((module, product) for module, of_it in PRODUCTS.items() for product in of_it):
            if (factors := getattr(getattr(lora, module), product)) is None:
                continue
            weight = getattr(getattr(stack.layers, module), product)
            a, b = (np.asarray(x[...], np.float64) for x in (factors.a, factors.b))
            Z, rank = weight.shape[0], lora.config.rank
            added = np.einsum("zir,zro->zio", a.reshape(Z, -1, rank), b.reshape(Z, rank, -1))
            summed = weight[...] + lora.config.alpha / rank * added.reshape(weight.shape)
            setattr(getattr(stack.layers, module), product, weight.replace(jnp.asarray(summed, jnp.float32)))
        parts[name] = stack
    return Cepe.from_parts(parts)


@pytest.mark.parametrize(
    ("lora", "how"),
    [(LORA, {}), (LORA, {"remat": "full", "mlp_chunk": 4}), (LoraConfig(2, 8.0, ("v", "o", "down")), {})],
)
def test_factors_are_what_they_add_to_the_weights(tokens_BT, context_BCL, lora, how):
    model = adapted(lora)
    run = jax.jit(Cepe.__call__)
    wanted = run(merged(model), tokens_BT, context_BCL)
    parts = {part: computed(model.parts[part], **how) for part in ("decoder", "encoder")} if how else {}
    logits = run(Cepe.from_parts(model.parts | parts), tokens_BT, context_BCL)
    assert relative_error(logits, wanted) < 1e-5
    without = {name: part for name, part in model.parts.items() if name != "encoder_lora"}
    assert relative_error(run(Cepe.from_parts(without), tokens_BT, context_BCL), wanted) > 1e-3


def test_a_cached_decoder_has_them_too(tokens_BT):
    """Tokens that are read one by one, as in generation, and the scores of heads."""
    from cepe_jax.inference.caches import FULL, new_cache
    from cepe_jax.inference.calibration import head_scores

    model = adapted()
    decoder, whole, cache = model.decoder, merged(model).decoder, new_cache(model.decoder, FULL, len(tokens_BT), 16)
    step = jax.jit(Llama.decode)
    for t in range(4):
        hidden_BTD, cache = step(decoder, tokens_BT[:, t : t + 1], None, cache)
    assert relative_error(decoder.logits(hidden_BTD)[:, 0], whole(tokens_BT[:, :4])[:, 3]) < 1e-5
    tokens_T = np.array([0, *np.tile(np.arange(1, 6), 4)], np.int32)
    for scores, wanted in zip(*(head_scores(one, tokens_T, 5) for one in (decoder, whole)), strict=True):
        np.testing.assert_allclose(scores, wanted, rtol=1e-4)


def test_new_factors_change_nothing(tokens_BT):
    config = with_lora(DECODER, "decoder", LORA)
    model = Llama(config, key=jax.random.key(0))
    assert isinstance(plain := model.parts["decoder"], Llama)
    assert plain.config == without_lora(config) == DECODER
    np.testing.assert_array_equal(model(tokens_BT), plain(tokens_BT))
    lora = model.parts["decoder_lora"]
    assert float(jnp.abs(lora.mlp.down.a[...]).max()) == pytest.approx(DECODER.mlp_width**-0.5, rel=0.05)


@pytest.mark.parametrize("train", [("decoder_lora",), ("cross", "encoder_lora", "decoder_lora")])
def test_after_20_steps_every_factor_has_moved_and_nothing_else(tokens_BT, context_BCL, train):
    config = with_lora(with_lora(CEPE, "decoder", LORA), "encoder", LoraConfig(1, 2.0, ("q", "down")))
    model = Cepe.create(config, key=jax.random.key(0))
    before = {name: bits(part) for name, part in model.parts.items()}
    trainable, frozen = split(model, train)
    assert sorted(trainable | frozen) == ["cross", "decoder", "decoder_lora", "encoder", "encoder_lora"]
    trainable = jax.tree.map(jnp.copy, trainable)  # which is donated
    optimizer = optax.adamw(1e-3, weight_decay=0)
    step = make_train_step(NextToken(), optimizer, Cepe)
    state = init_state(trainable, optimizer)
    mask_BCL = np.ones(context_BCL.shape, bool)
    batch = {"tokens": tokens_BT[:, :-1], "labels": tokens_BT[:, 1:], "context": context_BCL, "context_mask": mask_BCL}
    for _ in range(20):
        state, _ = step(state, frozen, batch)
    after = {name: bits(part) for name, part in Cepe.from_parts(state.trainable | frozen).parts.items()}
    for name, leaves in after.items():
        moved = [a != b for a, b in zip(before[name], leaves, strict=True)]
        assert all(moved) if name in train else not any(moved), name


def test_settings_that_are_none():
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"products": ()}, {"products": ("q", "w")}, {"products": ("q", "q")}):
        with pytest.raises(ValueError, match=r"lora\.[a-z]+ is "):
            LoraConfig(**bad)
    assert LoraConfig(products=("down", "q")) == LoraConfig(products=("q", "down"))
    config = with_lora(DECODER, "decoder", LORA)
    assert with_lora(config, "decoder", None) is not None
    with pytest.raises(ValueError, match="rank=3.*leave lora out"):
        with_lora(config, "decoder", LoraConfig(4))
