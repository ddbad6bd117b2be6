"""config.json of transformers 4 and 5: read into our config, or refused by name."""

import json

import pytest
from support.refusals import one_line

from cepe_jax.config import CepeConfig, CrossLayers, DecoderConfig, EncoderConfig, RopeConfig
from cepe_jax.weights.hf_config import facts_of
from cepe_jax.weights.kinds import from_hf, to_hf_config

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
CEPE = PLAIN | {
    "architectures": ["LlamaForCausalContextLM"],
    "do_cross_attention": True,
    "encode_mode": "context_only",
    "encoder_is_model": False,
    "num_cross_attn_hidden_states": 1,
    "num_cross_attn_layers": 2,
    "encoder_hidden_size": 24,
    "encoder_config": {key: value for key, value in PLAIN.items() if key != "architectures"} | {"hidden_size": 24},
}
MLM = PLAIN | {"architectures": ["LlamaForMLM"], "tie_word_embeddings": True}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_are_those_of_transformers():
    rope = RopeConfig(theta=10_000.0)
    common = {"vocab_size": 100, "width": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 6}
    common |= {"head_dim": 8, "mlp_width": 96}
    assert from_hf(PLAIN) == DecoderConfig(**common, norm_eps=1e-6, rope=rope, tied_head=False)
    assert from_hf(PLAIN | {"head_dim": None, "num_key_value_heads": None}) == from_hf(PLAIN)
    assert from_hf(MLM) == EncoderConfig(**common, norm_eps=1e-6, rope=rope, mlm_head=True)
    encoder = EncoderConfig(**common | {"width": 24, "head_dim": 4}, norm_eps=1e-6, rope=rope)
    assert from_hf(CEPE) == CepeConfig(from_hf(PLAIN), encoder, CrossLayers("last", 2))


def test_harmless_keys_are_accepted():
    harmless = {"attention_bias": False, "sliding_window": None, "pretraining_tp": 2, "attention_dropout": 0.1}
    assert from_hf(PLAIN | harmless) == from_hf(PLAIN)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, RopeConfig(2e4, "linear", 4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, RopeConfig(1e4, "linear", 4.0)),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        # Without its own original length, transformers takes the model's.
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, RopeConfig(1e4, "yarn", 8.0, 512)),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                    "finetuned": True,
                }
            },
            RopeConfig(1e4, "yarn", 8.0, 64),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "beta_fast": 16}},
            RopeConfig(1e4, "yarn", 8.0, 512, beta_fast=16, attention_factor=1.5),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 128},
            RopeConfig(1e4, "yarn", 8.0, 128),
        ),
        (
            {
                "rope_theta": 2e4,
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0},
            },
            RopeConfig(2e4, "linear", 4.0),
        ),
    ],
)
def test_rope_of_both_versions(keys, rope):
    assert from_hf(PLAIN | keys).rope == rope
    nested = CEPE | {"encoder_config": CEPE["encoder_config"] | keys}
    assert from_hf(nested).encoder.rope == rope
    assert from_hf(nested).decoder.rope == RopeConfig()


