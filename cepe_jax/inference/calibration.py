"""The scores of a decoder's heads by which RazorAttention selects those that keep all tokens (its section 3.2).

The decoder reads BOS and a block of random tokens four times. The echo score of a head is its attention from a token to
the same token in the blocks before, the induction score that to the tokens after these.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import Dtype
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.devices import Devices, on_devices
from cepe_jax.directories import write_text
from cepe_jax.inference.caches.retrieval_heads import FILE, Scores
from cepe_jax.inference.text import read_facts
from cepe_jax.model.attention import Mask, attend_partial, merge
from cepe_jax.model.layers import at, cut, embed, joined
from cepe_jax.model.llama import Llama
from cepe_jax.model.rope import rope_table, rotate
from cepe_jax.parsing import Seed
from cepe_jax.weights.source import open_ours

Array = jax.Array
REPEATS = 4  # of the block
BLOCK = 2500  # tokens of the block, as many as the paper reads
QUERIES = 128  # whose scores exist at once


@dataclass(frozen=True)
class CalibrateConfig:
    model: Path  # a decoder or a CEPE model in this package's format; the first argument without a name
    tokenizer: Path | None = None  # its file or directory; None: beside the model
    block: int | None = None  # random tokens, which are read four times; None: 2,500, or as many as the model can read
    seed: Seed = 0  # draws the tokens
    dtype: Dtype = "float32"  # type of weights and activations
    mesh: Devices = Devices()  # how devices share the model

    POSITIONALS = ("model",)

    def __post_init__(self):
        if self.block is not None and self.block < 2:
            raise ValueError(f"block is {self.block}: give 2 tokens or more")


@partial(jax.jit, static_argnames="block")
def head_scores(decoder: Llama, tokens_T: Array, block: int) -> tuple[Array, Array]:
    """Return induction and echo scores of all query heads, (Z, N) each.

    The tokens are BOS and a block, repeated; a score is the mean over all tokens after the first block. Attention to
    BOS counts in the softmax and in no score.
    """
    config, blocks, T = decoder.config, decoder.blocks, len(tokens_T)
    table = rope_table(config.rope, config.head_dim, jnp.arange(T)[None])

    def layer(x_1TD: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        of_layer = at(blocks, index)
        q_1TNH, k_1TKH, v_1TKH = of_layer.attention.heads(of_layer.attention_norm(x_1TD))
        q_1TNH, k_1TKH = rotate(q_1TNH, table), rotate(k_1TKH, table)

        def piece(given: tuple[Array, Array]) -> tuple[Array, Array]:
            q_1QNH, positions_1Q = given
            seen_1QT = positions_1Q[..., None] >= jnp.arange(T)
            read = attend_partial(q_1QNH, k_1TKH, v_1TKH, Mask(seen_BTS=seen_1QT))
            return merge(read), (jnp.log(read[1]) + read[2]).reshape(q_1QNH.shape[:3])

        out, lse = jax.lax.map(piece, (cut(q_1TNH, QUERIES), cut(jnp.arange(T)[None], QUERIES)))
        out_1TNH, lse_1TN = joined(out, T), joined(lse, T)
        x_1TD += of_layer.attention.joined_heads(out_1TNH.astype(x_1TD.dtype))
        x_1TD += of_layer.mlp(of_layer.mlp_norm(x_1TD))

        def attention_to(distance: int, first: int) -> Array:
            """Return the sum over tokens from `first` on of the attention to the token so far before, (N,)."""
            q_SNH, lse_SN = q_1TNH[0, first:], lse_1TN[0, first:]
            k_SNH = jnp.repeat(k_1TKH[0, first - distance : T - distance], q_SNH.shape[1] // k_1TKH.shape[2], axis=1)
            wide = (x.astype(lse_SN.dtype) for x in (q_SNH, k_SNH))
            scores_SN = jnp.einsum("SNH,SNH->SN", *wide) * config.head_dim**-0.5
            return jnp.exp(scores_SN - lse_SN).sum(axis=0)

        counted = T - 1 - block
        before = range(block, T - 1, block)
        echo_N = sum(attention_to(distance, 1 + distance) for distance in before) / counted
        induction_N = sum(attention_to(distance - 1, 1 + distance) for distance in before) / counted
        return x_1TD, (induction_N, echo_N)

    x_1TD = embed(decoder.embed, tokens_T[None], decoder.compute.dtype)
    return jax.lax.scan(layer, x_1TD, jnp.arange(config.num_layers))[1]


def random_tokens(tokenizer: Tokenizer, positions: int | None, block: int | None, seed: int) -> np.ndarray:
    """Return BOS and a block of different tokens of text, repeated; ValueError if they are too many."""
    ends = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special.values()}
    ids = np.array([number for number in range(tokenizer.vocab_size) if number not in ends])
    most = len(ids) if positions is None else min(len(ids), (positions - 1) // REPEATS)
    if block is not None and block > most:
        raise ValueError(f"block is {block}: give at most {most}, for the model reads it {REPEATS} times")
    if most < 2:
        raise ValueError(f"{positions} positions and {len(ids)} tokens leave no room for {REPEATS} blocks of 2 tokens")
    drawn = np.random.default_rng(seed).choice(ids, min(most, BLOCK) if block is None else block, replace=False)
    return np.array([tokenizer.bos_id, *np.tile(drawn, REPEATS)], np.int32)


def calibrate(config: CalibrateConfig) -> None:
    """Write the scores of the key heads of a model beside it, and print the largest."""
    base = open_ours(config.model).base_hash
    facts = read_facts(config.model, config.tokenizer)
    tokens_T = random_tokens(facts.tokenizer, facts.window, config.block, config.seed)
    block = (len(tokens_T) - 1) // REPEATS
    with on_devices(config.mesh):
        decoder = facts.load(config.dtype).model.decoder
        by_query_ZN = head_scores(decoder, tokens_T, block)
    sizes = decoder.config.num_layers, decoder.config.num_kv_heads, -1
    # Query heads share the keys: what one of them retrieves, the key head must keep.
    induction_ZK, echo_ZK = (np.asarray(x, np.float64).reshape(sizes).max(axis=-1) for x in by_query_ZN)
    if not (np.isfinite(induction_ZK).all() and np.isfinite(echo_ZK).all()):
        raise ValueError(f"scores of {config.model} are not finite: its weights may be damaged, compare its hashes")
    scores = Scores(base, block, config.seed, induction_ZK.round(6).tolist(), echo_ZK.round(6).tolist())
    write_text(config.model / FILE, json.dumps(asdict(scores)) + "\n")
    for name, scores_ZK in {"induction": induction_ZK, "echo": echo_ZK}.items():
        order = np.argsort(-scores_ZK, axis=None, kind="stable")[:8]
        best = ", ".join(f"{z}.{k} {scores_ZK[z, k]:.3f}" for z, k in (divmod(i, sizes[1]) for i in order.tolist()))
        print(f"{name}: {best}")
    print(f"{config.model / FILE}: {scores_ZK.size} heads, written (above: layer.head and score of the largest)")
