"""StreamingLLM (Xiao et al. 2023): a text of any length, read with the keys of its first tokens and of its last ones.

Positions are those in the cache, not in the text. Attention knows distances alone: the last tokens have their own, and
from the first ones, the sinks, no token is further away than the cache is long. So blocks of tokens are read at once,
each by keys near by and by the sinks, with other angles for both, merged by log-sum-exp.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cepe_jax.config import DecoderConfig
from cepe_jax.model.attention import Mask, attend_partial, merge
from cepe_jax.model.layers import at, cut, embed, joined, project
from cepe_jax.model.llama import Llama
from cepe_jax.model.rope import rope_table, rotate

Array = jax.Array
BLOCK = 256  # tokens that are read at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RollingCache:
    """Keys that are not rotated, and values, of every layer in S slots: the sinks, then the last tokens, in a ring.

    `read_B`: how many tokens each row has read. What comes later is written over the oldest of the ring.
    """

    k_ZBSKH: Array
    v_ZBSKH: Array
    read_B: Array
    empty = False  # its slots are masked where there is nothing yet

    @classmethod
    def create(cls, config: DecoderConfig, batch: int, slots: int) -> "RollingCache":
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        return self.k_ZBSKH.shape[2]

    def grows_by(self, rows: int) -> bool:
        """Whether tokens of so many rows are appended: a cache of one row is read by several and stays as it is."""
        return len(self.read_B) == rows

    def repeated(self, rows: int) -> "RollingCache":
        """A cache of one row, `rows` times."""
        k, v = (jnp.repeat(x, rows, axis=1) for x in (self.k_ZBSKH, self.v_ZBSKH))
        return RollingCache(k, v, jnp.repeat(self.read_B, rows))

    def append(self, k_ZBTKH: Array, v_ZBTKH: Array, real_BT: Array, sinks: int) -> "RollingCache":
        token_BT = self.read_B[:, None] + jnp.arange(real_BT.shape[1])
        slot_BT = jnp.where(token_BT < sinks, token_BT, sinks + (token_BT - sinks) % (self.slots - sinks))
        where = slice(None), jnp.arange(len(real_BT))[:, None], jnp.where(real_BT, slot_BT, self.slots)
        k_ZBSKH = self.k_ZBSKH.at[where].set(k_ZBTKH, mode="drop")
        v_ZBSKH = self.v_ZBSKH.at[where].set(v_ZBTKH, mode="drop")
        return RollingCache(k_ZBSKH, v_ZBSKH, self.read_B + real_BT.sum(axis=1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Near(Mask):
    """Keys less than `reach` tokens before a query. The first of `queries`, in turn, stands `age_BS` tokens after."""

    age_BS: Array | None = None
    queries: int = dataclasses.field(default=0, metadata={"static": True})
    reach: int = dataclasses.field(default=0, metadata={"static": True})

    def dense(self, num_queries: int, num_keys: int) -> Array:
        distance_BTS = jnp.arange(num_queries)[:, None] % self.queries + self.age_BS[:, None, :]
        return super().dense(num_queries, num_keys) & (distance_BTS < self.reach)[:, None, None]


class StreamingLlama(Llama):
    """A decoder that keeps the keys and values of `window` tokens, the first `sinks` of the text and the last ones."""

    def __init__(self, decoder: Llama, window: int, sinks: int):
        if not 0 < sinks < window:
            raise ValueError(f"sinks is {sinks} and the window {window}: give 1 sink or more, and a larger window")
        self.config, self.window, self.sinks = decoder.config, window, sinks
        self.embed, self.layers, self.norm = decoder.embed, decoder.layers, decoder.norm
        if not decoder.config.tied_head:
            self.head = decoder.head

    def new_cache(self, batch: int, slots: int) -> RollingCache:
        """An empty one. It never has more slots than the window has tokens, however many are asked for."""
        return RollingCache.create(self.config, batch, self.window)

    def decode(
        self,
        tokens_BT: Array,
        token_mask_BT: Array | None = None,
        cache: RollingCache | None = None,
        memory: None = None,
    ) -> tuple[Array, RollingCache]:
        """Hidden states (B, T, D) after the final norm, and the cache with these tokens. Rows are padded on the right.

        A cache of one row is read by all rows of tokens, and is not appended to where they are more than one.
        """
        B, T = tokens_BT.shape
        cache = self.new_cache(B, self.window) if cache is None else cache
        real_BT = jnp.ones((B, T), bool) if token_mask_BT is None else token_mask_BT
        size = min(T, BLOCK, self.window - self.sinks)
        if size == T:
            return self._block(tokens_BT, real_BT, cache)
        grows = cache.grows_by(B)
        step = lambda cache, block: self._block(*block, cache)[::-1]  # noqa: E731
        blocks = cut(tokens_BT, size), cut(real_BT, size, fill=False)
        grown, hidden = jax.lax.scan(step, cache if grows else cache.repeated(B), blocks)
        return joined(hidden, T), grown if grows else cache

    def _block(self, tokens_BT: Array, real_BT: Array, cache: RollingCache) -> tuple[Array, RollingCache]:
        """What `decode` says, of tokens that all see each other's past."""
        config, T, sinks, recent = self.config, tokens_BT.shape[1], self.sinks, self.window - self.sinks
        read_B1 = cache.read_B[:, None]
        age_BS = 1 + (read_B1 - sinks - 1 - jnp.arange(recent)) % recent  # of the ring's, as the first new one comes
        near = Near(valid_BS=jnp.arange(recent) < read_B1 - sinks, age_BS=age_BS, queries=T, reach=recent)
        first, own = Mask(valid_BS=jnp.arange(sinks) < read_B1), Mask(causal=True, valid_BS=real_BT)
        positions = {  # of what is near, those in the cache and the block, so that they stay small
            "new": recent + jnp.arange(T)[None],
            "old": recent - age_BS,
            "far": jnp.minimum(read_B1 + jnp.arange(T), self.window - 1),
            "sinks": jnp.arange(sinks)[None],
        }
        tables = {name: rope_table(config.rope, config.head_dim, at_BT) for name, at_BT in positions.items()}

        def layer(x_BTD: Array, index: Array):
            block = at(self.layers, index)
            weights, y_BTD = block.attention, block.attention_norm(x_BTD)
            q_BTNH = project("BTD,DNH->BTNH", y_BTD, weights.q)
            k_BTKH, v_BTKH = (project("BTD,DKH->BTKH", y_BTD, weight) for weight in (weights.k, weights.v))
            k_BSKH, v_BSKH = at(cache.k_ZBSKH, index), at(cache.v_ZBSKH, index)

            def part(of_queries: str, of_keys: str, k_BSKH: Array, v_BSKH: Array, mask: Mask):
                return attend_partial(rotate(q_BTNH, tables[of_queries]), rotate(k_BSKH, tables[of_keys]), v_BSKH, mask)

            out_BTNH = merge(
                part("new", "new", k_BTKH, v_BTKH, own),
                part("new", "old", k_BSKH[:, sinks:], v_BSKH[:, sinks:], near),
                part("far", "sinks", k_BSKH[:, :sinks], v_BSKH[:, :sinks], first),
            )
            x_BTD = x_BTD + project("BTNH,NHD->BTD", out_BTNH.astype(x_BTD.dtype), weights.o)
            return x_BTD + block.mlp(block.mlp_norm(x_BTD)), (k_BTKH, v_BTKH)

        x_BTD, kv = jax.lax.scan(layer, embed(self.embed, tokens_BT, config.dtype), jnp.arange(config.num_layers))
        return self.norm(x_BTD), cache.append(*kv, real_BT, sinks) if cache.grows_by(len(tokens_BT)) else cache
