"""The words of a text, in the form in which they are counted.

A word is a letter or digit of any script with all letters, digits and combining marks after it. All other characters,
apostrophes and underscores too, separate words. A word is compared casefolded and in Unicode's NFKC, of which letters,
digits and marks are kept.
"""

import re
import sys
import unicodedata
from functools import cache, lru_cache
from typing import NamedTuple

NORMALIZATION = 1  # the number of this rule: an index of another one is refused


class Word(NamedTuple):
    """A normalised word, and its place in the text: its first character, and one past its last."""

    word: str
    start: int
    end: int


def words_of(text: str) -> list[str]:
    """Return the normalised words of a text."""
    return [word for run in _runs().findall(text) if (word := _normalized(run))]


def placed_words(text: str) -> list[Word]:
    """Return the normalised words of a text with their places."""
    return [Word(word, *run.span()) for run in _runs().finditer(text) if (word := _normalized(run[0]))]


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams in order, repeated ones too; none if there are fewer than n words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


@cache
def _runs() -> re.Pattern:
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    ranges = "".join(re.escape(chr(code)) for code in marks)
    return re.compile(rf"[^\W_](?:[^\W_]|[{ranges}])*")


@lru_cache(maxsize=1 << 17)
def _normalized(run: str) -> str:
    if run.isascii():
        return run.lower()
    return "".join(_runs().findall(unicodedata.normalize("NFKC", run.casefold())))
