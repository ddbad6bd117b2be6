"""Mistral, Qwen2 and Qwen3 beside Llama: against transformers, with biases and norms of heads that are not 0 and 1."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, ENCODER, filled, relative_error
from support.refusals import one_line

from cepe_jax.config import CepeConfig, CrossLayers
from cepe_jax.inference.caches import Rolling
from cepe_jax.inference.generate import generate
from cepe_jax.model.cepe import Cepe, cross_from_self_attention, encoder_from_decoder
from cepe_jax.model.cross import CrossAttention, Memory
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import abstract_mesh, shardings_of
from cepe_jax.training.optimizer import matrices
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.hf_config import FAMILIES, facts_of, window_of
from cepe_jax.weights.kinds import from_hf
from cepe_jax.weights.source import load, open_model, open_ours, save

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
MISTRAL, QWEN2, QWEN3 = "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
CASES = {
    "mistral": (MISTRAL, {"sliding_window": None}),
    "mistral with a window": (MISTRAL, {"sliding_window": 60}),
    "qwen2": (QWEN2, {"head_dim": 8}),
    "qwen2, tied": (QWEN2, {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 8}),
    "qwen3": (QWEN3, {}),
    "qwen3, yarn": (QWEN3, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e3}}),
}
PROPERTIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


@pytest.fixture(params=CASES)
def theirs(request, tmp_path):
    """A model of transformers, saved at `hf`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, changes = CASES[request.param]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SIZES | changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "hf")
    return model


def test_parity_and_round_trip(theirs, tmp_path):
    """Logits, greedy tokens, and every bit of the weights after a way there and back."""
    import torch

    tokens = np.random.default_rng(0).integers(0, 99, (2, 50))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
        greedy = theirs.generate(torch.tensor(tokens[:1, :20]), max_new_tokens=12, do_sample=False).numpy()[0, 20:]
    ours = load(tmp_path / "hf")
    assert relative_error(jax.jit(type(ours).__call__)(ours, tokens), wanted) <= 1e-4
    assert generate(ours, [tokens[0, :20].tolist()], max_new_tokens=12) == [greedy.tolist()]

    to_jax(tmp_path / "hf", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back")
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)
    assert back.config.rope_parameters.items() >= theirs.config.rope_parameters.items()
    with torch.no_grad():
        assert np.array_equal(back.eval()(torch.tensor(tokens)).logits.numpy(), wanted)


# What runs without PyTorch


def decoder_of(family: str, seed: int = 0, **changes) -> Llama:
    config = dataclasses.replace(DECODER, **PROPERTIES[family] | changes)
    return filled(lambda: Llama(config, key=jax.random.key(0)), seed)


def splice(family: str, init: str = "copy") -> Cepe:
    decoder = decoder_of(family)
    encoder = filled(lambda: Encoder(dataclasses.replace(ENCODER, mlm_head=False), key=jax.random.key(1)), 1)
    cross = cross_from_self_attention(decoder, encoder.config, CrossLayers("last", 2), init, key=jax.random.key(2))
    return Cepe(decoder, encoder, cross)


def layer_of(cross: CrossAttention, number: int) -> CrossAttention:
    return jax.tree.map(lambda a: a[number], cross)


