"""The MLP in chunks of positions: what it computes, and what its program no longer stores."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, computed, make_decoder, relative_error

from cepe_jax.benchmarks.hlo import arrays
from cepe_jax.model.layers import at, chunk_of, in_chunks
from cepe_jax.sharding import abstract_mesh


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 8, 9])
def test_chunks_change_neither_output_nor_gradient(decoder, chunk):
    """Of 8 positions: lengths that divide and that do not, all at once, and more than there are.

    The function adds a constant, which filled-up positions would bring into its gradient.
    """
    x = np.random.default_rng(0).standard_normal((2, 8, DECODER.width)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal(x.shape)
    mlp, bias = at(decoder.layers.mlp, 0), jnp.linspace(-1, 1, DECODER.width)

    def loss(x, mlp, bias, chunk):
        calls = []

        def function(x):
            calls.append(x.shape)
            return jnp.tanh(mlp(x) + bias)

        out = in_chunks(function, x, chunk)
        assert calls[0] == (2, min(chunk or 8, 8), DECODER.width)
        return (out * weight).sum(), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    for ours, theirs in zip(*(jax.tree.leaves(run(x, mlp, bias, size)) for size in (chunk, 0)), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("rows", "width", "itemsize", "mesh", "positions"),
    [
        (1, 32_000, 4, {}, 2048),  # logits of Llama-2: 128,000 bytes each
        (1, 128_256, 4, {}, 512),
        (2, 128_256, 4, {}, 256),
        (16, 128_256, 4, {"data": 2, "fsdp": 4}, 256),  # two rows on each device
        (1, 128_256, 4, {"tensor": 8}, 4096),
        (1, 2 * 14_336, 2, {"context": 4}, 4096),  # of each device's share of a window
        (1, 1 << 30, 4, {}, 1),
    ],
)
def test_automatic_chunks_are_sized_by_a_devices_bytes(rows, width, itemsize, mesh, positions):
    """A power of two, of which twice as many would take more than 256 MiB."""
    x_BTD = jax.ShapeDtypeStruct((rows, 8192, 64), jnp.float32)
    with jax.sharding.use_abstract_mesh(abstract_mesh(**mesh)):
        assert chunk_of("auto", x_BTD, width, itemsize, "vocab") == positions
        assert [chunk_of(setting, x_BTD, width, itemsize, "vocab") for setting in (0, 7)] == [0, 7]


def positions_of_mlp(program: str) -> int:
    """In the largest array of the MLP's width that is no stack of weights."""
    shapes = {shape for _, shape in arrays(program) if WIDE.mlp_width in shape}
    return max(math.prod(shape) for shape in shapes if not {WIDE.width, WIDE.mlp_width} <= set(shape)) // WIDE.mlp_width


WIDE = dataclasses.replace(DECODER, mlp_width=56)  # a number that no other size is


@pytest.fixture(scope="module")
def gradient():
    """(remat, mlp_chunk) -> the compiled program of a decoder's gradient for 2 x 100 tokens, and the gradient."""
    tokens, decoder = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 100)), make_decoder(WIDE)

    @jax.jit
    def run(model):
        return jax.grad(lambda model: (model.decode(tokens)[0] ** 2).sum())(model)

    def of(remat: str, chunk: int):
        model = computed(decoder, remat=remat, mlp_chunk=chunk)
        compiled = run.lower(model).compile()
        return compiled.as_text(), jax.tree.leaves(compiled(model))

    return of


@pytest.fixture(scope="module")
def whole(gradient):
    return gradient("none", 0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_decoders_mlp_is_computed_in_chunks(gradient, whole, remat):
    """No array of the MLP's width has more positions than a chunk, forward or backward; the gradients are equal."""
    assert positions_of_mlp(whole[0]) >= 2 * 100
    program, ours = gradient(remat, 24)
    assert positions_of_mlp(program) == 2 * 24
    for mine, theirs in zip(ours, whole[1], strict=True):
        assert np.array_equal(mine, theirs) or relative_error(mine, theirs) < 1e-5
