"""FLOPs by formula, and what chips can do: the one source of every figure that is not measured.

A multiply-add is 2 FLOPs; causal attention counts half its square; embeddings, norms and softmax count nothing.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig, TransformerConfig


@dataclass(frozen=True)
class Chip:
    """One accelerator, as its vendor describes it."""

    peak_flops: float  # bf16, per second
    hbm: float  # bytes that a program may have
    bandwidth: float  # of HBM, bytes per second
    links: float  # to other chips, all ports together, bytes per second one way
    per_host: int  # chips of a host of a pod
    across: float = 0.0  # to chips of other hosts, bytes per second one way; 0 = by the same links


CHIPS = {
    "v4": Chip(2.75e14, 30.75 * 2**30, 1.2e12, 3e11, 4),
    "v5e": Chip(1.97e14, 15.75 * 2**30, 8.1e11, 2e11, 4),
    "v5p": Chip(4.59e14, 95.74 * 2**30, 2.8e12, 6e11, 4),
    "v6e": Chip(9.18e14, 31.25 * 2**30, 1.6e12, 4e11, 4),
    "a100": Chip(3.12e14, 79.25 * 2**30, 2.04e12, 3e11, 8, 2.5e10),
    "h100": Chip(9.89e14, 79.11 * 2**30, 3.35e12, 4.5e11, 8, 5e10),
    "h200": Chip(9.89e14, 139.8 * 2**30, 4.8e12, 4.5e11, 8, 5e10),
}

# In what a device calls itself, the first that fits: chip.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one that is not in the table, as a CPU."""
    return next((CHIPS[name] for kind, name in _KINDS.items() if kind in device_kind), None)


def peak_flops(devices: Sequence) -> float | None:
    """Per second, of all `jax.Device`s together; None where one's chip is not in the table."""
    chips = [chip_of(device.device_kind) for device in devices]
    return None if None in chips else sum(chip.peak_flops for chip in chips)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence's forward pass, by what the backward pass makes of them."""

    frozen: float = 0.0  # weights without gradients that gradients pass through: as much again
    trained: float = 0.0  # weights with gradients: twice as much again
    attention: float = 0.0  # scores and sums of values, twice as much again
    ahead: float = 0.0  # weights and attention that no gradient reaches

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in dataclasses.fields(self)))

    def times(self, number: int) -> "Flops":
        return Flops(*(number * getattr(self, kind.name) for kind in dataclasses.fields(self)))

    @property
    def forward(self) -> float:
        return self.frozen + self.trained + self.attention + self.ahead

    @property
    def train(self) -> float:
        """Forward and backward, nothing recomputed."""
        return self.forward + self.frozen + 2 * (self.trained + self.attention)


def _layer_weights(config: TransformerConfig) -> int:
    """Weights that multiply each position in one Llama block."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.width * (heads * config.head_dim + 3 * config.mlp_width)


def _factor_weights(config: TransformerConfig) -> int:
    """Numbers of the low-rank factors in one Llama block."""
    if config.lora is None:
        return 0
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outputs = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads} | dict.fromkeys(
        ("gate", "up", "down"), config.mlp_width
    )
    return config.lora.rank * sum(config.width + outputs[product] for product in config.lora.products)


def _layers(config: TransformerConfig, positions: int) -> float:
    return 2 * _layer_weights(config) * positions * config.num_layers


def _factors(config: TransformerConfig, positions: int) -> float:
    return 2 * _factor_weights(config) * positions * config.num_layers


def _head(config: TransformerConfig, positions: int) -> float:
    return 2 * config.width * config.vocab_size * positions


def _causal(config: DecoderConfig, window: int) -> float:
    return 2 * window**2 * config.num_heads * config.head_dim * config.num_layers


def _chunked(config: EncoderConfig, num_chunks: int, length: int) -> float:
    return 4 * length**2 * num_chunks * config.num_heads * config.head_dim * config.num_layers


def _by_training(weights: dict[str, float], train: Collection[str], attention: float, ahead: float = 0.0) -> Flops:
    """Return FLOPs of parts that a gradient reaches, some of which train."""
    trained = sum(flops for part, flops in weights.items() if part in train)
    return Flops(sum(weights.values()) - trained, trained, attention, ahead)


def decoder_flops(config: DecoderConfig, window: int, train: Collection[str] = ("decoder",)) -> Flops:
    """The FLOPs of a plain decoder on `window` tokens, of which the parts `train` are trained."""
    weights = {"decoder": _layers(config, window) + _head(config, window), "decoder_lora": _factors(config, window)}
    return _by_training(weights, train, _causal(config, window))


def encoder_flops(
    config: EncoderConfig, num_chunks: int, chunk_length: int, train: Collection[str] = ("encoder",)
) -> Flops:
    """The FLOPs of an encoder on `num_chunks` chunks, with its MLM head where it has one."""
    memory = num_chunks * chunk_length
    weights = {"encoder": _layers(config, memory), "encoder_lora": _factors(config, memory)}
    if config.mlm_head:
        weights["encoder"] += _head(config, memory) + 2 * config.width**2 * memory
    return _by_training(weights, train, _chunked(config, num_chunks, chunk_length))


def cepe_flops(
    config: CepeConfig,
    window: int,
    num_chunks: int,
    chunk_length: int,
    train: Collection[str] = ("encoder", "cross"),
    windows: int = 1,
) -> Flops:
    """The FLOPs of CEPE: `window` tokens read `num_chunks` chunks of `chunk_length`; the parts `train` are trained.

    `windows` of them read the same chunks.
    """
    decoder, encoder, memory = config.decoder, config.encoder, num_chunks * chunk_length
    heads_width, kv_width = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    readers = config.cross_layers.count
    reached = 1.0  # share of the decoder's layers that a gradient reaches: all, or those from the first reader on
    if {"decoder", "decoder_lora"}.isdisjoint(train):
        reached -= config.cross_layers.indices(decoder.num_layers)[0] / decoder.num_layers
    weights = {
        "decoder": reached * _layers(decoder, window) + _head(decoder, window),
        "decoder_lora": reached * _factors(decoder, window),
        "cross": 4 * (heads_width * decoder.width * window + encoder.width * kv_width * memory)
        * readers,
    }  # fmt: skip
    attention = reached * _causal(decoder, window) + 4 * window * memory * heads_width * readers
    of_layers = _layers(decoder, window) + _factors(decoder, window) + _causal(decoder, window)
    flops = _by_training(weights, train, attention, (1 - reached) * of_layers).times(windows)
    encoding = encoder_flops(dataclasses.replace(encoder, mlm_head=False), num_chunks, chunk_length, train)
    if {"encoder", "encoder_lora"}.isdisjoint(train):
        encoding = Flops(ahead=encoding.forward)
    return flops + encoding


class ReadFlops(NamedTuple):
    """The FLOPs of a layer's attention to a memory, projections of the memory included."""

    materialised: float  # keys and values made from the memory
    absorbed: float  # their projections absorbed into queries and sums
    stored: float  # keys and values at hand