@pytest.mark.parametrize("family", PROPERTIES)
def test_absorbed_is_materialised(family):
    """Biases of queries and values, and norms of queries, in both forms; a row without memory adds nothing."""
    rng = np.random.default_rng(0)
    cross = layer_of(splice(family).cross, 1)
    x_BTD = jnp.asarray(rng.standard_normal((3, 4, DECODER.width)), jnp.float32)
    states_BME = jnp.asarray(rng.standard_normal((3, 20, ENCODER.width)), jnp.float32)
    valid_BM = jnp.asarray(rng.random((3, 20)) < 0.7).at[1].set(False)
    memory, forms = Memory(states_BME, valid_BM), {}
    for form in "absorbed", "materialised":
        read = {"absorbed": cross.absorbed, "materialised": lambda q, m: cross.materialised(q, m, "xla", True)}[form]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CrossAttention, "read", lambda self, q, m, backend, differentiable, read=read: read(q, m))
            forms[form] = np.asarray(jax.jit(CrossAttention.__call__, static_argnums=3)(cross, x_BTD, memory, "xla"))
    assert relative_error(forms["absorbed"], forms["materialised"]) <= 1e-5
    assert (forms["absorbed"][1] == 0).all()
    assert np.abs(forms["absorbed"][0]).max() > 0.1


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_cross_attention_starts_as_self_attention_without_positions(family):
    """In fp64 by hand: the decoder's own weights, biases and norms; of Qwen3's keys the norm's mean size alone."""
    model = splice(family)
    layer, E = DECODER.num_layers - 1, ENCODER.width
    own = jax.tree.map(lambda a: np.asarray(a[layer], np.float64), model.decoder.layers.attention)
    scale_D = np.asarray(model.decoder.layers.mlp_norm.scale[...][layer], np.float64)
    rng = np.random.default_rng(0)
    x_TD, memory_ME = rng.standard_normal((4, DECODER.width)), rng.standard_normal((20, E))

    def normed(x, scale, eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    q_TNH = np.einsum("td,dnh->tnh", normed(x_TD, scale_D, DECODER.norm_eps), own.q.get_value())
    k_EKH = own.k.get_value()[:E]
    v_MKH = np.einsum("me,ekh->mkh", memory_ME, own.v.get_value()[:E])
    if family == "qwen2":
        q_TNH, v_MKH = q_TNH + own.q_bias.get_value(), v_MKH + own.v_bias.get_value()
    else:
        q_TNH = normed(q_TNH, own.q_norm.scale.get_value(), DECODER.norm_eps)
        k_EKH = k_EKH / np.sqrt((k_EKH**2).sum(0).mean(-1))[:, None] * own.k_norm.scale.get_value()
    k_MKH = np.einsum("me,ekh->mkh", memory_ME, k_EKH)
    if family == "qwen2":
        k_MKH = k_MKH + own.k_bias.get_value()  # which cross-attention leaves out: it changes no weight
    groups = DECODER.num_heads // DECODER.num_kv_heads
    k_MNH, v_MNH = (np.repeat(a, groups, axis=1) for a in (k_MKH, v_MKH))
    scores = np.einsum("tnh,mnh->tnm", q_TNH, k_MNH) / np.sqrt(DECODER.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out_TNH = np.einsum("tnm,mnh->tnh", weights / weights.sum(-1, keepdims=True), v_MNH)
    wanted = np.einsum("tnh,nhd->td", out_TNH, own.o.get_value())
    cross = layer_of(model.cross, 1)
    found = cross(jnp.asarray(x_TD[None], jnp.float32), Memory(jnp.asarray(memory_ME[None], jnp.float32)), "xla")
    assert relative_error(found[0], wanted) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_cached_decoder_is_the_whole_one(family):
    """Token by token, beside a memory, from each kind of cache that keeps all of so short a text."""
    model = splice(family)
    rng = np.random.default_rng(0)
    tokens, context = rng.integers(3, 60, (1, 30)), rng.integers(3, 60, (1, 2, 8))
    memory = model.encode(jnp.asarray(context))
    limits = {"max_new_tokens": 8}
    found = generate(model, tokens.tolist(), memory, **limits)
    assert found == generate(model, tokens.tolist(), memory, policy=Rolling(64), **limits)
    text = np.append(tokens, found, axis=1)
    logits = jax.jit(Cepe.__call__)(model, text, context)
    assert np.asarray(logits)[0, 29:-1].argmax(-1).tolist() == found[0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_directories_keep_all_and_the_reference_has_no_class(family, tmp_path):
    model = splice(family, "normal")
    save(model, tmp_path / "ours")
    open_ours(tmp_path / "ours").verify()
    back = load(tmp_path / "ours")
    assert back.config == model.config
    tokens = np.arange(3, 12)[None]
    np.testing.assert_array_equal(model(tokens, tokens[None, :, :8]), back(tokens, tokens[None, :, :8]))
    encoder = dataclasses.replace(ENCODER, mlm_head=True, **PROPERTIES[family])
    save(filled(lambda: Encoder(encoder, key=jax.random.key(0)), 0), tmp_path / "encoder")
    for name in "ours", "encoder":
        with pytest.raises(ValueError, match="biases or norms of heads: the reference's models are Llamas") as error:
            to_hf(tmp_path / name, tmp_path / "hf")
        one_line(error)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_encoder_starts_from_the_first_layers(family):
    decoder = decoder_of(family)
    like = {name: getattr(decoder.config, name) for name in ("width", "num_heads", "num_kv_heads", "head_dim")}
    config = dataclasses.replace(ENCODER, **like, **PROPERTIES[family], mlp_width=DECODER.mlp_width, num_layers=2)
    config = dataclasses.replace(config, vocab_size=DECODER.vocab_size + 1)
    encoder = encoder_from_decoder(decoder, config, key=jax.random.key(0))
    ours, theirs = (jax.tree.leaves(stack) for stack in (encoder.layers, decoder.layers))
    assert len(ours) == len(theirs) == 9 + {"qwen2": 3, "qwen3": 2}[family]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other[:2])
    plain = dataclasses.replace(config, qkv_bias=False, qk_norm=False)
    with pytest.raises(ValueError, match=r"encoder (qkv_bias|qk_norm) False is not the decoder's True"):
        encoder_from_decoder(decoder, plain, key=jax.random.key(0))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gradients_reach_the_optional_leaves(family):
    """Each leaf of the cross-attention has a gradient of its own."""
    model = splice(family, "normal")
    tokens, context = np.arange(3, 15)[None], np.arange(3, 19).reshape(1, 2, 8)

    def loss(cross):
        return jnp.square(Cepe(model.decoder, model.encoder, cross)(tokens, context)).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(model.cross)):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_cross_attention_has_the_leaves_that_can_matter():
    names = {
        family: {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(abstract_parts(splice(family).config)["cross"])
        }
        for family in PROPERTIES
    }
    assert {name.removesuffix(".value") for name in names["qwen2"] - names["llama"]} == {"q_bias", "v_bias"}
    assert {name.removesuffix(".value") for name in names["qwen3"] - names["llama"]} == {"q_norm.scale"}


def test_the_optional_leaves_are_cut_with_their_heads_and_are_no_matrices():
    """Muon orthogonalises matrices: biases of heads look like some, and are none."""
    parts = abstract_parts(splice("qwen2").config)
    mesh = abstract_mesh(tensor=2)
    for name, axis in (("q_bias", "heads"), ("k_bias", "kv_heads"), ("v_bias", "kv_heads")):
        leaf = getattr(parts["decoder"].layers.attention, name)
        assert leaf.get_metadata()["axes"] == ("layer", axis, "head_dim")
        cut = getattr(shardings_of(parts["decoder"], mesh).layers.attention, name)
        assert jax.tree.leaves(cut)[0].spec == jax.sharding.PartitionSpec(None, "tensor", None)
    of_muon = matrices(parts["cross"])
    assert [of_muon.q_bias, of_muon.v_bias] == [None, None]
    assert of_muon.q is not None


# config.json

RELEASED = {  # what the directories of the releases say that differs between them, and how much they read at once
    "Mistral-7B-v0.1": (MISTRAL, {"sliding_window": 4096, "max_position_embeddings": 32768}, 4096),
    "Mistral-7B-v0.3": (MISTRAL, {"sliding_window": None, "max_position_embeddings": 32768}, 32768),
    "a Mistral that leaves it out": (MISTRAL, {"max_position_embeddings": 32768}, 4096),
    "Qwen2.5-7B": (
        QWEN2,
        {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28}
        | {"max_position_embeddings": 131072, "bos_token_id": 151643},
        131072,
    ),
    "Qwen3-8B": (
        QWEN3,
        {"sliding_window": None, "use_sliding_window": False, "attention_bias": False, "max_window_layers": 36}
        | {"max_position_embeddings": 40960, "layer_types": ["full_attention"] * 3},
        40960,
    ),
}


def written(name: str, **changes) -> dict:
    config = {"architectures": [name], "model_type": FAMILIES[name].model_type, "rms_norm_eps": 1e-6}
    return SIZES | config | changes


@pytest.mark.parametrize("name", RELEASED)
def test_what_the_releases_say(name):
    architecture, changes, window = RELEASED[name]
    hf = written(architecture, **changes)
    config, family = from_hf(hf), FAMILIES[architecture]
    assert (config.qkv_bias, config.qk_norm) == (family.qkv_bias, family.qk_norm)
    assert window_of(facts_of(hf)) == window


def test_transformers_own_defaults():
    bare = {key: value for key, value in written(QWEN3).items() if key not in ("head_dim", "num_key_value_heads")}
    config = from_hf(bare | {"num_attention_heads": 64})
    assert (config.head_dim, config.num_kv_heads) == (128, 32)
    bare = {key: value for key, value in written(MISTRAL).items() if key not in ("head_dim", "num_key_value_heads")}
    config = from_hf(bare | {"num_attention_heads": 24})
    assert (config.head_dim, config.num_kv_heads) == (2, 8)


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window True"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
        (QWEN3, {"attention_bias": True}, "attention_bias True"),
        (MISTRAL, {"model_type": "llama"}, "model_type 'llama'"),
        (MISTRAL, {"sliding_window": "x"}, "sliding_window is 'x'"),
        ("LlamaForCausalLM", {"sliding_window": 64}, "sliding_window 64"),
        ("Qwen3MoeForCausalLM", {}, "architecture Qwen3MoeForCausalLM"),
        ("Qwen2VLForConditionalGeneration", {}, "architecture Qwen2VLForConditionalGeneration"),
    ],
)
def test_refused_by_name(architecture, changes, said):
    known = architecture if architecture in FAMILIES else QWEN2
    with pytest.raises(ValueError, match=said) as error:
        from_hf(written(known, **changes) | {"architectures": [architecture]}, "config.json")
    one_line(error)


