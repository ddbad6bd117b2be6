"""The table `our tensor <-> torch's key`, read in both directions: names, order of the axes, shapes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig, RewardConfig, TransformerConfig

Row = tuple[str, str, str, str]  # our name, torch's key, our axes, torch's axes

# Our path: torch's key, our axes, torch's axes. Letters that stand together are one axis in torch. The heads' order
# within an axis and the rotated pairs are the same on both sides.
SAME = "D", "D"
BLOCK = {
    "attention_norm.scale": ("input_layernorm.weight", *SAME),
    "attention.q": ("self_attn.q_proj.weight", "DNH", "NH D"),
    "attention.k": ("self_attn.k_proj.weight", "DKH", "KH D"),
    "attention.v": ("self_attn.v_proj.weight", "DKH", "KH D"),
    "attention.o": ("self_attn.o_proj.weight", "NHD", "D NH"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", *SAME),
    "mlp.gate": ("mlp.gate_proj.weight", "DF", "F D"),
    "mlp.up": ("mlp.up_proj.weight", "DF", "F D"),
    "mlp.down": ("mlp.down_proj.weight", "FD", "D F"),
}
# Those of some families alone.
BIASES = {
    "attention.q_bias": ("self_attn.q_proj.bias", "NH", "NH"),
    "attention.k_bias": ("self_attn.k_proj.bias", "KH", "KH"),
    "attention.v_bias": ("self_attn.v_proj.bias", "KH", "KH"),
}
NORMS = {
    "attention.q_norm.scale": ("self_attn.q_norm.weight", "H", "H"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", "H", "H"),
}
CROSS = {
    "norm.scale": ("layernorm.weight", *SAME),
    "q": ("q_proj.weight", "DNH", "NH D"),
    "k": ("k_proj.weight", "EKH", "KH E"),
    "v": ("v_proj.weight", "EKH", "KH E"),
    "o": ("o_proj.weight", "NHD", "D NH"),
}
MLM_HEAD = {
    "dense": ("lm_dense.weight", "DE", "E D"),
    "dense_bias": ("lm_dense.bias", *SAME),
    "norm.scale": ("lm_layer_norm.weight", *SAME),
    "bias": ("lm_bias", "V", "V"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: torch's is ours with its axes in `order`, of shape `split`, and neighbours joined into `shape`."""

    key: str
    name: str
    order: tuple[int, ...]
    split: tuple[int, ...]
    shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.split).transpose(np.argsort(self.order))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.order).reshape(self.shape)


def decoder_rows(config: DecoderConfig) -> Iterator[Row]:
    yield from _stack("decoder", "model", config)
    if not config.tied_head:
        yield "decoder.head", "lm_head.weight", "VD", "V D"


def encoder_rows(config: EncoderConfig) -> Iterator[Row]:
    if not config.mlm_head:
        raise ValueError("PyTorch has no class for an encoder without its MLM head: export its Cepe")
    yield from _stack("encoder", "model", config)
    for path, (key, ours, torchs) in MLM_HEAD.items():
        yield f"encoder.mlm_head.{path}", key, ours, torchs


def cepe_rows(config: CepeConfig) -> Iterator[Row]:
    yield from decoder_rows(config.decoder)
    for number, layer in enumerate(config.cross_layers.indices(config.decoder.num_layers)):
        for path, (key, ours, torchs) in CROSS.items():
            yield f"cross.{number}.{path}", f"model.layers.{layer}.cross_attn.{key}", ours, torchs
    yield from _stack("encoder", "encoder", config.encoder)


def reward_rows(config: RewardConfig) -> Iterator[Row]:
    yield from _stack("decoder", "model", config.decoder)
    yield "head.weight", "score.weight", "DR", "R D"


def lora_rows(config: DecoderConfig) -> Iterator[Row]:
    """Yield the rows of a decoder's low-rank factors, in PEFT's names."""
    for layer in range(config.num_layers):
        for path, (key, _, torchs) in BLOCK.items():
            if path.rpartition(".")[2] in config.lora.products:
                outputs, inputs = torchs.split()
                factors = f"base_model.model.model.layers.{layer}.{key.removesuffix('.weight')}"
                yield f"decoder_lora.{layer}.{path}.a", f"{factors}.lora_A.weight", f"{inputs}R", f"R {inputs}"
                yield f"decoder_lora.{layer}.{path}.b", f"{factors}.lora_B.weight", f"R{outputs}", f"{outputs} R"


def _stack(part: str, prefix: str, config: TransformerConfig) -> Iterator[Row]:
    block = BLOCK | (BIASES if config.qkv_bias else {}) | (NORMS if config.qk_norm else {})
    yield f"{part}.embed", f"{prefix}.embed_tokens.weight", "VD", "V D"
    for layer in range(config.num_layers):
        for path, (key, ours, torchs) in block.items():
            yield f"{part}.layers.{layer}.{path}", f"{prefix}.layers.{layer}.{key}", ours, torchs
    yield f"{part}.norm.scale", f"{prefix}.norm.weight", *SAME


def entries_of(rows: Iterable[Row], shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Return the entry of every tensor of a model by our name, from its rows and its tensors' shapes."""
    remaining = dict(shapes)
    entries = {}
    for name, key, ours, torchs in rows:
        size = dict(zip(ours, remaining.pop(name), strict=True))
        groups = torchs.split()
        order = tuple(ours.index(letter) for letter in "".join(groups))
        split = tuple(size[letter] for group in groups for letter in group)
        shape = tuple(math.prod(size[letter] for letter in group) for group in groups)
        entries[name] = Entry(key, name, order, split, shape)
    if remaining:
        raise ValueError(f"PyTorch's class has no place for {', '.join(remaining)}: export another kind of model")
    return entries
