"""The long decoders that the paper compares with, by the config.json of their releases: the turns, and tiny weights."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import relative_error

from cepe_jax.model.rope import inverse_frequencies
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.kinds import from_hf
from cepe_jax.weights.source import load, open_model

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
YARN = {"original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}
YARN_CODE = {
    "AutoConfig": "configuration_llama.LlamaConfig",
    "AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM",
}
RELEASED = {
    "LLaMA-2-7B-32K": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "max_position_embeddings": 32768,
        "rope_scaling": {"factor": 8.0, "type": "linear"},
        "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
    },
    "Yarn-Llama-2-7b-64k": {
        "max_position_embeddings": 65536,
        "rope_scaling": {"factor": 16.0} | YARN,
        "auto_map": YARN_CODE,
    },
    "Yarn-Llama-2-7b-128k": {
        "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 32.0} | YARN,
        "auto_map": YARN_CODE,
    },
}


def yarn(dim: int, scale: float, original: int, base: float = 10_000.0) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the factor on cos and sin, as the authors' own code computes them (github.com/jquesnelle/
    yarn, LlamaYaRNScaledRotaryEmbedding): `finetuned` changes nothing there."""

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), dim - 1)
    frequencies = []
    for pair in range(dim // 2):
        extrapolated = 1 / base ** (2 * pair / dim)
        kept = 1 - min(max((pair - low) / (high - low), 0), 1)
        frequencies.append(extrapolated / scale * (1 - kept) + extrapolated * kept)
    return np.array(frequencies), 0.1 * math.log(scale) + 1


@pytest.mark.parametrize("name", RELEASED)
def test_the_turns_of_the_releases(name):
    config = from_hf(LLAMA_2 | RELEASED[name])
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    scale = RELEASED[name]["rope_scaling"]["factor"]
    wanted = yarn(128, scale, 4096)
    if "Yarn" not in name:
        wanted = 10_000.0 ** (-np.arange(64) / 64) / scale, 1.0
    np.testing.assert_allclose(frequencies, wanted[0], rtol=1e-12)
    np.testing.assert_allclose(factor, wanted[1], rtol=1e-12)


@pytest.mark.parametrize("name", RELEASED)
def test_they_convert_and_load(name, tmp_path):
    """Read as transformers reads the same directory, past the original positions, with the buffers of that time."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 80, "vocab_size": 99, "initializer_range": 0.2, "torch_dtype": "float32"}
    written = LLAMA_2 | RELEASED[name] | sizes
    written["rope_scaling"] = dict(written["rope_scaling"])
    if "original_max_position_embeddings" in written["rope_scaling"]:
        written["rope_scaling"]["original_max_position_embeddings"] = 16
    written["max_position_embeddings"] = int(16 * written["rope_scaling"]["factor"])
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(written))
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(source)).eval()
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(16) for i in range(2)}
    torch.save(theirs.state_dict() | buffers, source / "pytorch_model.bin")
    tokens = np.random.default_rng(0).integers(0, 99, (1, 120))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()

    to_jax(source, tmp_path / "ours")
    assert open_model(tmp_path / "ours").facts["max_position_embeddings"] == written["max_position_embeddings"]
    ours = load(tmp_path / "ours")
    assert relative_error(jax.jit(type(ours).__call__)(ours, tokens), wanted) < 1e-4

    to_hf(tmp_path / "ours", tmp_path / "back")
    exported = json.loads(Path(tmp_path / "back" / "config.json").read_text())
    assert "auto_map" not in exported  # their code is not there, and is not needed
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert np.array_equal(back(torch.tensor(tokens)).logits.numpy(), wanted)