def read_flops(num_queries: int, num_heads: int, memory: int, weight: tuple[int, int, int]) -> ReadFlops:
    """The FLOPs of queries to a memory of `memory` tokens; `weight` is the shape (E, K, H) of its key projection."""
    E, K, H = weight
    scores = 4 * num_queries * memory * num_heads  # and sums, for each number of a key
    absorbed = 4 * num_queries * num_heads * H * E + scores * E
    return ReadFlops(4 * memory * E * K * H + scores * H, absorbed, scores * H)


def inference_flops(config: CepeConfig | DecoderConfig, tokens: int, cached: int, memory: int = 0) -> dict[str, float]:
    """The FLOPs of a decoder that reads `tokens` after `cached` ones, with the last logits, by how it reads memory.

    A plain decoder has no memory, and one way.
    """
    decoder = config if isinstance(config, DecoderConfig) else config.decoder
    flops = _layers(decoder, tokens) + _factors(decoder, tokens) + _head(decoder, 1) + _causal(decoder, tokens)
    flops += 4 * tokens * cached * decoder.num_heads * decoder.head_dim * decoder.num_layers
    if config is decoder:
        return {"full": flops}
    weight = config.encoder.width, decoder.num_kv_heads, decoder.head_dim
    reads = read_flops(tokens, decoder.num_heads, memory, weight)
    queries = 4 * tokens * decoder.num_heads * decoder.head_dim * decoder.width  # made, and their sums projected
    return {form: flops + config.cross_layers.count * (queries + read) for form, read in reads._asdict().items()}


def step_bytes(config: CepeConfig | DecoderConfig, cached: int, memory: int, itemsize: int) -> dict[str, float]:
    """Read and written for one token after `cached` ones, by how the memory is read; every weight and state once."""
    decoder = config if isinstance(config, DecoderConfig) else config.decoder
    kv_width = decoder.num_kv_heads * decoder.head_dim
    numbers = (_layer_weights(decoder) + _factor_weights(decoder)) * decoder.num_layers
    numbers += decoder.vocab_size * decoder.width
    numbers += 2 * cached * kv_width * decoder.num_layers
    if config is decoder:
        return {"full": numbers * itemsize}
    E, kv = config.encoder.width, 2 * memory * kv_width
    weights = 2 * decoder.width * decoder.num_heads * decoder.head_dim + 2 * E * kv_width
    reads = {"materialised": memory * E + 2 * kv, "absorbed": memory * E, "stored": kv}
    return {form: (numbers + config.cross_layers.count * (weights + read)) * itemsize for form, read in reads.items()}


class CacheCost(NamedTuple):
    """The attention of one token to the tokens before it, in all layers."""

    flops: float
    numbers: float  # of the cache, which are read


def cache_cost(config: DecoderConfig, tokens: float, selects_among: float = 0) -> CacheCost:
    """Return the cost of a token that reads `tokens` tokens in each key head, on average.

    `selects_among`: tokens whose keys alone are multiplied with its queries before.
    """
    queries, keys = (heads * config.head_dim * config.num_layers for heads in (config.num_heads, config.num_kv_heads))
    return CacheCost((4 * tokens + 2 * selects_among) * queries, (2 * tokens + selects_among) * keys)


def teacher_flops(config: DecoderConfig, window: int, memory: int) -> float:
    """The FLOPs of the plain decoder that teaches `window` positions after `memory` tokens of context, in one pass."""
    length = window + memory
    return _layers(config, length) + _factors(config, length) + _causal(config, length) + _head(config, window)
