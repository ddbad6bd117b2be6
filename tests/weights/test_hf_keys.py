"""Every key is accounted for: bad weight files are one-line errors that name the key, the file and the mend."""

import sys

import jax
import numpy as np
import pytest
from support.refusals import one_line

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig, CrossLayers
from cepe_jax.model.cepe import cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.weights.build import abstract_parts, shapes
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.source import load

GATE = "model.layers.1.mlp.gate_proj.weight"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def refused(source, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(source.path)
    one_line(caught)


def test_table_has_the_released_number_of_tensors():
    config = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"])
    entries = table(config)
    assert len(entries) == len({entry.key for entry in entries.values()}) == 291 + 160 + 218
    assert sum(np.prod(entry.shape) for entry in entries.values()) == 8_516_196_352
    assert entries["cross.3.q"].key == "model.layers.3.cross_attn.q_proj.weight"
    last = table(CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"], CrossLayers("last", 4)))
    assert last["cross.3.k"].key == "model.layers.31.cross_attn.k_proj.weight"
    assert last["cross.3.k"].shape == (4096, 1024)


def test_both_directions_of_an_entry_are_inverse():
    config = CepeConfig(DECODERS["tiny"], ENCODERS["tiny"], CrossLayers("last", 2))
    ours = shapes(config)
    for name, entry in table(config).items():
        tensor = np.arange(np.prod(entry.shape)).reshape(entry.shape)
        assert entry.to_ours(tensor).shape == ours[name]
        np.testing.assert_array_equal(entry.to_torch(entry.to_ours(tensor)), tensor)


def test_cross_attention_is_the_one_that_training_starts_from():
    config = CepeConfig(DECODERS["tiny"], ENCODERS["tiny"], CrossLayers("last", 2))

    def make():
        decoder = Llama(config.decoder, key=jax.random.key(0))
        return cross_from_self_attention(decoder, config.encoder, config.cross_layers, "copy", key=jax.random.key(0))

    built, started = abstract_parts(config)["cross"], jax.eval_shape(make)
    assert jax.tree.structure(built) == jax.tree.structure(started)  # names, axes and eps
    assert [leaf.shape for leaf in jax.tree.leaves(built)] == [leaf.shape for leaf in jax.tree.leaves(started)]


def test_missing_key(llama_source):
    tensors = llama_source.tensors()
    del tensors[GATE]
    llama_source.store(tensors)
    refused(llama_source, f"lacks {GATE}")


def test_unknown_key(llama_source):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    llama_source.store(llama_source.tensors() | bias)
    refused(llama_source, r"unknown model\.layers\.0\.self_attn\.q_proj\.bias")


def test_wrong_shape_names_both(llama_source):
    tensors = llama_source.tensors()
    tensors[GATE] = tensors[GATE][:, :60]
    llama_source.store(tensors)
    refused(llama_source, rf"{GATE} .*\[128, 60\].*\[128, 64\]")


def test_transposed_square_weights_cannot_hide_behind_shapes(llama_source):
    """q is square here: only its values tell whether it was transposed."""
    tensors = llama_source.tensors()
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    ours = np.asarray(load(llama_source.path).layers.attention.q[1])
    np.testing.assert_array_equal(ours[5, 2, 3], q[2 * 16 + 3, 5])


def test_dtype_that_is_not_read(llama_source):
    llama_source.store(llama_source.tensors() | {GATE: np.zeros((128, 64), np.int8)})
    refused(llama_source, f"{GATE} .*I8.*F32, BF16, F16")


def test_float16_is_read(llama_source):
    llama_source.store({key: tensor.astype(np.float16) for key, tensor in llama_source.tensors().items()})
    gate = llama_source.tensors()[GATE].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(load(llama_source.path).layers.mlp.gate[1]).T, gate)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(llama_source):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(3)}
    llama_source.store(llama_source.tensors() | buffers)
    assert isinstance(load(llama_source.path), Llama)
    llama_source.store(llama_source.tensors() | {"model.inv_freq": np.ones(8, np.float32)})
    refused(llama_source, r"unknown model\.inv_freq")


def test_tied_head(llama_source):
    llama_source.configure(tie_word_embeddings=True)
    refused(llama_source, "lm_head.weight .*model.embed_tokens.weight .*differ")
    tensors = llama_source.tensors()
    llama_source.store(tensors | {HEAD: tensors[EMBED]})
    aliased = load(llama_source.path)
    del tensors[HEAD]
    llama_source.store(tensors)
    assert load(llama_source.path).config == aliased.config
    assert aliased.config.tied_head
    assert not hasattr(aliased, "head")
    llama_source.configure(tie_word_embeddings=False)
    refused(llama_source, "lacks lm_head.weight")


