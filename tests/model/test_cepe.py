"""Chunks, masks and memory; how cross-attention starts; what trains and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models import (
    CROSS_LAYERS,
    DECODER,
    ENCODER,
    computed,
    relative_error,
)

from cepe_jax.config import Compute, CrossLayers, EncoderConfig, RematConfig
from cepe_jax.model.cepe import Cepe, cross_from_self_attention, encoder_from_decoder
from cepe_jax.model.cross import Memory
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.layers import at
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import Frozen, held_as, split


@pytest.fixture(scope="module")
def encode():
    return jax.jit(Cepe.encode)


def test_chunks_cannot_see_each_other(cepe, encode, context_BCL):
    """Changing one chunk changes its own memory, all of it, and no other bit."""
    before = np.asarray(encode(cepe, context_BCL).states_BME).reshape(2, 3, 5, -1)
    changed = context_BCL.copy()
    changed[0, 1, 4] = (changed[0, 1, 4] + 7) % ENCODER.vocab_size
    after = np.asarray(encode(cepe, changed).states_BME).reshape(2, 3, 5, -1)
    moved = np.abs(after - before).max(-1)
    assert (moved[0, 1] > 1e-3).all()
    moved[0, 1] = 0
    assert not moved.any()


def test_memory_is_the_encoders_output_chunk_by_chunk(cepe, encode, context_BCL, context_mask_BCL):
    memory = encode(cepe, context_BCL, context_mask_BCL)
    wanted = np.asarray(jax.jit(Encoder.__call__)(cepe.encoder, context_BCL[:, 1], context_mask_BCL[:, 1]))
    real = context_mask_BCL[:, 1]
    assert relative_error(np.asarray(memory.states_BME)[:, 5:10][real], wanted[real]) < 1e-5
    np.testing.assert_array_equal(memory.valid_BM[:, 5:10], real)
    assert encode(cepe, context_BCL).valid_BM is None


def test_order_of_chunks_does_not_matter(cepe, forward, tokens_BT, context_BCL, context_mask_BCL):
    order = [2, 0, 1]
    before = forward(cepe, tokens_BT, context_BCL, context_mask_BCL)
    assert relative_error(forward(cepe, tokens_BT, context_BCL[:, order], context_mask_BCL[:, order]), before) < 1e-5
    assert relative_error(forward(cepe, tokens_BT, context_BCL[:, order], context_mask_BCL), before) > 1e-2


def test_a_masked_chunk_is_an_absent_one(cepe, forward, tokens_BT, context_BCL):
    mask = np.ones_like(context_BCL, bool)
    mask[:, 1] = False
    ours = forward(cepe, tokens_BT, context_BCL, mask)
    assert relative_error(ours, forward(cepe, tokens_BT, context_BCL[:, [0, 2]])) < 1e-5
    assert relative_error(ours, forward(cepe, tokens_BT, context_BCL)) > 1e-2


def test_ids_under_the_mask_do_not_matter(cepe, forward, tokens_BT, context_BCL, context_mask_BCL):
    before = forward(cepe, tokens_BT, context_BCL, context_mask_BCL)
    other = np.where(context_mask_BCL, context_BCL, (context_BCL + 9) % ENCODER.vocab_size)
    np.testing.assert_array_equal(forward(cepe, tokens_BT, other, context_mask_BCL), before)


def test_no_context_is_plain_llama_exactly(cepe, forward, plain, tokens_BT, context_BCL, token_mask_BT):
    wanted = plain(cepe.decoder, tokens_BT)
    np.testing.assert_array_equal(forward(cepe, tokens_BT), wanted)
    np.testing.assert_array_equal(forward(cepe, tokens_BT, context_BCL[:, :0]), wanted)
    nothing = np.zeros_like(context_BCL, bool)
    assert relative_error(forward(cepe, tokens_BT, context_BCL, nothing), wanted) < 1e-6  # another program: see below
    padded = np.asarray(plain(cepe.decoder, tokens_BT, token_mask_BT))[token_mask_BT]
    masked = np.asarray(forward(cepe, tokens_BT, context_BCL, nothing, token_mask_BT))[token_mask_BT]
    assert relative_error(masked, padded) < 1e-6


def test_what_is_read_from_nothing_is_zero_to_the_bit(cepe):
    """So that a wholly masked memory leaves the decoder as it is, but for how a compiler fuses the sum."""
    rng = np.random.default_rng(0)
    x_BTD, states_BME = rng.standard_normal((2, 4, 24)), rng.standard_normal((2, 5, 16))
    memory = Memory(states_BME, np.array([[False] * 5, [True] * 5]))
    read = jax.jit(lambda cross, *args: at(cross, 1)(*args, "xla"))(cepe.cross, x_BTD, memory)
    assert not read[0].any()
    assert read[1].any()


def test_one_row_without_context_beside_one_with(cepe, forward, plain, tokens_BT, context_BCL):
    mask = np.ones_like(context_BCL, bool)
    mask[1] = False
    ours = np.asarray(forward(cepe, tokens_BT, context_BCL, mask))
    assert relative_error(ours[1], plain(cepe.decoder, tokens_BT)[1]) < 1e-6
    assert relative_error(ours[0], forward(cepe, tokens_BT, context_BCL)[0]) < 1e-5


def test_rows_read_their_own_memory(cepe, forward, tokens_BT, context_BCL):
    changed = context_BCL.copy()
    changed[0] = (changed[0] + 9) % ENCODER.vocab_size
    before, after = (np.asarray(forward(cepe, tokens_BT, context)) for context in (context_BCL, changed))
    np.testing.assert_array_equal(after[1], before[1])
    assert (np.abs(after[0] - before[0]).max(-1) > 1e-2).all()  # every position of row 0 reads it


def test_decoder_stays_causal_with_a_memory(cepe, forward, tokens_BT, context_BCL):
    changed = tokens_BT.copy()
    changed[:, 4] = (changed[:, 4] + 1) % DECODER.vocab_size
    before, after = (np.asarray(forward(cepe, tokens, context_BCL)) for tokens in (tokens_BT, changed))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(-1) > 1e-3).all()


def test_a_bfloat16_decoder_reads_a_float32_encoder(cepe, forward, tokens_BT, context_BCL):
    narrow = Cepe(computed(cepe.decoder, dtype="bfloat16"), cepe.encoder, cepe.cross)
    hidden, _ = jax.eval_shape(lambda c, t, context: c.decode(t, c.encode(context)), narrow, tokens_BT, context_BCL)
    assert hidden.dtype == jnp.bfloat16
    logits = forward(narrow, tokens_BT, context_BCL)
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, forward(cepe, tokens_BT, context_BCL)) < 0.05


@pytest.fixture(scope="module")
def started(decoder):
    """Cross-attention of every init, started from the decoder."""
    return {
        init: cross_from_self_attention(decoder, ENCODER, CROSS_LAYERS, init, key=jax.random.key(7))
        for init in ("copy", "zero", "normal")
    }


def test_cross_attention_starts_as_a_copy(decoder, started):
    """Of the last layers; keys and values keep the first E inputs; the norm is the one before the MLP."""
    last, E = slice(1, 3), ENCODER.width
    attention = decoder.layers.attention
    for init, cross in started.items():
        np.testing.assert_array_equal(cross.q[...], attention.q[last])
        np.testing.assert_array_equal(cross.k[...], attention.k[last, :E])
        np.testing.assert_array_equal(cross.v[...], attention.v[last, :E])
        np.testing.assert_array_equal(cross.norm.scale[...], decoder.layers.mlp_norm.scale[last])
        assert cross.norm.eps == DECODER.norm_eps
        assert cross.layers == CROSS_LAYERS
        assert init == "copy" or not np.array_equal(cross.o[...], attention.o[last])
    np.testing.assert_array_equal(started["copy"].o[...], attention.o[last])
    assert not started["zero"].o[...].any()
    assert np.std(started["normal"].o[...]) == pytest.approx(0.02, rel=0.05)


def test_cross_attention_is_its_own_and_trains_in_float32(decoder):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder)
    cross = cross_from_self_attention(narrow, ENCODER, CROSS_LAYERS, "copy", key=jax.random.key(7))
    assert {leaf.dtype for leaf in jax.tree.leaves(cross)} == {jnp.dtype("float32")}


def test_zero_init_is_the_plain_model(decoder, encoder, started, forward, plain, tokens_BT, context_BCL):
    wanted = plain(decoder, tokens_BT)
    assert relative_error(forward(Cepe(decoder, encoder, started["zero"]), tokens_BT, context_BCL), wanted) < 1e-6
    assert relative_error(forward(Cepe(decoder, encoder, started["copy"]), tokens_BT, context_BCL), wanted) > 1e-2


def test_a_start_that_cannot_be(decoder):
    wide = dataclasses.replace(ENCODER, width=DECODER.width + 1)
    with pytest.raises(ValueError, match="25.*24"):
        cross_from_self_attention(decoder, wide, CROSS_LAYERS, "copy", key=jax.random.key(0))
    with pytest.raises(ValueError, match="'copied'.*copy.*zero.*normal"):
        cross_from_self_attention(decoder, ENCODER, CROSS_LAYERS, "copied", key=jax.random.key(0))
    for layers, named in ((CrossLayers("last", 4), "4.*3"), (CrossLayers("every", 2), "2.*3")):
        with pytest.raises(ValueError, match=named):
            cross_from_self_attention(decoder, ENCODER, layers, "copy", key=jax.random.key(0))


def test_config_of_the_whole(cepe):
    assert cepe.config.cross_layers == CROSS_LAYERS
    assert (cepe.config.decoder, cepe.config.encoder) == (DECODER, ENCODER)


@pytest.mark.parametrize("train", [("encoder", "cross"), ("encoder",), ("cross", "decoder", "encoder"), ()])
def test_every_leaf_is_in_exactly_one_half(cepe, train):
    trainable, frozen = split(cepe, train)
    halves = [id(leaf) for half in (trainable, frozen) for leaf in jax.tree.leaves(half)]
    assert sorted(halves) == sorted(id(leaf) for leaf in jax.tree.leaves(cepe))
    assert set(trainable) == set(train)
    whole = Cepe.from_parts(trainable | frozen)
    paths, again = jax.tree_util.tree_leaves_with_path(cepe), jax.tree_util.tree_leaves_with_path(whole)
    assert [(path, id(leaf)) for path, leaf in again] == [(path, id(leaf)) for path, leaf in paths]
    assert (parts_in(whole, nnx.Param), parts_in(whole, Frozen)) == (set(train), set(frozen))


def parts_in(module, kind=nnx.Variable) -> set[str]:
    """The parts of a model, or of a state, that have Variables of this kind."""
    return {path[0] for path in nnx.to_flat_state(nnx.state(module, kind)).paths}


def test_params_are_what_trains(cepe, tokens_BT, context_BCL):
    """The decoder of any Cepe is frozen, one that is built from Params too; neither it nor its starts is changed."""
    decoder = held_as(nnx.Param, cepe.decoder)
    built = Cepe(decoder, cepe.encoder, cepe.cross)
    for model in (cepe, built, Cepe.from_parts(cepe.parts)):
        assert (parts_in(model, nnx.Param), parts_in(model, Frozen)) == ({"encoder", "cross"}, {"decoder"})
    assert not parts_in(decoder, Frozen)
    for start in (
        lambda key: cross_from_self_attention(cepe.decoder, ENCODER, CROSS_LAYERS, "zero", key=key),
        lambda key: encoder_from_decoder(cepe.decoder, as_wide_as_decoder(), key=key),
    ):
        assert not parts_in(jax.eval_shape(start, jax.random.key(0)), Frozen)
    with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
        gradient = nnx.eval_shape(nnx.grad(lambda model: (model(tokens_BT, context_BCL) ** 2).mean()), cepe)
    assert {path[0] for path in nnx.to_flat_state(gradient).paths} == {"encoder", "cross"}


def test_parts_of_a_lone_model(decoder, encoder):
    for model, name in ((decoder, "decoder"), (encoder, "encoder")):
        trainable, frozen = split(model, (name,))
        assert (list(trainable), frozen) == ([name], {})
        assert type(model).from_parts(model.parts) is model


def test_an_unknown_part_is_refused(cepe, decoder):
    with pytest.raises(ValueError, match="crossattention.* cross,.*decoder.*encoder"):
        split(cepe, ("encoder", "crossattention"))
    with pytest.raises(ValueError, match="encoder.*decoder"):
        split(decoder, ("encoder",))


def loss(trainable, frozen, tokens_BT, context_BCL):
    return (Cepe.from_parts(trainable | frozen)(tokens_BT, context_BCL) ** 2).mean()


def produced_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything that any equation computes, in inner programs too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(out.aval.shape) for out in equation.outvars}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)  # closed ones hold an open one
            found |= produced_shapes(inner) if hasattr(inner, "eqns") else set()
    return found


def test_nothing_is_computed_for_frozen_weights(cepe, tokens_BT, context_BCL):
    """The gradient's program holds no array shaped like a stack of the decoder's weights, unless the decoder trains."""
    of_decoder = {leaf.shape for leaf in jax.tree.leaves(cepe.decoder.layers.mlp)}
    of_cross = {cepe.cross.k.shape}

    def shapes(*train):
        trainable, frozen = split(cepe, train)
        grad = jax.make_jaxpr(jax.grad(loss))(trainable, frozen, tokens_BT, context_BCL)
        assert len(grad.out_avals) == len(jax.tree.leaves(trainable))
        return produced_shapes(grad.jaxpr)

    assert of_decoder <= shapes("decoder")
    found = shapes("encoder", "cross")
    assert of_cross <= found
    assert not of_decoder & found


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_frozen_stack_is_not_copied(remat):
    """Temporary memory of a compiled gradient stays far below the frozen layers' bytes: neither the scan's inputs nor
    what it keeps for the backward pass hold weights. (Two layers' worth is the loop's own; a copy would be eight.)"""
    sizes = {"num_layers": 8, "width": 128, "mlp_width": 512, "head_dim": 32}
    decoder = dataclasses.replace(DECODER, **sizes)
    compute = Compute(remat=RematConfig(remat, remat))
    abstract = jax.eval_shape(
        lambda: Cepe(
            model := Llama(decoder, compute, key=jax.random.key(0)),
            Encoder(ENCODER, compute, key=jax.random.key(0)),
            cross_from_self_attention(model, ENCODER, CrossLayers(), "copy", key=jax.random.key(0)),
        )
    )
    trainable, frozen = split(abstract, ("cross",))
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 1, 4), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, *ids).compile()
    stack = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.decoder.layers))
    assert compiled.memory_analysis().temp_size_in_bytes < stack / 4


def as_wide_as_decoder() -> EncoderConfig:
    sizes = {name: getattr(DECODER, name) for name in ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")}
    return dataclasses.replace(ENCODER, **sizes)


def test_an_encoder_starts_from_the_decoder(decoder):
    """Its embedding and first layers, the mask's row their mean; everything its own and in float32."""
    config = as_wide_as_decoder()
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder)
    encoder = encoder_from_decoder(narrow, config, key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder)} == {jnp.dtype("float32")}
    exact = encoder_from_decoder(decoder, config, key=jax.random.key(0))
    for ours, theirs in zip(jax.tree.leaves(exact.layers), jax.tree.leaves(decoder.layers), strict=True):
        np.testing.assert_array_equal(ours, theirs[: config.num_layers])
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    rows = np.asarray(decoder.embed[...])
    np.testing.assert_array_equal(exact.embed[: DECODER.vocab_size], rows)
    np.testing.assert_allclose(exact.embed[DECODER.vocab_size :], rows.mean(0, keepdims=True), rtol=1e-5, atol=1e-7)
    for change, message in (
        ({"head_dim": 8}, "head_dim 8 .* 10"),
        ({"num_layers": 4}, " 4 .* 3 "),
        ({"vocab_size": 63}, " 63 .* 64"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder_from_decoder(decoder, dataclasses.replace(config, **change), key=jax.random.key(0))
