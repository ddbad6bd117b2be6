"""Tiny models for every test: grouped heads, a head_dim that is not width / heads, weights far from their init."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cepe_jax.config import CrossLayers, DecoderConfig, EncoderConfig, RematConfig, RopeConfig
from cepe_jax.model.cepe import Cepe, cross_from_self_attention
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.weights.source import save
from support.tokenizers import CHATML, CHATML_TOKENS, WINDOW, byte_level

DECODER = DecoderConfig(
    vocab_size=64,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_width=40,
    norm_eps=1e-2,
    rope=RopeConfig(theta=500.0),
)
ENCODER = EncoderConfig(
    vocab_size=65,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=28,
    norm_eps=1e-3,
    rope=RopeConfig(theta=100.0),
    mlm_head=True,
)
CROSS_LAYERS = CrossLayers("last", 2)
SIZES = {"width": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 24}  # of presets that are trained


def filled(make, seed: int):
    """What `make` builds, its shapes alone traced, with weights that matter and scales and biases that show."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = jax.tree_util.keystr(path), rng.standard_normal(leaf.shape)
        if "scale" in name:
            noise = 1 + 0.3 * noise
        elif "bias" in name:
            noise = 0.3 * noise
        elif "embed" in name:
            noise = 0.5 * noise
        elif name.endswith((".o.value", ".down.value")):
            noise = noise * 0.2
        else:
            noise = noise * leaf.shape[1] ** -0.5  # (layer, inputs, ...)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make))


def make_decoder(config: DecoderConfig = DECODER) -> Llama:
    return filled(lambda: Llama(config, key=jax.random.key(0)), seed=1)


def make_encoder(config: EncoderConfig = ENCODER) -> Encoder:
    return filled(lambda: Encoder(config, key=jax.random.key(0)), seed=2)


def make_cepe(layers: CrossLayers = CROSS_LAYERS, vocab_size: int = DECODER.vocab_size, **properties: bool) -> Cepe:
    decoder = make_decoder(dataclasses.replace(DECODER, vocab_size=vocab_size, **properties))
    encoder = make_encoder(dataclasses.replace(ENCODER, vocab_size=vocab_size + 1))

    def make():
        return cross_from_self_attention(decoder, ENCODER, layers, "normal", key=jax.random.key(0))

    return Cepe(decoder, encoder, filled(make, seed=3))


def write_home(assets: Path) -> Path:
    """Write a directory of a tiny CEPE with a tokenizer and a chat template below `assets`, and return it."""
    byte_level(assets / "tokenizer.json", ("<s>", "</s>", *CHATML_TOKENS), 330)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (assets / "tokenizer_config.json").write_text(json.dumps(settings))
    (assets / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    config = {"format": "cepe_jax", "kind": "llama", "decoder": dataclasses.asdict(DECODER)}
    config["huggingface"] = {"max_position_embeddings": WINDOW}
    (assets / "config.json").write_text(json.dumps(config))
    save(make_cepe(vocab_size=332), assets / "model", assets)
    return assets / "model"


def with_config(model, **changes):
    """The same weights under another config."""
    return _with(model, dataclasses.replace(model.config, **changes), model.compute)


def computed(model, **changes):
    """The same weights, computed in another way. `remat` is that of the model's part."""
    if "remat" in changes:
        changes["remat"] = RematConfig(changes["remat"], changes["remat"])
    return _with(model, model.config, dataclasses.replace(model.compute, **changes))


def _with(model, config, compute):
    abstract = jax.eval_shape(lambda: type(model)(config, compute, key=jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def with_leaf(model, name: str, value):
    """The model with `value` in the place of the one leaf called `name`."""
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)]
    assert [found for found, _ in named].count(f".{name}.value") == 1
    leaves = [value if found == f".{name}.value" else leaf for found, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def relative_error(ours, wanted) -> float:
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    return float(np.abs(ours - wanted).max() / np.abs(wanted).max())


def float64(module) -> dict:
    """The module's weights by name, nested, in fp64 numpy."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))


def bits(part) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(part)]


def forget(directory: Path) -> None:
    """Make a directory in our format one of before hash.json noted files: any of them may be changed."""
    hashes = json.loads((directory / "hash.json").read_text())
    hashes.pop("files", None)
    (directory / "hash.json").write_text(json.dumps(hashes))


def flip(directory: Path) -> None:
    """Change one bit of the last weight in a directory of one file of weights."""
    (file,) = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