def test_mlm_aliases(tmp_path, llama_source):
    """Keys of the released file: aliases of the embedding and of the bias, whole or either alone."""
    rng = np.random.default_rng(0)
    tensors = llama_source.tensors()
    del tensors[HEAD]
    head = {"lm_dense.weight": (64, 64), "lm_dense.bias": (64,), "lm_layer_norm.weight": (64,), "lm_bias": (131,)}
    tensors |= {key: rng.standard_normal(shape).astype(np.float32) for key, shape in head.items()}
    llama_source.configure(architectures=["LlamaForMLM"], tie_word_embeddings=True, is_decoder=False)
    llama_source.store(tensors | {HEAD: tensors[EMBED], "lm_head.bias": tensors["lm_bias"]})
    model = load(llama_source.path)
    assert isinstance(model, Encoder)
    np.testing.assert_array_equal(model.mlm_head.dense[...], tensors["lm_dense.weight"].T)
    alone = tensors | {HEAD: tensors[EMBED], "lm_head.bias": tensors["lm_bias"]}
    del alone[EMBED], alone["lm_bias"]
    llama_source.store(alone)
    jax.tree.map(np.testing.assert_array_equal, load(llama_source.path), model)
    llama_source.store(tensors | {"lm_head.bias": tensors["lm_bias"] + 1})
    refused(llama_source, "lm_head.bias .*lm_bias .*differ")


def test_cross_attention_in_a_layer_that_has_none(cepe_source):
    tensors = cepe_source.tensors()
    tensors["model.layers.0.cross_attn.q_proj.weight"] = tensors["model.layers.1.cross_attn.q_proj.weight"]
    cepe_source.store(tensors)
    refused(cepe_source, r"unknown model\.layers\.0\.cross_attn\.q_proj\.weight")


def halves(tensors: dict) -> tuple[dict, dict]:
    keys = sorted(tensors)
    return {k: tensors[k] for k in keys[::2]}, {k: tensors[k] for k in keys[1::2]}


def test_shards_equal_a_single_file(cepe_source):
    single = load(cepe_source.path)
    cepe_source.shard(*halves(cepe_source.tensors()))
    jax.tree.map(np.testing.assert_array_equal, load(cepe_source.path), single)


def test_missing_shard(cepe_source):
    cepe_source.shard(*halves(cepe_source.tensors()))
    (cepe_source.path / "shard-1.safetensors").unlink()
    refused(cepe_source, r"shard-1\.safetensors.*missing")


def test_doubled_key(cepe_source):
    first, second = halves(cepe_source.tensors())
    key = next(iter(first))
    cepe_source.shard(first, second | {key: first[key]})
    refused(cepe_source, f"{key} .*two.*shard-1.safetensors.*shard-0.safetensors")


def test_index_that_contradicts_its_shards(cepe_source):
    first, second = halves(cepe_source.tensors())
    key = next(iter(second))
    cepe_source.shard(first, second)
    weight_map = dict.fromkeys(first, "shard-0.safetensors") | dict.fromkeys(second, "shard-1.safetensors")
    cepe_source.index({k: v for k, v in weight_map.items() if k != key})
    refused(cepe_source, rf"shard-1\.safetensors holds {key}, .*index\.json")
    cepe_source.index(weight_map | {"extra": "shard-0.safetensors"})
    refused(cepe_source, r"index\.json .*extra .*shard-0\.safetensors")
    path = cepe_source.path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"extra"', f'"{key}"'))
    refused(cepe_source, f"index.json .*{key}.* twice")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map: holds None"),
        ('{"weight_map": []}', "weight_map: holds a list"),
        *((f'{{"weight_map": {{"a": {name}, "b": "x"}}}}', "weight_map: ") for name in ("null", "3", "[]", "{}")),
        *((f'{{"weight_map": {{"a": "{name}"}}}}', f"shard '{name}'") for name in ("../a", "/etc/passwd", "b/a", ".")),
        ('{"weight_map": {"a": ".."}}', r"shard \.\."),
        ("[" * 100_000, "nested"),
        ("\xff", "JSON"),
    ],
)
def test_bad_index(cepe_source, content, message):
    cepe_source.shard(*halves(cepe_source.tensors()))
    (cepe_source.path / "model.safetensors.index.json").write_text(content, "latin-1")
    refused(cepe_source, rf"index\.json.*{message}")


