"""A text without end, read with constant decoder memory: what overflows the window is encoded, or dropped."""

import os
from collections.abc import Sequence

from cepe_jax.checks import check_chunk_length
from cepe_jax.inference.caches import FULL, Policy, new_cache
from cepe_jax.inference.context import ContextCache, encode, stacked
from cepe_jax.inference.generate import (
    GREEDY,
    Draws,
    Sampling,
    bucket,
    check_cache_fits,
    on_host,
    power_of_two,
    read,
)
from cepe_jax.model.cache import Cache
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama

FEW_LENGTHS = 1 << 10, 1 << 14  # from the first to the second, the memory's room doubles; above it goes by buckets
Read = tuple[Cache, list[int], ContextCache | None]  # a cache, the tokens it has read, and the memory it read beside


def check_head(head: int, window: int | None, chunk_length: int) -> None:
    """ValueError unless the window has room for the head, for one token more, and for a chunk if any is moved."""
    needed = head + 1 + chunk_length
    if window is not None and needed > window:
        raise ValueError(
            f"the system prompt, with what the template puts around it, has {head} tokens and {needed - head} more "
            f"must fit into the window of {window}: shorten it, or lower chunk_length"
        )


class Session:
    """The tokens of a text, and what follows them.

    The decoder reads the first `head` tokens and, in what its window leaves, the last ones. What is between them is in
    `context`, after the passages given at first: when a token more would not fit, the oldest `chunk_length` tokens
    after the head are encoded and appended, and what remains is read anew from position 0. So what follows is what a
    fresh model says of `tokens` and `context`, however the text came about; if the tokens of a piece choose together
    what they read, it also depends on which were one piece. `window` is None if the cache is for texts of any length:
    the decoder then reads the whole text.
    """

    def __init__(
        self,
        model: Cepe | Llama,
        window: int | None,
        head: int,
        chunk_length: int,
        context: ContextCache | None,
        drops: bool = False,
        policy: Policy = FULL,
    ):
        """`context` is None for a plain decoder: then the text ends with the window, or the session `drops` tokens."""
        check_chunk_length(chunk_length)
        check_head(head, window, 0 if context is None and not drops else chunk_length)
        self.model, self.window, self.head, self.chunk_length = model, window, head, chunk_length
        self.ids: list[int] = []  # of the whole text
        self.context, self.moved = context, 0  # and how many chunks of the text the decoder no longer reads
        self._drops, self._policy = drops, policy
        self._given = 0 if context is None else len(context)
        # A few tokens more, filled up to a bucket, always fit.
        self._slots = 0 if window is None else bucket(window) + bucket(1)
        self._grows = window is None and policy.window is None
        self._read: Read | None = None
        self._placed: tuple[ContextCache, Memory | None] | None = None
        self._drawn = 0

    @property
    def tokens(self) -> list[int]:
        """Return what the decoder reads."""
        return self.ids[: self.head] + self.ids[self.head + self.moved * self.chunk_length :]

    def replace(self, ids: Sequence[int]) -> None:
        """The text has these tokens. Chunks that were moved and that it still has, after the head, stay moved."""
        ids = list(ids)
        same = len(os.path.commonprefix([self.ids[self.head :], ids[self.head :]]))
        stay = min(self.moved, same // self.chunk_length, self._overflow(ids))
        context = self.context
        if context is not None and stay < self.moved:
            context = context.select(range(self._given + stay))
        self.context, self.moved, self.ids = context, stay, ids  # together: no interrupt comes between them

    def next(self, sampling: Sampling = GREEDY) -> int:
        """Draws the token that follows. It becomes part of the text when it is appended to `ids`."""
        self._make_room()
        tokens, memory = self.tokens, self._memory()
        if self._read is not None and self._goes_on(self._read, tokens):
            cache, before = self._read[:2]
            self._read = None  # its arrays are given away: if this is interrupted, all is read anew
            fresh = tokens[len(before) :]
            if self._grows and self._room(len(before), len(fresh)) < 0:
                self._take_slots(len(tokens))
                cache = cache.longer(self._slots)
        else:
            self._read = None  # freed before there is another
            if self._grows:
                self._take_slots(len(tokens))
            cache, fresh = new_cache(self.model.decoder, self._policy, 1, self._slots), tokens
        draws = Draws.of([sampling]).at(self._drawn)
        drawn_B1, cache = read(self.model, [fresh], memory, cache, draws, self._policy)
        token = int(on_host(drawn_B1)[0])
        self._read, self._drawn = (cache, tokens, self.context), self._drawn + 1
        return token

    def _memory(self) -> Memory | None:
        """Return the decoder's memory. It has few lengths: each is a program to compile, while a user waits."""
        if self.context is None:
            return None
        if self._placed is None or self._placed[0] is not self.context:
            self._placed = None  # freed before there is another
            count = self.context.num_tokens
            least = min(max(power_of_two(count), FEW_LENGTHS[0]), FEW_LENGTHS[1])
            self._placed = self.context, stacked([self.context], max(bucket(count), least))
        return self._placed[1]

    def _goes_on(self, read: Read, tokens: list[int]) -> bool:
        """Return True if a cache has read a beginning of `tokens` beside this memory and has room for the rest."""
        _, before, context = read
        fresh = len(tokens) - len(before)
        fits = self._grows or self._policy.window is not None or self._room(len(before), fresh) >= 0
        return context is self.context and fresh > 0 and fits and tokens[: len(before)] == before

    def _room(self, before: int, fresh: int) -> int:
        """Return how many slots are left after these tokens."""
        return self._slots - before - (1 if fresh == 1 else bucket(fresh))

    def _take_slots(self, count: int) -> None:
        """Take twice as many slots as there are tokens, or raise ValueError: a cache is seldom made longer."""
        slots = bucket(2 * count) + bucket(1)
        check_cache_fits(self.model, self._policy, 1, slots)
        self._slots = slots

    def _overflow(self, ids: list[int]) -> int:
        """Return how many chunks of a text must be moved so that one token more fits into the window."""
        over = 0 if self.window is None else max(0, len(ids) + 1 - self.window)
        return -(-over // self.chunk_length)

    def _make_room(self) -> None:
        needed = self._overflow(self.ids)
        if needed <= self.moved:
            return
        if self.context is None and not self._drops:
            raise ValueError(
                f"the conversation has {len(self.ids)} tokens and the window of this plain decoder {self.window}: "
                f"start another one, or let overflow truncate_left drop its oldest tokens"
            )
        context = self.context
        if context is not None:
            starts = [self.head + chunk * self.chunk_length for chunk in range(self.moved, needed)]
            chunks = [self.ids[start : start + self.chunk_length] for start in starts]
            context += encode(self.model, chunks, context.identity, self.chunk_length, known=context)
        self.context, self.moved = context, needed
