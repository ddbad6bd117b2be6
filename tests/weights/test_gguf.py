"""GGUF files as llama.cpp's converter writes them, from the tiny decoder: read to the same weights, or refused."""

import dataclasses
import math
import struct
import sys

import jax
import numpy as np
import pytest
from support.models import DECODER, float64, make_decoder
from support.refusals import one_line

from cepe_jax.config import RopeConfig
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.weights.build import tensors_of
from cepe_jax.weights.convert import to_jax
from cepe_jax.weights.gguf import Gguf
from cepe_jax.weights.source import load, open_model, open_ours

gguf = pytest.importorskip("gguf")

TIED = dataclasses.replace(DECODER, tied_head=True)
# Rows of a multiple of 32, which Q8_0 needs; a head's width is not width / heads.
WIDE = dataclasses.replace(DECODER, width=32, mlp_width=64, head_dim=16)
TOKENS = ["<unk>", "<s>", "</s>", "Ġ", "1", "2", "a", "b", "ab", "Ġa", "ĠĠ"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * 8,
    "tokenizer.ggml.merges": ["a b", "Ġ a", "Ġ Ġ"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def metadata_of(config) -> dict:
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": 96,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.mlp_width,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.vocab_size": config.vocab_size,
    } | TOKENIZER


def neighbours(weight_DNH: np.ndarray) -> np.ndarray:
    """Rows (N H) as llama.cpp turns them: rows 2i and 2i + 1 of a head are one pair, here rows i and i + H/2."""
    rows = [
        weight_DNH[:, head, pair + half * (weight_DNH.shape[2] // 2)]
        for head in range(weight_DNH.shape[1])
        for pair in range(weight_DNH.shape[2] // 2)
        for half in (0, 1)
    ]
    return np.stack(rows)


def tensors_in(model) -> dict[str, np.ndarray]:
    """The decoder's weights by GGUF's names, in its layout."""
    weights = jax.tree.map(np.float32, float64(model))
    tensors = {"token_embd.weight": weights["embed"], "output_norm.weight": weights["norm"]["scale"]}
    if not model.config.tied_head:
        tensors["output.weight"] = weights["head"]
    for layer in range(model.config.num_layers):
        block = jax.tree.map(lambda a, layer=layer: a[layer], weights["layers"])
        attention, mlp = block["attention"], block["mlp"]
        tensors |= {
            f"blk.{layer}.attn_norm.weight": block["attention_norm"]["scale"],
            f"blk.{layer}.attn_q.weight": neighbours(attention["q"]),
            f"blk.{layer}.attn_k.weight": neighbours(attention["k"]),
            f"blk.{layer}.attn_v.weight": np.einsum("dkh->khd", attention["v"]).reshape(-1, model.config.width),
            f"blk.{layer}.attn_output.weight": np.einsum("nhd->dnh", attention["o"]).reshape(model.config.width, -1),
            f"blk.{layer}.ffn_norm.weight": block["mlp_norm"]["scale"],
            f"blk.{layer}.ffn_gate.weight": mlp["gate"].T,
            f"blk.{layer}.ffn_up.weight": mlp["up"].T,
            f"blk.{layer}.ffn_down.weight": mlp["down"].T,
        }
    return tensors


def save(path, tensors: dict, metadata: dict, kind="F32", architecture: str = "llama", **options):
    """A GGUF file at `path`; matrices of `kind`, keys of the value None left out."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        matrix = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        stored = array if array.dtype != np.float32 else gguf.quants.quantize(np.ascontiguousarray(array), matrix)
        writer.add_tensor(name, stored, raw_dtype=matrix if array.dtype == np.float32 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors(decoder) -> dict:
    return tensors_in(decoder)


def assert_same(ours, wanted, largest_error=0.0) -> None:
    ours, wanted = dict(tensors_of(ours)), dict(tensors_of(wanted))
    assert list(ours) == list(wanted)
    for name, array in wanted.items():
        assert ours[name].dtype == np.float32
        assert np.abs(ours[name] - array).max() <= largest_error * np.abs(array).max(), name


@pytest.mark.parametrize("config", [DECODER, TIED], ids=["untied", "tied"])
def test_weights_are_the_same(config, tmp_path):
    model = make_decoder(config)
    path = save(tmp_path / "x.gguf", tensors_in(model), metadata_of(config))
    assert open_model(path).config == config
    assert_same(load(path), model)


# The error over the largest weight: half a step of 255, and of 15 of twice the size; a scale has 11 bits.
ERRORS = {"Q8_0": 1 / 254 + 2**-11, "Q4_1": 1 / 15 + 2**-11, "F16": 2**-11, "BF16": 2**-8}


@pytest.mark.parametrize("kind", ERRORS)
def test_quantised_weights_are_near(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("cepe_jax.weights.gguf.PIECE", 7 * 32)  # of 7 rows: several, and they do not divide
    model = make_decoder(WIDE)
    path = save(tmp_path / "x.gguf", tensors_in(model), metadata_of(WIDE), kind)
    assert_same(load(path), model, ERRORS[kind])


def test_converted_directory(decoder, tensors, tmp_path):
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER) | {"tokenizer.chat_template": "{{ messages }}"})
    to_jax(path, tmp_path / "ours")
    ours = open_ours(tmp_path / "ours")
    ours.verify()
    assert ours.config == DECODER
    assert ours.facts == {"max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2}
    assert_same(load(tmp_path / "ours"), decoder)
    assert Tokenizer(tmp_path / "ours").encode("ab  1 a2", bos=True) == [1, 8, 10, 4, 9, 5]
    assert '"chat_template": "{{ messages }}"' in (tmp_path / "ours" / "tokenizer_config.json").read_text()
    to_jax(path, tmp_path / "half", "bfloat16")
    assert open_ours(tmp_path / "half").read("decoder.head").dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({"eot": 5}, [2, 5]),
        ({"eot": 2}, 2),
        ({"eot": 6, "eom": 5}, [2, 5, 6]),
        ({"eos": 4}, [2, 4]),  # </s> by its name
        ({"tokens": [*TOKENS[:6], "<|eot_id|>", *TOKENS[7:]], "eom": 3}, [2, 3, 6]),
    ],
)
def test_ends_of_a_text_are_llama_cpps(tensors, tmp_path, metadata, ends):
    metadata = {f"tokenizer.ggml.{key}{'' if key == 'tokens' else '_token_id'}": v for key, v in metadata.items()}
    assert Gguf(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER) | metadata)).facts["eos_token_id"] == ends


def test_what_metadata_may_leave_out(decoder, tensors, tmp_path):
    """Plain heads and the plain rope, the vocabulary's size that of the tokens."""
    plain = dataclasses.replace(DECODER, num_heads=4, num_kv_heads=4, head_dim=6, rope=RopeConfig(10_000.0))
    absent = ("head_count_kv", "key_length", "value_length")
    metadata = metadata_of(plain) | {f"llama.attention.{key}": None for key in absent}
    metadata |= {"llama.rope.freq_base": None, "llama.rope.dimension_count": None, "llama.vocab_size": None}
    metadata["tokenizer.ggml.tokens"] = [str(i) for i in range(plain.vocab_size)]
    metadata["tokenizer.ggml.token_type"] = [1] * plain.vocab_size
    assert open_model(save(tmp_path / "x.gguf", tensors_in(make_decoder(plain)), metadata)).config == plain


def test_tokenizer_beside_the_file(tensors, tmp_path):
    metadata = metadata_of(DECODER)
    to_jax(save(tmp_path / "x.gguf", tensors, metadata), tmp_path / "known")
    other = save(tmp_path / "other.gguf", tensors, metadata | {"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(ValueError, match="'gpt2'.*'tekken'.*tokenizer.json"):
        to_jax(other, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "known" / name).read_bytes())
    to_jax(other, tmp_path / "ours")
    assert Tokenizer(tmp_path / "ours").encode("ab") == [8]


def divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3.1's frequencies are divided by, by wavelength, as its model code has it."""
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 24}
YARN |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "finetuned": True}


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        ({"type": "none"}, RopeConfig(5e4)),
        ({"type": "linear", "factor": 2.5}, RopeConfig(5e4, "linear", 2.5)),
        ({"type": "yarn", "factor": 4.0}, RopeConfig(5e4, "yarn", 4.0, 96)),
        (YARN, RopeConfig(5e4, "yarn", 4.0, 24)),
        ({}, RopeConfig(5e4, "llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)),
    ],
)
def test_rope(scaling, wanted, tensors, tmp_path):
    metadata = metadata_of(DECODER) | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    metadata["llama.rope.freq_base"] = 5e4
    if wanted.scaling == "llama3":
        tensors["rope_freqs.weight"] = divisors(5e4, DECODER.head_dim, 32.0)
        assert len(set(tensors["rope_freqs.weight"])) == 3  # a pair between the two
    assert open_model(save(tmp_path / "x.gguf", tensors, metadata)).config.rope == wanted


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.feed_forward_length", None, "lacks llama.feed_forward_length"),
        ("llama.expert_count", 8, "llama.expert_count 8 .* 0 "),
        ("llama.attention.sliding_window", 64, "llama.attention.sliding_window .*unknown"),
        ("llama.rope.dimension_count", 4, r"llama.rope.dimension_count 4 .* 10\b"),
        ("llama.attention.value_length", 12, r"llama.attention.value_length 12 .* 10\b"),
        ("llama.rope.scaling.yarn_beta_fast", 16.0, "yarn_beta_fast 16.0 .* 32.0 "),
        ("llama.rope.scaling.type", "longrope", "rope type 'longrope'"),
        ("llama.rope.scaling.type", ["yarn"], "llama.rope.scaling.type is a list"),
        ("llama.rope.freq_base", math.nan, "theta is nan"),
        ("llama.rope.freq_base", "1e4", "llama.rope.freq_base is '1e4'"),
        ("llama.attention.layer_norm_rms_epsilon", math.inf, "norm_eps is inf"),
        ("llama.attention.head_count", [4, 4, 2], "llama.attention.head_count is a list of 3"),
        ("llama.attention.head_count", 0, "num_attention_heads is 0"),
        ("llama.context_length", "96", "llama.context_length is '96'"),
        ("llama.block_count", 2, "unknown blk.2.attn_k.weight, .* 6 more"),
        ("llama.block_count", 2**31, "num_layers is 2147483648"),
        ("llama.block_count", 4096, "lacks blk.10.attn_k.weight, .* more"),
        ("llama.vocab_size", 65, r"(output|token_embd).weight .*\[64, 24\].*\[65, 24\]"),
        ("split.count", 3, " 3 parts: llama-gguf-split --merge"),
        ("split.count", "3", "split.count is '3'"),
        ("tokenizer.ggml.padding_token_id", 10**6, "padding_token_id 1000000 .* 11 "),
        ("tokenizer.ggml.eos_token_id", 11, "eos_token_id 11 .* 11 "),
        ("tokenizer.ggml.eot_token_id", "</s>", "eot_token_id is '</s>'"),
        ("tokenizer.ggml.tokens", [1, 2, 3], "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", "abc", "tokenizer.ggml.tokens is 'abc'"),
        ("tokenizer.ggml.token_type", [1], "tokenizer.ggml.token_type"),
        ("tokenizer.ggml.token_type", [1] * 10 + [7], "tokenizer.ggml.token_type"),
        ("tokenizer.ggml.scores", [math.nan] * 11, "tokenizer.ggml.scores"),
        ("tokenizer.chat_template", 3, "tokenizer.chat_template is 3"),
    ],
)
def test_metadata_refused(key, value, message, tensors, tmp_path):
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER) | {key: value}), message)


