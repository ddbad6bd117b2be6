"""CEPE in plain PyTorch: an oracle for numbers and for speed. Its weights have the published checkpoints' names.

Chunks are folded into rows, and attention is `F.scaled_dot_product_attention`. `scripts/benchmark.py --beside=torch`
measures it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cepe_jax.config import CepeConfig, RopeConfig, TransformerConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.weights.build import tensors_of
from cepe_jax.weights.huggingface import table

KeysAndValues = tuple[Tensor, Tensor]
Angles = tuple[Tensor, Tensor]  # cosines and sines


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def heads(x_BTD: Tensor, projection: nn.Linear, head_dim: int) -> Tensor:
    """(B, N, T, H)."""
    return projection(x_BTD).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def angles(rope: RopeConfig, head_dim: int, positions_BT: Tensor) -> Angles:
    """cos and sin (B, 1, T, H) of both halves of a head; of the scalings, none and "linear"."""
    frequencies = rope.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim) / rope.factor
    turns_B1TH = (positions_BT[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return turns_B1TH.cos(), turns_B1TH.sin()


def rotate(x_BNTH: Tensor, table: Angles) -> Tensor:
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * table[0] + torch.cat([-second, first], dim=-1) * table[1]


class Attention(nn.Module):
    """The projections of self-attention, or with `layernorm` those of cross-attention."""

    def __init__(self, config: TransformerConfig, memory_width: int = 0):
        super().__init__()
        self.head_dim = config.head_dim
        read, width = memory_width or config.width, config.num_heads * config.head_dim
        self.q_proj, self.o_proj = linear(config.width, width), linear(width, config.width)
        self.k_proj, self.v_proj = (linear(read, config.num_kv_heads * config.head_dim) for _ in "kv")
        if memory_width:
            self.layernorm = nn.RMSNorm(config.width, config.norm_eps)

    def keys_and_values(self, x_BSD: Tensor) -> KeysAndValues:
        return heads(x_BSD, self.k_proj, self.head_dim), heads(x_BSD, self.v_proj, self.head_dim)

    def attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, mask, is_causal=causal, enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1]
        )
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(config.width, config.mlp_width) for _ in "gu")
        self.down_proj = linear(config.mlp_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig, memory_width: int = 0):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(config.width, config.norm_eps) for _ in "ab")
        self.self_attn, self.mlp = Attention(config), MLP(config)
        if memory_width:
            self.cross_attn = Attention(config, memory_width)

    def forward(
        self,
        x_BTD: Tensor,
        table: Angles,
        mask: Tensor | None,
        causal: bool,
        cached: KeysAndValues | None = None,
        read: KeysAndValues | None = None,
        read_mask: Tensor | None = None,
    ) -> tuple[Tensor, KeysAndValues]:
        """x, and the keys and values of self-attention, those `cached` before them included."""
        attention, y_BTD = self.self_attn, self.input_layernorm(x_BTD)
        k_BKSH, v_BKSH = attention.keys_and_values(y_BTD)
        q_BNTH, k_BKSH = rotate(heads(y_BTD, attention.q_proj, attention.head_dim), table), rotate(k_BKSH, table)
        if cached is not None:
            k_BKSH, v_BKSH = (torch.cat(pair, dim=2) for pair in zip(cached, (k_BKSH, v_BKSH), strict=True))
        x_BTD = x_BTD + attention.attend(q_BNTH, k_BKSH, v_BKSH, mask, causal)
        if read is not None:
            cross = self.cross_attn
            q_BNTH = heads(cross.layernorm(x_BTD), cross.q_proj, cross.head_dim)
            x_BTD = x_BTD + cross.attend(q_BNTH, *read, read_mask, causal=False)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), (k_BKSH, v_BKSH)


class Stack(nn.Module):
    def __init__(self, config: TransformerConfig, memory_width: int = 0, readers: Collection[int] = ()):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        widths = [memory_width if index in readers else 0 for index in range(config.num_layers)]
        self.layers = nn.ModuleList(Layer(config, width) for width in widths)
        self.norm = nn.RMSNorm(config.width, config.norm_eps)


@dataclass
class Memory:
    """The encoder's output (B, M, E), which of it is real, and its keys and values by layer where they are kept."""

    hidden_BME: Tensor
    mask_BM: Tensor | None = None
    kept: dict[int, KeysAndValues] | None = None


