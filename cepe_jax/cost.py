"""FLOPs by formula, and what chips can do: the one source of every figure that is not measured.

A multiply-add is 2 FLOPs; causal attention counts half its square; embeddings, norms and softmax count nothing.
"""

from dataclasses import dataclass

from cepe_jax.config import CepeConfig, TransformerConfig


@dataclass(frozen=True)
class Chip:
    """One accelerator, and how many of them a host of a pod has."""

    peak_flops: float  # bf16, per second
    per_host: int


CHIPS = {"v5e": Chip(1.97e14, 4)}


def _layer_weights(config: TransformerConfig) -> int:
    """Weights that multiply each position in one Llama block."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.width * (heads * config.head_dim + 3 * config.mlp_width)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence's forward pass, by what the backward pass makes of them."""

    frozen: float  # weights without gradients that gradients pass through: as much again
    trained: float  # weights with gradients: twice as much again
    attention: float  # scores and sums of values, twice as much again
    ahead: float = 0.0  # frozen weights and attention that no gradient reaches

    @property
    def forward(self) -> float:
        return self.frozen + self.trained + self.attention + self.ahead

    @property
    def train(self) -> float:
        """Forward and backward, nothing recomputed."""
        return self.forward + self.frozen + 2 * (self.trained + self.attention)


def cepe_flops(config: CepeConfig, window: int, num_chunks: int, chunk_length: int) -> Flops:
    """Of CEPE with a frozen decoder: `window` tokens that read `num_chunks` chunks of `chunk_length` tokens."""
    decoder, encoder, memory = config.decoder, config.encoder, num_chunks * chunk_length
    heads_width, kv_width = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    spliced = config.num_cross_layers / decoder.num_layers
    layers = decoder.num_layers * (2 * _layer_weights(decoder) * window + 2 * window**2 * heads_width)
    self_attention = 2 * window**2 * heads_width * decoder.num_layers * spliced
    head = 2 * decoder.width * decoder.vocab_size * window
    cross_weights = 2 * heads_width * decoder.width * window + 2 * encoder.width * kv_width * memory
    encoded = 2 * _layer_weights(encoder) * memory * encoder.num_layers
    encoder_attention = 4 * chunk_length * encoder.num_heads * encoder.head_dim * memory * encoder.num_layers
    return Flops(
        frozen=spliced * decoder.num_layers * 2 * _layer_weights(decoder) * window + head,
        trained=encoded + 2 * cross_weights * config.num_cross_layers,
        attention=self_attention + encoder_attention + 4 * window * memory * heads_width * config.num_cross_layers,
        ahead=(1 - spliced) * layers,
    )