YARN = {"rope_type": "yarn", "factor": 8.0}
REFUSED = [
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM"),
    ({"architectures": None}, "architecture none"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"use_qk_norm": True}, "use_qk_norm True"),
    ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"do_cross_attention": True}, "do_cross_attention True"),
    ({"hidden_size": 50}, "hidden_size 50 .*num_attention_heads 6"),
    ({"num_key_value_heads": 4}, "num_heads 6 .*num_kv_heads 4"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"hidden_size": 48.5}, "hidden_size is 48.5"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": 2**31}, "num_layers is 2147483648"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"rms_norm_eps": 0}, "norm_eps is 0"),
    ({"rms_norm_eps": 2.0}, "norm_eps is 2.0"),
    ({"rms_norm_eps": []}, "rms_norm_eps is a list"),
    ({"rope_theta": 1}, "theta is 1.0"),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    ({"max_position_embeddings": "abc"}, "max_position_embeddings is 'abc'"),
    ({"max_position_embeddings": [1]}, "max_position_embeddings is a list"),
    ({"max_position_embeddings": {}}, "max_position_embeddings is an object"),
    ({"max_position_embeddings": True}, "max_position_embeddings is True"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"eos_token_id": [2, "x"]}, r"eos_token_id\[1\] is 'x'"),
    ({"architectures": [3]}, r"architectures: \[0\] is 3"),
    ({"rope_scaling": "x"}, "rope_scaling is 'x'"),
    ({"rope_parameters": [1]}, "rope_parameters is a list"),
    ({"rope_scaling": YARN | {"rope_type": ["yarn"]}}, "rope_scaling.rope_type is a list"),
    ({"rope_scaling": YARN | {"factor": "8"}}, "rope_scaling.factor is '8'"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor is -1"),
    ({"rope_scaling": YARN | {"beta_fast": 1}}, "beta_fast is 1"),
    ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow is 0"),
    ({"rope_scaling": YARN, "original_max_position_embeddings": -4}, "original_length is -4"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0}}, "low_freq_factor is 0"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "high_freq_factor is 1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}}, "mscale 1.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}}, "truncate False"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "surprise": 1}}, "rope type linear: .*surprise"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "disagree"),
]


def without(config: dict) -> dict:
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message) as refused:
        from_hf(without(PLAIN | keys), "/there/config.json")
    assert one_line(refused).startswith("/there/config.json: ")


@pytest.mark.parametrize(
    ("keys", "message"), [case for case in REFUSED if "architectures" not in case[0] and "head" not in str(case)]
)
def test_refused_in_the_encoder_too(keys, message):
    with pytest.raises(ValueError, match=message) as refused:
        from_hf(CEPE | {"encoder_config": without(CEPE["encoder_config"] | keys)})
    assert "encoder" in one_line(refused)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encode_mode": "with_query-4"}, "encode_mode 'with_query-4'"),
        ({"encoder_is_model": True}, "encoder_is_model True"),
        ({"num_cross_attn_hidden_states": 2}, "num_cross_attn_hidden_states 2"),
        ({"do_cross_attention": False}, "do_cross_attention False"),
        ({"num_cross_attn_layers": 4}, r"cross_layers\.count 4"),
        ({"num_cross_attn_layers": ...}, "num_cross_attn_layers"),
        ({"num_cross_attn_layers": 0}, "num_cross_attn_layers is 0"),
        ({"encoder_config": ...}, "encoder_config"),
        ({"encoder_config": 5}, "encoder_config is 5"),
        ({"encoder_hidden_size": "24"}, "encoder_hidden_size is '24'"),
        ({"encoder_hidden_size": 32}, "encoder_hidden_size 32 .*hidden_size 24"),
        ({"encoder_config": CEPE["encoder_config"] | {"is_decoder": True}}, "is_decoder True"),
    ],
)
def test_refused_in_cepe(keys, message):
    with pytest.raises(ValueError, match=message) as refused:
        from_hf(without(CEPE | keys))
    one_line(refused)


def test_facts_of_another_type_are_refused():
    with pytest.raises(ValueError, match="encoder_config is 5"):
        facts_of(PLAIN | {"encoder_config": 5})
    assert facts_of(PLAIN | {"encoder_config": None})["encoder_config"] is None


def test_untied_mlm_head_is_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings False"):
        from_hf(MLM | {"tie_word_embeddings": False})


@pytest.mark.parametrize("source", [PLAIN, CEPE, MLM])
@pytest.mark.parametrize("keys", [{}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "bos_token_id": 7}])
def test_written_config_reads_back_with_its_facts(source, keys):
    source = json.loads(json.dumps(source | keys))
    config = from_hf(source)
    written = to_hf_config(config, facts_of(source), "bfloat16")
    assert from_hf(json.loads(json.dumps(written))) == config
    assert written["max_position_embeddings"] == 512
    assert written["bos_token_id"] == keys.get("bos_token_id", 1)
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert all(key in written for key in source)
