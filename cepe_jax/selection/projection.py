"""A random projection whose matrix of signs is made in blocks, from the seed and a block's number, and never stored."""

import jax
import jax.numpy as jnp

BLOCK = 1024  # rows of the matrix that exist at once; another number is another matrix
WORD = 32  # signs that one draw of 32 bits gives


def signs(seed: int, block: jax.Array | int, dim: int) -> jax.Array:
    """Return block number `block` of the matrix: (BLOCK, dim), +1 or -1 with probability 1/2 each (Rademacher)."""
    key = jax.random.fold_in(jax.random.key(seed), block)
    words = jax.random.bits(key, (BLOCK, -(-dim // WORD), 1), jnp.uint32)
    bits = (words >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return 2.0 * bits.reshape(BLOCK, -1)[:, :dim] - 1.0


def project(vectors_BP: jax.Array, dim: int, seed: int) -> jax.Array:
    """Return the vectors in `dim` dimensions (B, dim), fp32: their products with the matrix, divided by sqrt(dim).

    Lengths and inner products are kept in expectation (Johnson and Lindenstrauss 1984; Achlioptas 2003).
    """
    B, P = vectors_BP.shape
    blocks = -(-P // BLOCK)
    padded = jnp.pad(vectors_BP.astype(jnp.float32), ((0, 0), (0, blocks * BLOCK - P)))

    def add(total_BF: jax.Array, block: jax.Array):
        rows = jax.lax.dynamic_slice_in_dim(padded, block * BLOCK, BLOCK, axis=1)
        return total_BF + jnp.matmul(rows, signs(seed, block, dim), precision="highest"), None

    total_BF, _ = jax.lax.scan(add, jnp.zeros((B, dim), jnp.float32), jnp.arange(blocks))
    return total_BF * dim**-0.5


def projection_flops(parameters: int, dim: int) -> float:
    """Return the FLOPs of the projection of one vector."""
    return 2.0 * parameters * dim
