"""Attention over masked keys, in one pass or merged from partial results."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cepe_jax.sharding import of_two_rows, split_axes

NEVER = jnp.finfo(jnp.float32).min  # score of a key that a query does not see

# Values weighted by exp(score - peak) (B, T, K, G, H); the sum of the weights and the peak (B, T, K, G, 1 each).
Partial = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """The keys that a query sees. `valid_BS`: true for keys that exist. `causal`: query i sees keys up to i.

    `segments_BT`: the text of each token, where queries and keys are tokens of several texts and see those of their own
    text alone. `seen_BTS` is true if a query sees a key; only XLA's attention supports it. `parts`: the number of
    devices that share the tokens of a causal window, which are queries and keys in the order of `balanced`; the arrays
    of the mask are in the window's own order.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    valid_BS: jax.Array | None = None
    segments_BT: jax.Array | None = None
    seen_BTS: jax.Array | None = None
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def may_hide_all(self) -> bool:
        """True if a query may see no key at all."""
        return self.valid_BS is not None or self.seen_BTS is not None

    @property
    def hides_some(self) -> bool:
        """True if a query may not see all keys."""
        return self.causal or self.segments_BT is not None or self.may_hide_all

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Boolean (B or 1, 1, 1, T, S)."""
        seen = jnp.ones((1, 1, 1, num_queries, num_keys), bool)
        if self.causal:
            seen &= jnp.tril(seen)
        if self.valid_BS is not None:
            seen &= self.valid_BS[:, None, None, None, :]
        if self.segments_BT is not None:
            seen &= same_segment(self.segments_BT, self.segments_BT)[:, None, None]
        if self.seen_BTS is not None:
            seen &= self.seen_BTS[:, None, None]
        return seen


def same_segment(of_queries_BT: jax.Array, of_keys_BS: jax.Array) -> jax.Array:
    """Return (B, T, S), true for a query and a key of one text."""
    return of_queries_BT[:, :, None] == of_keys_BS[:, None]


def attend_partial(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> Partial:
    """Unnormalised attention over some of the keys, to be merged with `merge`.

    Scores are scaled by 1 / sqrt(H); softmax arithmetic is fp32, or fp64 of fp64. A query without any valid key has
    sum 0. Keys (not causal) and mask of one row serve the queries of all rows.
    """
    return attend_to_cache(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask)


def attend_to_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> Partial:
    """Attend as `attend_partial` does, to keys and values as a cache holds them."""
    B, T, N, H = q_BTNH.shape
    rows, K = k_BKSH.shape[:2]
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(rows, B // rows * T, K, N // K, H), 1, 3)

    def by_query(part_BKGTX: jax.Array) -> jax.Array:
        return jnp.moveaxis(part_BKGTX, 3, 1).reshape(B, T, K, N // K, -1)

    return tuple(map(by_query, attend_to_heads(q_BKGTH, k_BKSH, v_BKSH, mask, H**-0.5)))


# Left to itself, the derivative keeps several arrays of the scores' size, and turns them around for its products: on a
# CPU it takes two to three times as long. Here the scores are computed again, and each product has keys last in them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_to_heads(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, scale: float) -> Partial:
    """Attend as `attend_partial` does, by key head: values (B, K, G, T, H), sums and peaks (B, K, G, T, 1)."""
    scores_BKQS = _scores(q_BKGTH, k_BKSH, mask, scale)
    peak_BKQ1 = scores_BKQS.max(axis=-1, keepdims=True)
    weights_BKQS = jnp.exp(scores_BKQS - peak_BKQ1)
    sums_BKQ1 = weights_BKQS.sum(axis=-1, keepdims=True)
    values_BKQH = _product("BKQS,BKSH->BKQH", weights_BKQS.astype(v_BKSH.dtype), v_BKSH)
    values_BKQH, sums_BKQ1 = _seen_alone(mask, peak_BKQ1, values_BKQH, sums_BKQ1)
    return tuple(x.reshape(*q_BKGTH.shape[:4], -1) for x in (values_BKQH, sums_BKQ1, peak_BKQ1))


def _queries(x_BKGTX: jax.Array) -> jax.Array:
    """(B, K, Q, X): of an operand with two axes of queries XLA would turn the other operand around."""
    return x_BKGTX.reshape(*x_BKGTX.shape[:2], -1, x_BKGTX.shape[-1])


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: Mask, scale: float) -> jax.Array:
    scores_BKQS = _product("BKQH,BKSH->BKQS", _queries(q_BKGTH), k_BKSH) * scale
    if not mask.hides_some:
        return scores_BKQS
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    scores_BKGTS = scores_BKQS.reshape(*q_BKGTH.shape[:4], S)
    return _queries(jnp.where(mask.dense(T, S), scores_BKGTS, NEVER))


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))
    # One device turns the keys of several texts around for a query of each, several devices all that they share.
    if split_axes("heads") or (left.shape[0] > 1 and equation.endswith("S")):
        return of_two_rows(lambda left: product(left, right), left, axis=2)
    return product(left, right)


def _seen_alone(mask: Mask, peak: jax.Array, *parts: jax.Array) -> list[jax.Array]:
    """The parts, zero for queries without a valid key: the exponentials of their scores are all 1."""
    return [part if not mask.may_hide_all else jnp.where(peak == NEVER, 0, part) for part in parts]


def _attend_to_heads_forward(*inputs):
    parts = attend_to_heads(*inputs)
    return parts, (inputs[:4], parts[2])


def _attend_to_heads_backward(scale: float, residuals, cotangents: Partial):
    """The derivative for constant peaks: what is made of the parts does not depend on them."""
    (q_BKGTH, k_BKSH, v_BKSH, mask), peak_BKGT1 = residuals
    q_BKQH, peak_BKQ1 = _queries(q_BKGTH), _queries(peak_BKGT1)
    of_values_BKQH, of_sums_BKQ1 = _seen_alone(mask, peak_BKQ1, *map(_queries, cotangents[:2]))
    of_values_BKQH = of_values_BKQH.astype(v_BKSH.dtype)
    weights_BKQS = jnp.exp(_scores(q_BKGTH, k_BKSH, mask, scale) - peak_BKQ1)
    of_weights_BKQS = _product("BKQH,BKSH->BKQS", of_values_BKQH, v_BKSH) + of_sums_BKQ1
    of_scores_BKQS = (weights_BKQS * of_weights_BKQS * scale).astype(q_BKQH.dtype)
    of_q_BKQH = jnp.einsum("BKQS,BKSH->BKQH", of_scores_BKQS, k_BKSH)
    of_k_BKHS = jnp.einsum("BKQH,BKQS->BKHS", q_BKQH, of_scores_BKQS)
    of_v_BKHS = jnp.einsum("BKQH,BKQS->BKHS", of_values_BKQH, weights_BKQS.astype(v_BKSH.dtype))
    return of_q_BKQH.reshape(q_BKGTH.shape), of_k_BKHS.swapaxes(2, 3), of_v_BKHS.swapaxes(2, 3), None


attend_to_heads.defvjp(_attend_to_heads_forward, _attend_to_heads_backward)


def combine(*parts: Partial) -> Partial:
    """The unnormalised attention over the union of the parts' keys."""
    peak = functools.reduce(jnp.maximum, [peak for _, _, peak in parts])
    scales = [jnp.exp(p - peak) for _, _, p in parts]
    values = sum(v * scale for (v, _, _), scale in zip(parts, scales, strict=True))
    total = sum(t * scale for (_, t, _), scale in zip(parts, scales, strict=True))
    return values, total, peak


