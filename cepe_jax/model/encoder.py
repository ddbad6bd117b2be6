"""The bidirectional encoder of context chunks, and its masked-language-model head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from cepe_jax.checks import check_mask, check_tokens
from cepe_jax.config import FLOAT32, Compute, EncoderConfig
from cepe_jax.model.attention import Mask
from cepe_jax.model.backends import resolved
from cepe_jax.model.layers import Block, RMSNorm, embed, normal, project
from cepe_jax.model.llama import scan_layers
from cepe_jax.model.lora import Lora, bound, of_parts, parts_of
from cepe_jax.model.parts import Parts
from cepe_jax.model.rope import rope_table
from cepe_jax.sharding import constrain

Array = jax.Array


class MLMHead(nnx.Module):
    """dense, SiLU, norm; then the embedding transposed, plus a bias (RoBERTa's head with Llama's parts)."""

    def __init__(self, config: EncoderConfig, *, key: Array):
        E = config.width
        self.dense = normal(key, (E, E), E**-0.5, ("embed", None))
        self.dense_bias = nnx.Param(jnp.zeros(E), axes=(None,))
        self.norm = RMSNorm((E,), config.norm_eps, ("embed",))
        self.bias = nnx.Param(jnp.zeros(config.vocab_size), axes=("encoder_vocab",))


class Encoder(nnx.Module):
    """The encoder (paper, section 3.1), with its MLM head if the config has one."""

    def __init__(self, config: EncoderConfig, compute: Compute = FLOAT32, *, key: Array):
        self.config, self.compute = config, resolved(compute, config.head_dim)
        embedding, layers, head = jax.random.split(key, 3)
        self.embed = normal(embedding, (config.vocab_size, config.width), 0.02, ("encoder_vocab", "embed"))
        self.layers = Block(config, key=layers)
        self.lora = nnx.data(config.lora and Lora(self.layers, config.lora, key=layers))
        self.norm = RMSNorm((config.width,), config.norm_eps, ("embed",))
        if config.mlm_head:
            self.mlm_head = MLMHead(config, key=head)

    def __call__(self, tokens_BL: Array, mask_BL: Array | None = None) -> Array:
        """Hidden states (B, L, E) after the final norm; every token sees all real tokens of its own row."""
        config, compute = self.config, self.compute
        check_tokens("tokens_BL", tokens_BL, 2, config.vocab_size)
        check_mask("mask_BL", mask_BL, tokens_BL.shape)
        table = rope_table(config.rope, config.head_dim, jnp.arange(tokens_BL.shape[1])[None])

        def layer(x_BLE, block):
            x_BLE, _ = block(compute, x_BLE, table, Mask(valid_BS=mask_BL))
            return constrain(x_BLE, "batch", "length", None), None

        x_BLE = constrain(embed(self.embed, tokens_BL, compute.dtype), "batch", "length", None)
        x_BLE, _ = scan_layers(compute.remat.encoder, layer, x_BLE, bound(self.layers, self.lora))
        return self.norm(x_BLE)

    @property
    def parts(self) -> Parts:
        return parts_of("encoder", self)

    @classmethod
    def from_parts(cls, parts: Parts) -> "Encoder":
        return of_parts("encoder", parts)

    def mlm_logits(self, hidden_BLE: Array) -> Array:
        """Logits (B, L, V) in fp32 of the masked tokens, from what the encoder returns."""
        return self.mlm_unembedding()(hidden_BLE)

    def mlm_unembedding(self) -> Callable[[Array], Array]:
        """`mlm_logits`, for use in a loop: its largest weight is gathered once, before it."""
        if not self.config.mlm_head:
            raise ValueError("this encoder has no MLM head: load or train one with mlm_head")
        head = self.mlm_head
        weight_VE = constrain(self.embed[...], "encoder_vocab", None)

        def logits(hidden_BLE: Array) -> Array:
            x_BLE = project("BLE,ED->BLD", hidden_BLE, head.dense) + head.dense_bias[...].astype(hidden_BLE.dtype)
            x_BLE = head.norm(jax.nn.silu(x_BLE))
            cast_VE = weight_VE.astype(x_BLE.dtype)
            found = jnp.einsum("BLE,VE->BLV", x_BLE, cast_VE, preferred_element_type=jnp.float32)
            return found + head.bias[...].astype(jnp.float32)

        return logits
