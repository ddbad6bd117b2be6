"""Reward models: a decoder, or a CEPE that reads the context by its encoder, with a head of one number."""

import jax
import jax.numpy as jnp
from flax import nnx

from cepe_jax.config import FLOAT32, Compute, ContextRewardConfig, RewardConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.layers import normal
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import Parts

Array = jax.Array


class RewardHead(nnx.Module):
    """A number for each position, from its hidden state; without a bias, as in `LlamaForSequenceClassification`."""

    def __init__(self, width: int, *, key: Array):
        self.weight = normal(key, (width, 1), 0.02, ("embed", None))


class Reward(nnx.Module):
    """A decoder or a CEPE with a head; its decoder has no head for tokens."""

    def __init__(self, model: Llama | Cepe, head: RewardHead):
        self.model, self.head = model, head

    @classmethod
    def create(cls, config: RewardConfig | ContextRewardConfig, compute: Compute = FLOAT32, *, key: Array) -> "Reward":
        """Return a reward model with random weights."""
        model, head = jax.random.split(key)
        if isinstance(config, ContextRewardConfig):
            base = Cepe.create(config, compute, key=model)
        else:
            base = Llama(config.decoder, compute, key=model)
        return cls(base, RewardHead(config.decoder.width, key=head))

    @property
    def config(self) -> RewardConfig | ContextRewardConfig:
        if isinstance(self.model, Cepe):
            return ContextRewardConfig(**vars(self.model.config))
        return RewardConfig(self.model.config)

    @property
    def decoder(self) -> Llama:
        return self.model.decoder

    @property
    def parts(self) -> Parts:
        return self.model.parts | {"head": self.head}

    @classmethod
    def from_parts(cls, parts: Parts) -> "Reward":
        return cls((Cepe if "cross" in parts else Llama).from_parts(parts), parts["head"])

    def encode(self, context_BCL: Array, context_mask_BCL: Array | None = None) -> Memory:
        return self.model.encode(context_BCL, context_mask_BCL)

    def __call__(self, tokens_BT: Array, token_mask_BT: Array | None = None, memory: Memory | None = None) -> Array:
        """Return the scores (B,) in fp32 of texts, each that of its last real token; padding may be on either side."""
        hidden_BTD, _ = self.model.decode(tokens_BT, memory, token_mask_BT=token_mask_BT)
        B, T = tokens_BT.shape
        last_B = jnp.full(B, T - 1)
        if token_mask_BT is not None:
            last_B = T - 1 - jnp.argmax(token_mask_BT[:, ::-1], axis=1)
        last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
        wide_BD, weight_D1 = (x.astype(jnp.float32) for x in (last_BD, self.head.weight[...]))
        return (wide_BD @ weight_D1)[:, 0]