def test_links_to_shards_are_followed(cepe_source, tmp_path):
    """As in the hub's cache."""
    single = load(cepe_source.path)
    cepe_source.shard(*halves(cepe_source.tensors()))
    (tmp_path / "blobs").mkdir()
    for file in sorted(cepe_source.path.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    jax.tree.map(np.testing.assert_array_equal, load(cepe_source.path), single)


@pytest.mark.parametrize("size", [0, 5, 3000, -100])
def test_truncated_safetensors(llama_source, size):
    file = llama_source.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(llama_source, r"model\.safetensors .*whole.*download")


def test_no_weights_no_config(llama_source):
    (llama_source.path / "model.safetensors").unlink()
    refused(llama_source, "no weights")
    (llama_source.path / "config.json").write_text('{"model_type": ')
    refused(llama_source, "config.json .*not JSON")
    (llama_source.path / "config.json").write_text("[]")
    refused(llama_source, r"config\.json: .*object")
    (llama_source.path / "config.json").write_text("[" * 100_000)
    refused(llama_source, r"config\.json .*nested")
    (llama_source.path / "config.json").unlink()
    refused(llama_source, "no config.json in")
    with pytest.raises(ValueError, match=r"no config\.json in"):
        load(llama_source.path / "nowhere")


def test_torch_is_asked_for_by_name(llama_source, monkeypatch):
    (llama_source.path / "model.safetensors").rename(llama_source.path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(llama_source, r"pytorch_model.bin .*pip install '\.\[parity\]'")


class TestPickles:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture
    def pickle(self, torch, llama_source):
        tensors = {key: torch.from_numpy(value) for key, value in llama_source.tensors().items()}
        (llama_source.path / "model.safetensors").unlink()
        return tensors, llama_source.path / "pytorch_model.bin"

    def test_same_model(self, torch, llama_source, pickle):
        tensors, file = pickle
        llama_source.store({key: value.numpy() for key, value in tensors.items()})
        safe = load(llama_source.path)
        (llama_source.path / "model.safetensors").unlink()
        # A view that is not contiguous, one that is only marked as negative, parameters: as torch may save them.
        tensors[GATE] = tensors[GATE].T.contiguous().T
        tensors[HEAD] = torch._neg_view(-tensors[HEAD])
        tensors[EMBED] = torch.nn.Parameter(tensors[EMBED])
        torch.save(tensors, file)
        jax.tree.map(np.testing.assert_array_equal, load(llama_source.path), safe)
        half = {key: torch.nn.Parameter(value.detach().bfloat16()) for key, value in tensors.items()}
        torch.save(half, file)
        np.testing.assert_array_equal(load(llama_source.path).embed[...], half[EMBED].detach().float().numpy())

    @pytest.mark.parametrize("size", [0, 20, 50_000, -2000])
    def test_truncated(self, torch, llama_source, pickle, size):
        tensors, file = pickle
        torch.save(tensors, file)
        file.write_bytes(file.read_bytes()[:size])
        refused(llama_source, r"pytorch_model\.bin .*whole.*download")

    def test_code_is_not_run(self, torch, llama_source, pickle):
        _, file = pickle
        torch.save({EMBED: Unpickled()}, file)
        refused(llama_source, r"pytorch_model\.bin .*whole")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: {"model": tensors}, "dict 'model'"),
            (lambda tensors: [*tensors.values()], "a list"),
            (lambda tensors: tensors | {3: tensors[GATE]}, " 3:"),
            (lambda tensors: tensors | {GATE: tensors[GATE].double()}, f"{GATE} is torch.float64"),
            (lambda tensors: tensors | {GATE: tensors[GATE].to_sparse()}, f"{GATE} is torch.sparse_coo"),
            (lambda tensors: tensors | {GATE: tensors[GATE].to("meta")}, f"{GATE} is meta"),
            (lambda tensors: tensors | {GATE: None}, f"NoneType '{GATE}'"),
        ],
    )
    def test_refused(self, torch, llama_source, pickle, change, message):
        tensors, file = pickle
        torch.save(change(tensors), file)
        refused(llama_source, rf"pytorch_model\.bin.*{message}")

    @pytest.mark.parametrize("seed", range(5))
    def test_flipped_weights_are_refused(self, torch, llama_source, pickle, seed):
        """By the CRC of the zip, at which torch does not look."""
        tensors, file = pickle
        torch.save(tensors, file)
        data = bytearray(file.read_bytes())
        place = data.index(tensors[EMBED].numpy().tobytes()) + 7919 * seed % tensors[EMBED].nbytes
        data[place] ^= 1 << seed
        file.write_bytes(data)
        refused(llama_source, r"pytorch_model\.bin: .*/data/.* CRC")


class Unpickled:
    """Something other than a tensor."""


def test_parts_of_a_loaded_cepe(cepe_source):
    model = load(cepe_source.path)
    assert set(model.parts) == {"cross", "decoder", "encoder"}
    assert model.config.cross_layers == model.cross.layers == CrossLayers("last", 2)
