"""The Llama decoder: plain, or with cross-attention spliced into some of its layers."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cepe_jax.checks import check_mask, check_segments, check_tokens
from cepe_jax.config import FLOAT32, Compute, DecoderConfig, Remat
from cepe_jax.model.attention import Mask
from cepe_jax.model.backends import resolved
from cepe_jax.model.cache import Cache
from cepe_jax.model.cross import CrossAttention, Memory
from cepe_jax.model.layers import Block, RMSNorm, at, cut, embed, joined, normal
from cepe_jax.model.lora import Lora, bound, of_parts, parts_of
from cepe_jax.model.parts import Parts
from cepe_jax.model.rope import rope_table
from cepe_jax.sharding import balanced, constrain, in_order, of_two_rows, window_parts

Array = jax.Array


def _not_a_weight(primitive, *_, **__) -> bool:
    """False for what turns a stack into one layer's weights: saved for the backward pass, it would copy the stack."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose")


_INPUT = "input of a layer"
_KEPT_BY_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


def _from_host(body: Callable) -> Callable:
    """Return `body` of an input that the host keeps for the backward pass."""
    return lambda x_BTD, layer: body(checkpoint_name(x_BTD, _INPUT), layer)


def scan_layers(remat: Remat, body: Callable, x_BTD: Array, xs) -> tuple[Array, object]:
    """`body(x, layer) -> (x, ys)` over the layers in `xs`; the backward pass recomputes what `remat` says."""
    match remat:
        case "none":
            body = jax.checkpoint(body, policy=_not_a_weight)
        case "full":
            body = jax.checkpoint(body)
        case "offload":
            body = jax.checkpoint(_from_host(body), policy=_KEPT_BY_HOST)
        case "dots":
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.lax.scan(body, x_BTD, xs)


def positions_in(segments_BT: Array) -> Array:
    """Return the number of tokens before each token in its own text, whose tokens stand together."""
    at_T = jnp.arange(segments_BT.shape[1])
    begins_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    return at_T - jax.lax.cummax(jnp.where(begins_BT, at_T, 0), axis=1)


