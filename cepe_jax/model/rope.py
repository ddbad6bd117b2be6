"""Rotary positions: inverse frequencies of every scaling, tables, rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import RopeConfig


def _yarn_ramp(config: RopeConfig, head_dim: int) -> np.ndarray:
    """1 where a pair turns too slowly to be extrapolated, 0 where it turns fast (YaRN, section 3.2)."""

    def pair_with(rotations: float) -> float:
        return head_dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_with(config.beta_fast)), 0)
    high = min(math.ceil(pair_with(config.beta_slow)), head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each of the `head_dim / 2` pairs, and the factor on cos and sin."""
    plain = config.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    slowed = plain / config.factor
    match config.scaling:
        case "default":
            return plain, 1.0
        case "linear":
            return slowed, 1.0
        case "yarn":
            ramp = _yarn_ramp(config, head_dim)
            return slowed * ramp + plain * (1 - ramp), config.attention_factor or 0.1 * math.log(config.factor) + 1
        case "llama3":
            turns = config.original_length * plain / (2 * math.pi)
            span = config.high_freq_factor - config.low_freq_factor
            keep = np.clip((turns - config.low_freq_factor) / span, 0, 1)
            return slowed * (1 - keep) + plain * keep, 1.0


def rope_table(config: RopeConfig, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each (B, T, 1, H/2) in fp32, of integer positions."""
    frequencies, factor = inverse_frequencies(config, head_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each head's pairs (i, i + H/2) turned by the table's angles: Hugging Face's order of the pairs."""
    cos, sin = table
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
