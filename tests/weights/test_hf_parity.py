"""Against transformers' own Llama on random weights: read, computed, written back, read again."""

import json

import jax
import numpy as np
import pytest

from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.source import load, open_ours

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "mha": {},
    "gqa_own_head_dim": {"num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e3}},
    "yarn_all": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.3,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "rope_theta": 1e3,
        },
    },
    "llama3": {"head_dim": 32, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e2, **LLAMA3}},
}


def as_transformers_4(path) -> None:
    """config.json as transformers 4 would have written it."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))


def bits(tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_llama(name, version, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | CASES[name])
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    if version == 4:
        as_transformers_4(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 99, (2, 50))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()

    ours = load(tmp_path / "hf")
    logits = np.asarray(jax.jit(type(ours).__call__)(ours, tokens))
    assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()

    to_jax(tmp_path / "hf", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.rope_parameters.items() >= theirs.config.rope_parameters.items()
    assert back.dtype == torch.float32
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(bits(before[key]) == bits(after[key]) for key in before)
    with torch.no_grad():
        assert np.array_equal(back.eval()(torch.tensor(tokens)).logits.numpy(), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_as_stored(dtype, shards, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    theirs.config.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    state = theirs.state_dict()
    keys = sorted(state)
    if shards == 1:
        torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    else:
        weight_map = {key: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, key in enumerate(keys)}
        for file in set(weight_map.values()):
            torch.save({key: state[key] for key in keys if weight_map[key] == file}, tmp_path / "hf" / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    to_jax(tmp_path / "hf", tmp_path / "ours")
    open_ours(tmp_path / "ours").verify()
    to_hf(tmp_path / "ours", tmp_path / "back")
    after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(after[key].dtype == state[key].dtype and bits(after[key]) == bits(state[key]) for key in keys)
