"""Exact parameter counts of the presets, by shapes alone."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from cepe_jax.config import DECODERS, ENCODERS, CrossLayers, preset
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama


def shapes(make) -> dict[str, tuple[int, ...]]:
    state = nnx.to_flat_state(nnx.state(jax.eval_shape(make)))
    return {".".join(path): leaf.shape for path, leaf in state}


def count(named: dict) -> int:
    return sum(math.prod(shape) for shape in named.values())


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("mistral_7b", 7_248_023_552),
        ("qwen2_5_7b", 7_615_616_512),
        ("qwen3_8b", 8_190_735_360),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_decoder_counts(name, wanted):
    named = shapes(lambda: Llama(DECODERS[name], key=KEY))
    assert count(named) == wanted
    assert ("head" in named) is not DECODERS[name].tied_head


def test_encoder_counts():
    config = ENCODERS["mlm_large"]
    assert count(shapes(lambda: Encoder(config, key=KEY))) == 435_472_384
    assert count(shapes(lambda: Encoder(dataclasses.replace(config, mlm_head=True), key=KEY))) == 436_555_009


def test_cepe_counts():
    def make():
        decoder = Llama(DECODERS["llama2_7b"], key=KEY)
        cross = cross_from_self_attention(decoder, ENCODERS["mlm_large"], CrossLayers(), "copy", key=KEY)
        return Cepe(decoder, Encoder(ENCODERS["mlm_large"], key=KEY), cross)

    named = shapes(make)
    assert count({name: shape for name, shape in named.items() if name.startswith("cross.")}) == 1_342_308_352
    assert count(named) == 8_516_196_352
    # 669 tensors in the released checkpoint: one for each layer of a stack, one for every other leaf.
    assert sum(shape[0] if name.startswith(("cross.", "decoder.layers.", "encoder.layers.")) else 1
               for name, shape in named.items()) == 669  # fmt: skip


def test_a_preset_that_does_not_exist():
    assert preset(DECODERS, "tiny") is DECODERS["tiny"]
    with pytest.raises(ValueError, match="llama2_70b.*llama2_7b"):
        preset(DECODERS, "llama2_70b")
