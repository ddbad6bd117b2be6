"""What cannot be is refused in one line that names both sides."""

import dataclasses

import jax
import numpy as np
import pytest
from support.models import DECODER, ENCODER
from support.refusals import one_line

from cepe_jax.config import CepeConfig, Compute, CrossLayers, RematConfig, RopeConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.weights.build import abstract_parts

TOKENS, CONTEXT = np.zeros((2, 7), np.int32), np.zeros((2, 3, 5), np.int32)


def refused(pattern: str, call, *args):
    with pytest.raises(ValueError, match=pattern) as caught:
        call(*args)
    one_line(caught)


@pytest.mark.parametrize(
    ("pattern", "args"),
    [
        (r"tokens_BT.* 64\b.*vocabulary.* 64\b", (TOKENS + 64,)),
        (r"tokens_BT.* -1\b.*vocabulary.* 64\b", (TOKENS - 1,)),
        (r"tokens_BT.* int32\[7\].* 2 ", (TOKENS[0],)),
        (r"tokens_BT.* float32\[2, 7\].*integers", (TOKENS.astype(np.float32),)),
        (r"context_BCL.* 65\b.*vocabulary.* 65\b", (TOKENS, CONTEXT + 65)),
        (r"context_BCL.* int32\[2, 5\].* 3 ", (TOKENS, CONTEXT[:, 0])),
        (r"context_mask_BCL.* bool\[2, 15\].*\[2, 3, 5\]", (TOKENS, CONTEXT, np.ones((2, 15), bool))),
        (r"context_mask_BCL.* int32\[2, 3, 5\].*booleans", (TOKENS, CONTEXT, CONTEXT)),
        (r"token_mask_BT.* bool\[2, 6\].*\[2, 7\]", (TOKENS, None, None, np.ones((2, 6), bool))),
        (r"token_mask_BT.* float32\[2, 7\].*booleans", (TOKENS, None, None, np.ones((2, 7), np.float32))),
        (r"context_mask_BCL.*context_BCL", (TOKENS, None, np.ones((2, 3, 5), bool))),
        (r"memory is \[3, 15, 16\].*\[2, M, 16\]", (TOKENS, np.zeros((3, 3, 5), np.int32))),
    ],
)
def test_calls(cepe, pattern, args):
    refused(pattern, cepe, *args)
    if "vocabulary" not in pattern:  # shapes and dtypes are known inside a trace too
        refused(pattern, jax.eval_shape, Cepe.__call__, cepe, *args)


def test_a_memory_of_the_wrong_shape(cepe):
    states = np.zeros((2, 15, 16), np.float32)
    refused(r"valid_BM.* bool\[2, 14\].*\[2, 15\]", cepe.decode, TOKENS, Memory(states, np.ones((2, 14), bool)))
    refused(r"memory is \[2, 15, 15\].*\[2, M, 16\]", cepe.decode, TOKENS, Memory(states[..., :15]))
    refused(r"memory is \[2, 16\].*\[2, M, 16\]", cepe.decode, TOKENS, Memory(states[:, 0]))
    refused(r"memory .*CEPE.* plain decoder", cepe.decoder.decode, TOKENS, Memory(states))


def test_the_encoder_and_a_lone_decoder_check_too(encoder, decoder):
    refused(r"tokens_BL.* 65\b.*vocabulary.* 65\b", encoder, TOKENS + 65)
    refused(r"mask_BL.* bool\[7\].*\[2, 7\]", encoder, TOKENS, np.ones(7, bool))
    refused(r"tokens_BT.* 64\b.*vocabulary.* 64\b", decoder, TOKENS + 64)


@pytest.mark.parametrize("wrong", [64, 1000, -1, -64, -100])
def test_an_id_outside_gives_nan_inside_a_trace(wrong, cepe, forward):
    """In the logits from its place on, not in other rows; negative ids do not count from the end."""
    tokens = TOKENS.copy()
    tokens[1, 3] = wrong
    logits = np.asarray(forward(cepe, tokens))
    assert np.isnan(logits[1, 3:]).all()
    assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        (r"num_heads 5\b.*num_kv_heads 2\b", {"num_heads": 5}),
        (r"head_dim 9\b.*odd", {"head_dim": 9}),
        (r"\bwidth.* 0\b", {"width": 0}),
        (r"num_layers.* -1\b", {"num_layers": -1}),
        (r"norm_eps.* 0", {"norm_eps": 0.0}),
    ],
)
@pytest.mark.parametrize("config", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_configs(config, pattern, changes):
    refused(pattern, lambda: dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        (r"'float16'.*float32.*bfloat16", {"dtype": "float16"}),
        (r"'flash'.*auto.*xla.*splash.*cudnn", {"attention": "flash"}),
        (r"mlp_chunk.* -1\b", {"mlp_chunk": -1}),
    ],
)
def test_ways_to_compute(pattern, changes):
    refused(pattern, lambda: Compute(**changes))


def test_recomputing_by_no_policy():
    for part in "decoder", "encoder":
        refused("remat 'some'.*none.*dots.*full", lambda part=part: RematConfig(**{part: "some"}))


@pytest.mark.parametrize("head_dim", [12, 136])
def test_heads_that_cudnn_does_not_read(head_dim):
    cudnn = Compute("bfloat16", "cudnn")
    for config in DECODER, ENCODER:
        sizes = dataclasses.replace(config, head_dim=head_dim)
        refused(rf"head_dim {head_dim}.* 8 .* 128.*xla.*float32", abstract_parts, sizes, cudnn)


@pytest.mark.parametrize(("kind", "count"), [("last", 4), ("first", 4), ("every", 2)])
def test_cross_layers_that_the_decoder_does_not_have(kind, count):
    refused(rf"cross_layers\.count {count}\b.* 3\b", CepeConfig, DECODER, ENCODER, CrossLayers(kind, count))


def test_cross_layers_of_no_kind():
    refused("'middle'.*last.*first.*every", CrossLayers, "middle", 1)
    refused("count is -1", CrossLayers, "last", -1)


@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        (r"theta.* 0", {"theta": 0.0}),
        (r"factor.* 2.*scaling", {"factor": 2.0}),
        (r"factor.* 0\.5", {"scaling": "linear", "factor": 0.5}),
        (r"yarn.*original_length", {"scaling": "yarn", "factor": 2.0}),
        (r"high_freq_factor is 1.*low_freq_factor, 2", {
            "scaling": "llama3", "factor": 2.0, "original_length": 8, "low_freq_factor": 2.0, "high_freq_factor": 1.0,
        }),
        (r"scaling 'dynamic'.*default.*linear.*yarn.*llama3", {"scaling": "dynamic", "factor": 2.0}),
    ],
)  # fmt: skip
def test_rope_configs(pattern, fields):
    refused(pattern, lambda: RopeConfig(**fields))