def test_other_architecture(tensors, tmp_path):
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER), architecture="gemma")
    refused(path, "architecture 'gemma': llama, qwen2, qwen3 are read")


def test_missing_tensor(tensors, tmp_path):
    del tensors["blk.1.ffn_gate.weight"]
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER)), "lacks blk.1.ffn_gate.weight")


def test_extra_tensor(tensors, tmp_path):
    tensors["blk.1.attn_q.bias"] = np.zeros(40, np.float32)
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER)), "unknown blk.1.attn_q.bias")


def test_wrong_shape(tensors, tmp_path):
    tensors["blk.2.ffn_up.weight"] = np.ascontiguousarray(tensors["blk.2.ffn_up.weight"].T)
    message = r"blk.2.ffn_up.weight .*\[24, 40\].*\[40, 24\]"
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER)), message)


def test_rotary_divisors_that_are_not_llama_3s(tensors, tmp_path):
    tensors["rope_freqs.weight"] = divisors(DECODER.rope.theta, DECODER.head_dim, 8.0) * [1, 1, 1, 1.1, 1]
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"].astype(np.float32)
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER)), "rope_freqs.weight .*computed")


def test_integers_are_no_weights(tensors, tmp_path):
    tensors["output.weight"] = tensors["output.weight"].astype(np.int32)
    refused(save(tmp_path / "x.gguf", tensors, metadata_of(DECODER)), "output.weight .*I32")


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 900, -1])
def test_truncated_file(kept, tensors, tmp_path):
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "whole GGUF file.*download")


