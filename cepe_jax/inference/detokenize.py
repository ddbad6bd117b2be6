"""Tokens to text while they come: no torn characters, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from cepe_jax.data.tokenizer import Tokenizer

TORN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
MOST_TORN = 3  # of these, that bytes still to come may make a character of: UTF-8 has at most four bytes


class Detokenizer:
    """The text that follows a prompt, piece by piece; the pieces joined are the decoding of all tokens after it.

    A character is given out when all its bytes have come, and what can no longer become one as the decoder gives it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._left = list(prompt)  # what is to the left decides on spaces, so it is decoded too
        self._held: list[int] = []
        self._given = len(tokenizer.decode(self._left))  # characters of the text of both

    def add(self, token: int) -> str:
        self._held.append(token)
        text = self._tokenizer.decode(self._left + self._held)
        return self._give(text, len(text) - min(len(text) - len(text.rstrip(TORN)), MOST_TORN))

    def end(self) -> str:
        text = self._tokenizer.decode(self._left + self._held)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        """Return what of the text stands before `end` and is not given yet."""
        new, self._given = text[self._given : end], max(self._given, end)
        waiting = len(text) - self._given
        alone = len(self._tokenizer.decode(self._held))
        # Tokens far enough to the left are let go. While something waits, up to MOST_TORN characters of what is held
        # may be the rest of one that begins before it.
        if alone > (waiting and waiting + MOST_TORN):
            self._left, self._held, self._given = self._held, [], alone - waiting
        return new


class StopStrings:
    """Text up to the first stop string that is complete, wherever pieces cut it; `found` once there was one."""

    def __init__(self, stop: Sequence[str]):
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {stop!r}: give a list of texts, none of them empty")
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return what can be given out: the beginning of what may become a stop string is held back."""
        held = self._held + text
        places = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if places:
            self.found = True
            end = min(places)[1]
        else:
            starts = range(max(0, len(held) - max(map(len, self._stop), default=0)), len(held))
            end = next((at for at in starts if any(stop.startswith(held[at:]) for stop in self._stop)), len(held))
        self._held = "" if self.found else held[end:]
        return held[:end]

    def end(self) -> str:
        return self._held


def pieces(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], steps: Iterable[list[int | None]], stop: Sequence[str]
) -> Iterator[list[str]]:
    """The next piece of each row's text, step by step, at most to the first of `stop`.

    `steps`: the tokens that follow each prompt, one of each row, None where a row has ended. No more of them are asked
    for once all rows have ended.
    """
    writers = [(Detokenizer(tokenizer, prompt), StopStrings(stop)) for prompt in prompts]

    def written() -> Iterator[list[str]]:
        for step in steps:
            yield [
                "" if token is None or strings.found else strings.add(text.add(token))
                for token, (text, strings) in zip(step, writers, strict=True)
            ]
            if all(token is None or strings.found for token, (_, strings) in zip(step, writers, strict=True)):
                break
        yield ["" if strings.found else strings.add(text.end()) + strings.end() for text, strings in writers]

    return written()