def test_a_mistral_stays_one(tmp_path):
    """Its arithmetic is Llama's: its name and its window are facts of its directory."""
    save(decoder_of("llama"), tmp_path / "llama")
    to_hf(tmp_path / "llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    config |= {"architectures": [MISTRAL], "model_type": "mistral", "sliding_window": 32}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "consolidated.safetensors").write_bytes(b"of Mistral's own code: not read")
    to_jax(tmp_path / "hf", tmp_path / "ours")
    assert window_of(open_model(tmp_path / "ours").facts) == 32
    to_hf(tmp_path / "ours", tmp_path / "back")
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (again["architectures"], again["model_type"], again["sliding_window"]) == ([MISTRAL], "mistral", 32)


def test_a_cepe_of_a_mistral_is_written_as_the_reference_reads_it(tmp_path):
    model = splice("llama", "normal")
    save(model, tmp_path / "cepe")
    path = tmp_path / "cepe" / "config.json"
    config = json.loads(path.read_text())
    config["huggingface"] |= {"model_type": "mistral", "sliding_window": 32, "max_position_embeddings": 64}
    path.write_text(json.dumps(config))
    hashes = json.loads((tmp_path / "cepe" / "hash.json").read_text())
    del hashes["files"]
    (tmp_path / "cepe" / "hash.json").write_text(json.dumps(hashes))
    to_hf(tmp_path / "cepe", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 32)
    assert isinstance(open_model(tmp_path / "hf").config, CepeConfig)