class TorchCepe(nn.Module):
    def __init__(self, config: CepeConfig):
        super().__init__()
        self.config = config
        readers = config.cross_layers.indices(config.decoder.num_layers)
        self.model = Stack(config.decoder, config.encoder.width, readers)
        self.encoder = Stack(config.encoder)
        self.lm_head = linear(config.decoder.width, config.decoder.vocab_size)
        self.model.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        for layer in (self.model.layers[index] for index in readers):
            layer.cross_attn.requires_grad_(True)

    def encode(self, context_BCL: Tensor, mask_BCL: Tensor | None = None) -> Memory:
        config, rows = self.config.encoder, context_BCL.flatten(0, 1)
        table = angles(config.rope, config.head_dim, torch.arange(rows.shape[1])[None])
        mask = None if mask_BCL is None else mask_BCL.flatten(0, 1)[:, None, None]
        x_RLE = self.encoder.embed_tokens(rows)
        for layer in self.encoder.layers:
            x_RLE, _ = layer(x_RLE, table, mask, causal=False)
        hidden_BME = self.encoder.norm(x_RLE).reshape(len(context_BCL), -1, config.width)
        return Memory(hidden_BME, None if mask_BCL is None else mask_BCL.flatten(1))

    def keep(self, memory: Memory) -> Memory:
        """The memory with keys and values of every layer that reads it."""
        spliced = {i: layer for i, layer in enumerate(self.model.layers) if hasattr(layer, "cross_attn")}
        kept = {i: layer.cross_attn.keys_and_values(memory.hidden_BME) for i, layer in spliced.items()}
        return Memory(memory.hidden_BME, memory.mask_BM, kept)

    def decode(
        self, tokens_BT: Tensor, memory: Memory | None = None, cache: list[KeysAndValues] | None = None
    ) -> tuple[Tensor, list[KeysAndValues]]:
        """Hidden states (B, T, D), and the cache with these tokens; more than one token only into an empty cache."""
        config = self.config.decoder
        seen = 0 if cache is None else cache[0][0].shape[2]
        table = angles(config.rope, config.head_dim, torch.arange(seen, seen + tokens_BT.shape[1])[None])
        read_mask = None if memory is None or memory.mask_BM is None else memory.mask_BM[:, None, None]
        x_BTD, grown = self.model.embed_tokens(tokens_BT), []
        for index, layer in enumerate(self.model.layers):
            read = None
            if memory is not None and hasattr(layer, "cross_attn"):
                kept = memory.kept
                read = kept[index] if kept else layer.cross_attn.keys_and_values(memory.hidden_BME)
            cached = cache and cache[index]
            x_BTD, kv = layer(x_BTD, table, None, cached is None, cached, read, read_mask)
            grown.append(kv)
        return self.model.norm(x_BTD), grown

    def forward(self, tokens_BT: Tensor, context_BCL: Tensor | None = None, mask_BCL: Tensor | None = None) -> Tensor:
        """Logits (B, T, V)."""
        memory = None if context_BCL is None else self.encode(context_BCL, mask_BCL)
        return self.lm_head(self.decode(tokens_BT, memory)[0])


def copy_of(model: Cepe) -> TorchCepe:
    """The same model, with the same weights."""
    entries, oracle = table(model.config), TorchCepe(model.config)
    weights = {entries[name].key: entries[name].to_torch(np.asarray(x)) for name, x in tensors_of(model)}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    oracle.load_state_dict({key: torch.tensor(x) for key, x in weights.items()})
    return oracle


def train_step(model: Cepe, batch: dict, learning_rate: float, clip_norm: float) -> Callable[[], float]:
    """A function that trains a copy of the model on the batch once more, with AdamW, and returns its loss."""
    oracle = copy_of(model)
    trained = [weight for weight in oracle.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, fused=True)
    given = {name: torch.tensor(np.asarray(x)) for name, x in batch.items()}

    def step() -> float:
        optimizer.zero_grad()
        logits_BTV = oracle(given["tokens"].long(), given["context"].long(), given.get("context_mask"))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), given["labels"].long().flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        return loss.item()

    return step


class Reader:
    """Encodes a context and goes on after a prompt, each call by itself, without gradients."""

    def __init__(self, model: Cepe, context_BCL: np.ndarray, prompt_BT: np.ndarray):
        self.oracle = copy_of(model).requires_grad_(False)
        self.context_BCL, self.prompt_BT = torch.tensor(context_BCL).long(), torch.tensor(prompt_BT).long()
        self.memory = self.encode()

    def encode(self) -> Memory:
        with torch.inference_mode():
            return self.oracle.encode(self.context_BCL)

    def first_token(self) -> Tensor:
        """The likeliest token after context and prompt."""
        self.memory = self.encode()
        return self.start(self.memory)

    def start(self, memory: Memory) -> Tensor:
        """The likeliest token (B, 1) after the prompt; `next_token` goes on from here, with the same memory."""
        self.reading, self.cache = memory, None
        self.last_B1 = self.prompt_BT
        return self.next_token()

    def next_token(self) -> Tensor:
        """The likeliest token (B, 1) after the last one."""
        with torch.inference_mode():
            hidden_BTD, self.cache = self.oracle.decode(self.last_B1, self.reading, self.cache)
            self.last_B1 = self.oracle.lm_head(hidden_BTD[:, -1:]).argmax(-1)
        return self.last_B1
