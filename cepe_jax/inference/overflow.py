"""One long prompt in, contexts for the encoder and what the decoder reads out."""

import bisect
import itertools
import re
from typing import Literal

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.tokenizer import Tokenizer

Overflow = Literal["error", "truncate_left", "passages"]
BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")  # what ends a passage; the indent after it is the next one's


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
        raise ValueError(
            f"the last passage has {len(rest(first - 1))} tokens and the window leaves {room} for it: shorten it, or "
            f"cut anywhere, by overflow truncate_left"
        )
    return passages[:first], rest(first)


def room_beside(max_new_tokens: int, window: int) -> int:
    """How many tokens of a prompt fit into the window with BOS and so many new ones; ValueError for none."""
    room = window - max_new_tokens - 1
    if room < 1:
        raise ValueError(
            f"{max_new_tokens} new tokens and BOS leave nothing of the window's {window} for a prompt: ask for fewer"
        )
    return room


def fit(
    prompt: str,
    tokenizer: Tokenizer,
    window: int,
    max_new_tokens: int,
    overflow: Literal["truncate_left", "passages"],
    chunk_length: int,
) -> tuple[list[list[int]], list[int]]:
    """(contexts, BOS and the ids that the decoder reads): with the new tokens they fit into the window.

    ValueError where nothing of the prompt would be left.
    """
    check_chunk_length(chunk_length)
    room = room_beside(max_new_tokens, window)
    if overflow == "truncate_left":
        contexts, ids = truncate_left(tokenizer.encode(prompt), room, chunk_length)
    else:
        texts, ids = by_passages(prompt, tokenizer, room)
        contexts = [tokenizer.encode(text) for text in texts]
    return contexts, [tokenizer.bos_id, *ids]