class Llama(nnx.Module):
    def __init__(self, config: DecoderConfig, compute: Compute = FLOAT32, *, key: Array):
        self.config, self.compute = config, resolved(compute, config.head_dim)
        V, D = config.vocab_size, config.width
        embedding, layers, head = jax.random.split(key, 3)
        self.embed = normal(embedding, (V, D), 0.02, ("vocab", "embed"))
        self.layers = Block(config, key=layers)
        self.lora = nnx.data(config.lora and Lora(self.layers, config.lora, key=layers))
        self.norm = RMSNorm((D,), config.norm_eps, ("embed",))
        if not config.tied_head:
            self.head = normal(head, (V, D), 0.02, ("vocab", "embed"))

    def __call__(self, tokens_BT: Array, token_mask_BT: Array | None = None) -> Array:
        """Logits (B, T, V) in fp32. `token_mask_BT`: true for real tokens; positions count real tokens from 0."""
        hidden_BTD, _ = self.decode(tokens_BT, token_mask_BT=token_mask_BT)
        return self.logits(hidden_BTD)

    def logits(self, hidden_BTD: Array) -> Array:
        """(B, T, V) in fp32 of what `decode` returns."""
        return self.unembedding()(hidden_BTD)

    def unembedding(self) -> Callable[[Array], Array]:
        """`logits`, for use in a loop: its weights are gathered once, before it."""
        weight_VD = constrain((self.embed if self.config.tied_head else self.head)[...], "vocab", None)

        def logits(hidden_BTD: Array) -> Array:
            cast_VD = weight_VD.astype(hidden_BTD.dtype)
            product = partial(jnp.einsum, "BTD,VD->BTV", preferred_element_type=jnp.float32)
            if hidden_BTD.shape[0] > 1:
                return product(hidden_BTD, cast_VD)
            return of_two_rows(lambda hidden_BTD: product(hidden_BTD, cast_VD), hidden_BTD, axis=1)

        return logits

    @property
    def decoder(self) -> "Llama":
        """The model itself, so that every model that generates has a decoder."""
        return self

    @property
    def blocks(self) -> Block:
        """The stack of layers with its factors, if there are any."""
        return bound(self.layers, self.lora)

    @property
    def parts(self) -> Parts:
        return parts_of("decoder", self)

    @classmethod
    def from_parts(cls, parts: Parts) -> "Llama":
        return of_parts("decoder", parts)

    def decode(
        self,
        tokens_BT: Array,
        memory: Memory | None = None,
        cache: Cache | None = None,
        token_mask_BT: Array | None = None,
        *,
        segments_BT: Array | None = None,
        cross: CrossAttention | None = None,
    ) -> tuple[Array, Cache | None]:
        """Hidden states (B, T, D) after the final norm, and the cache with these tokens appended (if one was given).

        A cache of one row is read by all rows of tokens, and is not appended to where they are more than one. Without a
        cache, positions count the real tokens. `segments_BT`, in place of a mask and a cache, are the numbers of the
        texts that a row holds one after another: tokens see and count those of their own text alone. `cross` reads the
        memory in its layers, between self-attention and MLP.
        """
        check_tokens("tokens_BT", tokens_BT, 2, self.config.vocab_size)
        check_mask("token_mask_BT", token_mask_BT, tokens_BT.shape)
        if memory is not None and cross is None:
            raise ValueError("a memory needs a CEPE model: this one is a plain decoder")
        if segments_BT is not None:
            check_segments(segments_BT, tokens_BT.shape)
            if cache is not None or token_mask_BT is not None:
                raise ValueError("segments_BT came with a cache or a mask: give one of them")
        B, T = tokens_BT.shape
        real_BT = jnp.ones(tokens_BT.shape, bool) if token_mask_BT is None else token_mask_BT
        if cache is None or (size := cache.piece(B, T, self.compute.attention)) == T:
            return self._decode(tokens_BT, real_BT, token_mask_BT, segments_BT, memory, cache, cross)

        def step(cache: Cache, piece: tuple[Array, Array]) -> tuple[Cache, Array]:
            tokens_BT, real_BT = piece
            return self._decode(tokens_BT, real_BT, real_BT, None, memory, cache, cross)[::-1]

        pieces = cut(tokens_BT, size), cut(real_BT, size, fill=False)
        grown, hidden = jax.lax.scan(step, cache.repeated(B), pieces)
        return joined(hidden, T), grown if cache.grows_by(B) else cache

    def _decode(
        self,
        tokens_BT: Array,
        real_BT: Array,
        token_mask_BT: Array | None,
        segments_BT: Array | None,
        memory: Memory | None,
        cache: Cache | None,
        cross: CrossAttention | None,
    ) -> tuple[Array, Cache | None]:
        """Return the result of `decode` for tokens that are read in one pass."""
        config, compute = self.config, self.compute
        reading = None if cache is None else cache.reading(config, real_BT)
        if segments_BT is not None:
            positions_BT = positions_in(segments_BT)
        elif reading is None:
            positions_BT = jnp.where(real_BT, jnp.cumsum(real_BT, axis=1) - 1, 0)
        else:
            positions_BT = reading.positions_BT
        # Devices share a window of training in an order of their own, which ends before this returns.
        parts = window_parts(tokens_BT.shape[1]) if cache is None else 1
        tokens = "length" if parts == 1 else "window"
        if parts > 1:
            tokens_BT, positions_BT = (balanced(x_BT, parts) for x_BT in (tokens_BT, positions_BT))
            positions_BT = constrain(positions_BT, "batch", tokens)
        blocks, table = self.blocks, rope_table(config.rope, config.head_dim, positions_BT)
        mask = Mask(causal=True, valid_BS=token_mask_BT, segments_BT=segments_BT, parts=parts)
        grows = cache is not None and cache.grows_by(tokens_BT.shape[0])

        def layer(x_BTD, xs):
            index, block, reader = xs
            attend_kept = read = None
            if cache is not None and not cache.empty:
                attend_kept = partial(reading.attend, index)
            if reader is not None:
                given = {"backend": compute.attention, "differentiable": cache is None}
                read = partial(reader, memory=memory, **given)
            x_BTD, keys = (block or at(blocks, index))(compute, x_BTD, table, mask, attend_kept, read)
            return constrain(x_BTD, "batch", tokens, None), reading.keep(*keys) if grows else None

        def scan(x_BTD, indices, reader=None):
            # Layers are indexed inside the scan: slicing the stack would copy their weights. All of it is scanned over:
            # were it indexed, each step of its backward pass would add to the whole gradient.
            whole = blocks if len(indices) == config.num_layers else None
            return scan_layers(compute.remat.decoder, layer, x_BTD, (indices, whole, reader))

        def group(x_BTD, xs):
            """Layers of which the last one reads."""
            indices, reader = xs
            x_BTD, plain = scan(x_BTD, indices[:-1])
            x_BTD, last = scan(x_BTD, indices[-1:], jax.tree.map(lambda a: a[None], reader))
            return x_BTD, jax.tree.map(lambda *kv: jnp.concatenate(kv), plain, last)

        Z = config.num_layers
        x_BTD = constrain(embed(self.embed, tokens_BT, compute.dtype), "batch", tokens, None)
        if memory is not None and cross.layers.kind == "every":
            groups = jnp.arange(Z).reshape(cross.layers.count, -1)
            x_BTD, of_groups = jax.lax.scan(group, x_BTD, (groups, cross))
            kept = [jax.tree.map(lambda a: a.reshape(Z, *a.shape[2:]), of_groups)]
        else:
            readers, kept = range(Z, Z) if memory is None else cross.layers.indices(Z), []
            for first, end, reader in (
                (0, readers.start, None), (readers.start, readers.stop, cross), (readers.stop, Z, None)
            ):  # fmt: skip
                if first < end:
                    x_BTD, of_layers = scan(x_BTD, jnp.arange(first, end), reader)
                    kept.append(of_layers)
        if grows:
            cache = cache.append(jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept), real_BT)
        hidden_BTD = self.norm(x_BTD)
        if parts > 1:
            hidden_BTD = constrain(in_order(hidden_BTD, parts), "batch", tokens, None)
        return hidden_BTD, cache
