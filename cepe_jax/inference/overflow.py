"""One long prompt in, contexts for the encoder and what the decoder reads out; a plain decoder drops the contexts."""

import bisect
import itertools
import os
import re
from collections.abc import Sequence
from typing import Literal, get_args

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.caches import Policy

Overflow = Literal["error", "truncate_left", "passages"]
BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")  # what ends a passage; the indent after it is the next one's


class TooLong(ValueError):
    """New tokens leave no room for the prompt, or its last passage is too long: no overflow mode makes it fit."""


def truncate_left(ids: list[int], room: int, chunk_length: int) -> tuple[list[list[int]], list[int]]:
    """The last `room` ids, and before them what overflows, in contexts of `chunk_length`, the first one maybe shorter.

    Contexts and the ids that stay are, one after another, all ids.
    """
    end = max(0, len(ids) - room)
    bounds = sorted({0, *range(end % chunk_length, end + 1, chunk_length)})
    return [ids[a:b] for a, b in itertools.pairwise(bounds)], ids[end:]


def passages_of(text: str) -> list[str]:
    """The text cut after blank lines: the passages joined are the text."""
    bounds = sorted({0, *(found.end() for found in BLANK_LINES.finditer(text)), len(text)})
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def by_passages(text: str, tokenizer: Tokenizer, room: int) -> tuple[list[str], list[int]]:
    """Ids of the last whole passages that fit into `room`, and the passages before them, as few as can be."""
    passages = passages_of(text)

    def rest(first: int) -> list[int]:
        return tokenizer.encode("".join(passages[first:]))

    first = bisect.bisect_left(range(len(passages)), True, key=lambda first: len(rest(first)) <= room)
    if passages and first == len(passages):
        raise TooLong(
            f"the last passage has {len(rest(first - 1))} tokens and the window leaves {room} for it: shorten it, or "
            f"cut anywhere, by overflow truncate_left"
        )
    return passages[:first], rest(first)


def check_has_window(window: int | None) -> None:
    """ValueError where nothing says how much fits."""
    if window is None:
        raise ValueError(
            "nothing says how many tokens the decoder reads at most: give window, or in the model's config.json "
            "max_position_embeddings"
        )


def check_moves(cache: Policy, overflow: Overflow) -> None:
    """Raise ValueError if `overflow` moves tokens and the cache keeps all of a text of any length."""
    if overflow != "error" and cache.any_length and cache.window is None:
        raise ValueError(f"overflow is {overflow}, and the cache keeps texts of any length: leave overflow out")


def check_encoder(overflow: Overflow, has_encoder: bool) -> None:
    """ValueError where this mode gives an encoder something to read and there is none."""
    if overflow == "passages" and not has_encoder:
        raise ValueError("overflow is passages, which wants a CEPE model: for a plain decoder give truncate_left")


