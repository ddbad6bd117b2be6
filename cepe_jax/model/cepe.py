"""CEPE: a frozen decoder, an encoder of context chunks, and cross-attention between them."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cepe_jax.checks import check_mask, check_tokens
from cepe_jax.config import FLOAT32, CepeConfig, Compute, CrossLayers, EncoderConfig
from cepe_jax.model.cache import Cache
from cepe_jax.model.cross import CrossAttention, Memory
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.layers import normal
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import Frozen, Parts, held_as
from cepe_jax.sharding import constrain, split_axes

Array = jax.Array
CrossInit = Literal["copy", "zero", "normal"]


def cross_from_self_attention(
    decoder: Llama, encoder: EncoderConfig, layers: CrossLayers, init: CrossInit, *, key: Array
) -> CrossAttention:
    """Cross-attention for these layers of `decoder`, started from their self-attention.

    Queries are copied; keys and values keep the first E of their D inputs; the norm is the one before the MLP. A norm
    of keys becomes a scale of their projection: its own, over the size that the projection gives to inputs of size 1.
    The output projection is a copy, zero (the spliced model is then the plain one), or normal with deviation 0.02.
    ValueError when the encoder is wider than the decoder: there is nothing to copy the rest from.
    """
    _refuse_factors(decoder)
    E, D = encoder.width, decoder.config.width
    if E > D:
        raise ValueError(f"encoder width {E} exceeds decoder width {D}: cross-attention cannot start as a copy")
    cross = CrossAttention(CepeConfig(decoder.config, encoder, layers), key=key)
    chosen = cross.layers.indices(decoder.config.num_layers)
    chosen = slice(chosen.start, chosen.stop, chosen.step)
    # Copies: what trains is donated, and must not share a buffer with what is frozen.
    stack = held_as(nnx.Param, decoder.layers)
    stack = jax.tree.map(lambda a: jnp.array(a[chosen], jnp.float32, copy=True), stack)
    cross.norm.scale, attention = stack.mlp_norm.scale, stack.attention
    cross.q = attention.q
    cross.k, cross.v = (own.replace(copied[:, :E]) for own, copied in ((cross.k, attention.k), (cross.v, attention.v)))
    if cross.biased:
        cross.q_bias, cross.v_bias = attention.q_bias, attention.v_bias
    if cross.normed:
        cross.q_norm.scale, k_ZEKH = attention.q_norm.scale, cross.k[...]
        size_ZK = jnp.sqrt(jnp.square(k_ZEKH).sum(axis=1).mean(axis=-1))
        scale_ZH = attention.k_norm.scale[...]
        cross.k = cross.k.replace(k_ZEKH * scale_ZH[:, None, None] / size_ZK[:, None, :, None])
    match init:
        case "copy":
            cross.o = attention.o
        case "zero":
            cross.o = jax.tree.map(jnp.zeros_like, attention.o)
        case "normal":
            cross.o = normal(key, attention.o.shape, 0.02, attention.o.get_metadata()["axes"])
        case _:
            raise ValueError(f"cross-attention init {init!r}: choose copy, zero or normal")
    return cross


def encoder_from_decoder(decoder: Llama, config: EncoderConfig, compute: Compute = FLOAT32, *, key: Array) -> Encoder:
    """An encoder that starts with the decoder's embedding and first layers; the mask's embedding is their mean.

    It reads both ways what the decoder read one way: MLM training has less to learn, and the memory starts in the
    decoder's own space. ValueError unless the encoder has the decoder's sizes and no more layers.
    """
    _refuse_factors(decoder)
    ours = decoder.config
    for name in ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "qkv_bias", "qk_norm"):
        if getattr(config, name) != getattr(ours, name):
            raise ValueError(
                f"encoder {name} {getattr(config, name)} is not the decoder's {getattr(ours, name)}: "
                f"it cannot start from the decoder"
            )
    if config.num_layers > ours.num_layers or config.vocab_size < ours.vocab_size:
        raise ValueError(
            f"an encoder of {config.num_layers} layers and {config.vocab_size} ids cannot start from a decoder of "
            f"{ours.num_layers} and {ours.vocab_size}: give it fewer layers, and ids for the decoder's and the mask"
        )
    encoder = Encoder(config, compute, key=key)
    layers = held_as(nnx.Param, decoder.layers)
    encoder.layers = jax.tree.map(lambda a: jnp.array(a[: config.num_layers], jnp.float32, copy=True), layers)
    rows = decoder.embed[...].astype(jnp.float32)
    extra = jnp.broadcast_to(rows.mean(axis=0), (config.vocab_size - ours.vocab_size, ours.width))
    encoder.embed = encoder.embed.replace(jnp.concatenate([rows, extra]))
    return encoder


def _refuse_factors(decoder: Llama) -> None:
    """Raise ValueError for a decoder whose weights are not all that it computes with."""
    if decoder.lora is not None:
        raise ValueError("the decoder has low-rank factors, of which a copy would lack: merge them (convert.py merge)")


class Cepe(nnx.Module):
    """A decoder whose weights are `Frozen`, and the encoder and cross-attention that train."""

    def __init__(self, decoder: Llama, encoder: Encoder, cross: CrossAttention, frozen: tuple[str, ...] = ("decoder",)):
        self.decoder, self.encoder, self.cross = decoder, encoder, cross
        for name in frozen:
            setattr(self, name, held_as(Frozen, getattr(self, name)))

    @classmethod
    def create(cls, config: CepeConfig, compute: Compute = FLOAT32, *, key: Array) -> "Cepe":
        """Return a CEPE with random weights."""
        decoder, encoder, cross = jax.random.split(key, 3)
        return cls(
            Llama(config.decoder, compute, key=decoder),
            Encoder(config.encoder, compute, key=encoder),
            CrossAttention(config, key=cross),
        )

    @property
    def parts(self) -> Parts:
        return {"cross": self.cross} | self.decoder.parts | self.encoder.parts

    @classmethod
    def from_parts(cls, parts: Parts) -> "Cepe":
        return cls(Llama.from_parts(parts), Encoder.from_parts(parts), parts["cross"], frozen=())

    @property
    def config(self) -> CepeConfig:
        return CepeConfig(self.decoder.config, self.encoder.config, self.cross.layers)

    def __call__(
        self,
        tokens_BT: Array,
        context_BCL: Array | None = None,
        context_mask_BCL: Array | None = None,
        token_mask_BT: Array | None = None,
    ) -> Array:
        """Logits (B, T, V) in fp32. Without a context, or in rows where all of it is masked, the plain decoder's."""
        if context_BCL is None and context_mask_BCL is not None:
            raise ValueError("context_mask_BCL came without its context_BCL: give both")
        memory = None
        if context_BCL is not None and context_BCL.size:
            memory = self.encode(context_BCL, context_mask_BCL)
        hidden_BTD, _ = self.decode(tokens_BT, memory, token_mask_BT=token_mask_BT)
        return self.decoder.logits(hidden_BTD)

    def encode(self, context_BCL: Array, context_mask_BCL: Array | None = None) -> Memory:
        """Return the memory of the chunks, which are in reading order: the decoder's tokens follow the last chunk."""
        states_BME = self.encode_chunks(context_BCL, context_mask_BCL)
        B, C, L = context_BCL.shape
        if distinct := self.encoder.config.chunk_positions:
            positions_CE = chunk_positions(C, distinct, states_BME.shape[-1]).astype(states_BME.dtype)
            states_BME = (states_BME.reshape(B, C, L, -1) + positions_CE[:, None]).reshape(B, C * L, -1)
        return Memory(states_BME, None if context_mask_BCL is None else context_mask_BCL.reshape(B, C * L))

    def encode_chunks(self, context_BCL: Array, context_mask_BCL: Array | None = None) -> Array:
        """Return the encoder's output (B, M = C L, E). Each chunk is read by itself, with positions from 0.

        Chunks are rows of one batch. On a mesh whose devices share them the encoder is mapped over them, cut as the
        memory is, and so communicates nothing.
        """
        check_tokens("context_BCL", context_BCL, 3, self.encoder.config.vocab_size)
        check_mask("context_mask_BCL", context_mask_BCL, context_BCL.shape)
        B, C, L = context_BCL.shape
        if axes := split_axes("memory"):
            context_BCL = constrain(context_BCL, "batch", "memory", "length")
            in_axes = 1, None if context_mask_BCL is None else 1
            encode = jax.vmap(self.encoder, in_axes, out_axes=1, spmd_axis_name=axes)
            return encode(context_BCL, context_mask_BCL).reshape(B, C * L, -1)
        # Not mapped: of a weight's gradient XLA would make a product over two axes, and on a CPU turn an operand
        # around for it, which takes two thirds as long as the rest of the encoder's derivative.
        mask_RL = None if context_mask_BCL is None else context_mask_BCL.reshape(B * C, L)
        return self.encoder(context_BCL.reshape(B * C, L), mask_RL).reshape(B, C * L, -1)

    def decode(
        self,
        tokens_BT: Array,
        memory: Memory | None = None,
        cache: Cache | None = None,
        token_mask_BT: Array | None = None,
        *,
        segments_BT: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Hidden states (B, T, D) of the decoder reading the memory, and the cache with these tokens appended.

        All texts of a row that holds several (`segments_BT`, see `Llama.decode`) read its memory.
        """
        if memory is not None:
            B, E, states_BME = tokens_BT.shape[0], self.encoder.config.width, memory.states_BME
            if states_BME.ndim != 3 or states_BME.shape[0] not in (1, B) or states_BME.shape[2] != E:
                raise ValueError(f"the memory is {list(states_BME.shape)}: these tokens and encoder want [{B}, M, {E}]")
            check_mask("the memory's valid_BM", memory.valid_BM, states_BME.shape[:2])
            memory = Memory(states_BME.astype(self.decoder.compute.dtype), memory.valid_BM)
        given = {"segments_BT": segments_BT, "cross": self.cross}
        return self.decoder.decode(tokens_BT, memory, cache, token_mask_BT, **given)


def chunk_positions(num_chunks: int, distinct: int, width: int) -> np.ndarray:
    """Return a vector for each chunk (C, width), which is added to the encoder's output for the chunk.

    The vector of chunk c holds sines and cosines of C - 1 - c, the number of chunks after it (Vaswani et al. 2017,
    section 3.5), or of `distinct` - 1 for chunks further away: a number that was never trained must not come up.
    """
    numbers_C1 = np.minimum(np.arange(num_chunks)[::-1, None], distinct - 1)
    angles_CE = numbers_C1 * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles_CE), np.cos(angles_CE)], axis=1)[:, :width].astype(np.float32)