def place_of(path, name: str) -> int:
    """Return where the file has the type of this tensor, which 8 bytes of its offset follow."""
    field = next(t.field for t in gguf.GGUFReader(path).tensors if t.name == name)
    return field.offset + sum(part.nbytes for part in field.parts[:4])


NORM = "blk.1.attn_norm.weight"


@pytest.mark.parametrize(
    ("shift", "replacement", "message"),
    [
        (4, struct.pack("<Q", 1), NORM),  # not a multiple of the alignment
        (4, struct.pack("<Q", 32), NORM),  # in another tensor
        (0, struct.pack("<I", gguf.GGMLQuantizationType.F16), "blk.1.attn_q.weight"),  # half the bytes: a gap
        (-8, struct.pack("<Q", 12), "blk.1.attn_q.weight"),
        (-8, struct.pack("<Q", 0), NORM),
    ],
)
def test_tensors_lie_one_after_the_other(shift, replacement, message, tensors, tmp_path):
    """As llama.cpp wants them: what else the bytes are read as is no weight."""
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    place, data = place_of(path, NORM) + shift, bytearray(path.read_bytes())
    data[place : place + len(replacement)] = replacement
    path.write_bytes(data)
    refused(path, message)


def test_bytes_after_the_last_tensor(tensors, tmp_path):
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    path.write_bytes(path.read_bytes() + bytes(32))
    refused(path, f"{path.stat().st_size:,} bytes")


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.ARRAY, 99])
def test_a_wrong_type_of_the_first_key_is_refused_at_once(kind, tensors, tmp_path):
    """Its value is read as the length of an array, beyond the file's end."""
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    data = path.read_bytes()
    place = data.index(b"general.architecture") + len(b"general.architecture")
    path.write_bytes(data[:place] + struct.pack("<I", kind) + data[place + 4 :])
    refused(path, "whole GGUF file")


def test_weights_that_are_not_finite(tensors, tmp_path):
    tensors["blk.1.ffn_up.weight"][3, 4] = np.nan
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    with pytest.raises(ValueError, match=r"decoder\.layers\.1\.mlp\.up .*finite") as caught:
        to_jax(path, tmp_path / "ours")
    assert str(path) in one_line(caught)


def test_other_files(tensors, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not " * 100)
    refused(tmp_path / "x.gguf", "whole GGUF file")
    refused(tmp_path / "y.gguf", "no file")
    big = save(tmp_path / "z.gguf", tensors, metadata_of(DECODER), endianess=gguf.GGUFEndian.BIG)
    refused(big, "big-endian")


def test_without_the_library(tensors, tmp_path, monkeypatch):
    path = save(tmp_path / "x.gguf", tensors, metadata_of(DECODER))
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, r"GGUF .*pip install '\.\[gguf\]'")