def begun(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of the text after what a text begins with; BOS where that is nothing at all: a decoder reads a token."""
    return [*tokenizer.begin, *tokenizer.encode(text)] or [tokenizer.bos_id]


def room_beside(new: int, window: int | None, begin: Sequence[int] = ()) -> int | None:
    """Return the number of tokens of a prompt that fit into a window of positions, between `begin` and `new` tokens.

    The last new token takes no position: nothing is read after it. None: no bound is known. TooLong if none fit.
    """
    if window is None:
        return None
    room = window + 1 - new - len(begin)
    if room < 1:
        bos = " and BOS" if begin else ""
        raise TooLong(f"{new} new tokens{bos} leave nothing of the window's {window} for a prompt: ask for fewer")
    return room


def fits(length: int, new: int, window: int | None) -> bool:
    """Return True if a prompt of this length has room beside the new tokens."""
    return window is None or (new <= window and length <= room_beside(new, window))


def fit(
    prompt: str, tokenizer: Tokenizer, window: int | None, max_new_tokens: int, overflow: Overflow, chunk_length: int
) -> tuple[list[list[int]], list[int]]:
    """(contexts, ids that the decoder reads): with the new tokens they fit into the window.

    ValueError where they do not, or where nothing of the prompt would be left.
    """
    if not _moves(overflow, window, chunk_length):
        ids = begun(prompt, tokenizer)
        if not fits(len(ids), max_new_tokens, window):
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the window of {window} tokens: "
                f"shorten the prompt or ask for fewer, or let overflow truncate_left cut it"
            )
        return [], ids
    room = room_beside(max_new_tokens, window, tokenizer.begin)
    if overflow == "truncate_left":
        contexts, ids = truncate_left(tokenizer.encode(prompt), room, chunk_length)
    else:
        texts, ids = by_passages(prompt, tokenizer, room)
        contexts = [tokenizer.encode(text) for text in texts]
    return contexts, [*tokenizer.begin, *ids] or [tokenizer.bos_id]


def fit_continued(
    prompt: str,
    continuations: Sequence[str],
    tokenizer: Tokenizer,
    window: int | None,
    overflow: Overflow,
    chunk_length: int,
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """(contexts, ids that the decoder reads, ids of each continuation): the longest one fits into the window beside.

    The prompt is tokenised with each continuation. All continuations begin where the first of them changes the
    prompt's tokens, and no later than spaces at its end: with what is read before, the ids of each are those of the
    whole text. ValueError for an empty continuation, and where they do not fit.
    """
    for number, continuation in enumerate(continuations):
        if not continuation:
            raise ValueError(f"continuation {number} is empty: leave it out")
    contexts, (before, after) = [], _cut(prompt, continuations, tokenizer)
    if _moves(overflow, window, chunk_length):
        room = room_beside(max(map(len, after)), window, tokenizer.begin)
        if overflow == "truncate_left":
            begin = len(tokenizer.begin)
            contexts, rest = truncate_left(before[begin:], room, chunk_length)
            before = [*before[:begin], *rest]
        else:
            texts, _ = by_passages(prompt.rstrip(), tokenizer, room)
            contexts = [tokenizer.encode(text) for text in texts]
            before, after = _cut(prompt[sum(map(len, texts)) :], continuations, tokenizer)
    for number, ids in enumerate(after):
        if not fits(len(before), len(ids), window):
            raise ValueError(
                f"prompt and continuation {number} have {len(before) + len(ids)} tokens and the window {window}: "
                f"shorten the prompt, or let overflow truncate_left cut it"
            )
    return contexts, before, after


def cut(
    prompt: str, tokenizer: Tokenizer, window: int, max_new_tokens: int, chunk_length: int
) -> tuple[list[list[int]], list[int], int]:
    """Return (contexts, ids, new tokens) of what is TooLong for `fit`: by truncate_left, the new tokens as many as fit.

    Of more new tokens than the window has room for there are as many as fit beside the prompt, at least half a window.
    """
    ids, most = tokenizer.encode(prompt), room_beside(0, window, tokenizer.begin)
    new = max_new_tokens if max_new_tokens < most else max(most - max(len(ids), 1), most // 2)
    contexts, ids = truncate_left(ids, room_beside(new, window, tokenizer.begin), chunk_length)
    return contexts, [*tokenizer.begin, *ids] or [tokenizer.bos_id], new


def cut_continued(
    prompt: str, continuation: str, tokenizer: Tokenizer, window: int, chunk_length: int
) -> tuple[list[list[int]], list[int], list[int]]:
    """Return (contexts, ids, ids that follow) of what is TooLong for `fit_continued`: the window ends with the text.

    Of a continuation that is longer than the window the last tokens follow, and one is read before them.
    """
    before, (after,) = _cut(prompt, [continuation], tokenizer)
    begin = len(tokenizer.begin)
    contexts, kept = truncate_left([*before[begin:], *after], room_beside(0, window, tokenizer.begin), chunk_length)
    following = min(len(after), room_beside(1, window, tokenizer.begin))
    return contexts, [*before[:begin], *kept[:-following]], kept[-following:]


def _moves(overflow: Overflow, window: int | None, chunk_length: int) -> bool:
    """Return True if this mode may give a part of the prompt to the encoder; ValueError if it cannot know which."""
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow {overflow!r}: choose {', '.join(get_args(Overflow))}")
    if overflow == "error":
        return False
    check_has_window(window)
    check_chunk_length(chunk_length)
    return True


def _cut(prompt: str, continuations: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """The ids that all wholes of prompt and continuation begin with, BOS for none, and what follows them in each."""
    wholes = [begun(prompt + continuation, tokenizer) for continuation in continuations]
    before = os.path.commonprefix([begun(prompt.rstrip(), tokenizer), *wholes])
    return before or [tokenizer.bos_id], [whole[len(before) :] for whole in wholes]