def combine_scanned(part: Callable[[jax.Array], Partial], starts: jax.Array) -> Partial:
    """Combine `part(start)` over all starts, one at a time."""
    values, total, peak = jax.eval_shape(part, starts[0])
    nothing = jnp.zeros(values.shape, values.dtype), jnp.zeros(total.shape, total.dtype)
    lowest = jnp.full(peak.shape, NEVER, peak.dtype)
    step = jax.checkpoint(lambda seen, start: (combine(seen, part(start)), None))
    return jax.lax.scan(step, (*nothing, lowest), starts)[0]


def combine_over(mesh_axes: tuple[str, ...], part: Partial) -> Partial:
    """Return what `combine` gives of the parts that the devices along these axes hold; inside of a shard_map."""
    values, total, peak = part
    highest = jax.lax.pmax(jax.lax.stop_gradient(peak), mesh_axes)
    scale = jnp.exp(peak - highest)
    return *jax.lax.psum((values * scale, total * scale), mesh_axes), highest


def merge(*parts: Partial) -> jax.Array:
    """The attention over the union of the parts' keys, (B, T, N, H) in fp32; zero for a query with no valid key."""
    values, total, _ = combine(*parts)
    nothing = total == 0  # not `total > 0`: a NaN must stay one
    out = jnp.where(nothing, 0.0, values / jnp.where(nothing, 1.0, total))
    B, T, K, G, H = out.shape
    return out.reshape(B, T, K * G, H)
