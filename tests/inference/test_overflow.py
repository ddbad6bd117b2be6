"""One long prompt, cut in two: nothing is lost, nothing is there twice, and what the decoder reads fits."""

import random
from types import SimpleNamespace

import pytest
from support.tokenizers import TEXTS

from cepe_jax.data.tokenizer_training import train
from cepe_jax.inference.overflow import (
    TooLong,
    by_passages,
    cut,
    cut_continued,
    fit,
    fit_continued,
    passages_of,
    truncate_left,
)

LETTERS = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text], bos_id=-1, begin=[-1])


def test_truncate_left():
    assert truncate_left([1, 2, 3, 4, 5, 6, 7, 8], 3, 2) == ([[1], [2, 3], [4, 5]], [6, 7, 8])
    assert truncate_left([1, 2, 3, 4], 4, 2) == ([], [1, 2, 3, 4])
    rng = random.Random(0)
    for _ in range(500):
        ids, room, length = list(range(rng.randrange(40))), rng.randint(1, 20), rng.randint(1, 9)
        contexts, kept = truncate_left(ids, room, length)
        assert [i for chunk in (*contexts, kept) for i in chunk] == ids
        assert len(kept) == min(room, len(ids))
        assert all(len(chunk) == length for chunk in contexts[1:])
        assert all(0 < len(chunk) <= length for chunk in contexts)


def test_passages_are_cut_after_blank_lines():
    text = "a\nb\n\n  c\n \t\n\nd\r\n\r\ne\n\n"
    assert passages_of(text) == ["a\nb\n\n", "  c\n \t\n\n", "d\r\n\r\n", "e\n\n"]
    assert passages_of("") == []
    assert passages_of("\n\n\na") == ["\n\n\n", "a"]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(["\n", " ", "\t", "a", "b\n\n"], k=rng.randrange(20)))
        assert "".join(passages_of(text)) == text
        assert all("\n\n" not in passage.strip() for passage in passages_of(text))


def test_by_passages():
    """As few passages as can be go to the encoder."""
    assert by_passages("aa\n\nbb\n\ncc", LETTERS, 6) == (["aa\n\n"], LETTERS.encode("bb\n\ncc"))
    assert by_passages("aa\n\nbb\n\ncc", LETTERS, 5) == (["aa\n\n", "bb\n\n"], LETTERS.encode("cc"))
    assert by_passages("aa\n\nbb\n\ncc", LETTERS, 10) == ([], LETTERS.encode("aa\n\nbb\n\ncc"))
    assert by_passages("", LETTERS, 10) == ([], [])
    with pytest.raises(ValueError, match="last passage .* 5 .* 4 .*truncate_left"):
        by_passages("aa\n\nbbbbb", LETTERS, 4)


@pytest.mark.parametrize("mode", ["truncate_left", "passages"])
def test_fit(tmp_path, mode):
    """With BOS and the new tokens the window is not exceeded, and full where tokens are cut."""
    tokenizer = train(TEXTS, 330, tmp_path / "tokenizer.model")
    rng = random.Random(0)
    moved = 0
    for _ in range(100):
        prompt = "".join(
            rng.choices(["It is a test.\n", "\n", "  x\n\n", "def f(x):\n\n", "🙂\n\n"], k=rng.randrange(30))
        )
        window, new = rng.randint(60, 120), rng.randint(1, 10)
        contexts, (bos, *ids) = fit(prompt, tokenizer, window, new, mode, 8)
        assert bos == tokenizer.bos_id
        assert 1 + len(ids) + new <= window + 1
        parts = [tokenizer.decode(context) for context in contexts]
        assert "".join(tokenizer.decode(i for context in contexts for i in context)) + tokenizer.decode(ids) == prompt
        moved += bool(contexts)
        if contexts and mode == "passages":
            assert all(part in passages_of(prompt) for part in parts)
            whole = tokenizer.encode(parts[-1] + tokenizer.decode(ids))
            assert 1 + len(whole) + new > window + 1
        if contexts and mode == "truncate_left":
            assert 1 + len(ids) + new == window + 1
    assert 20 < moved < 100


def test_a_tokenizer_that_puts_nothing_before_a_text():
    """The window is the text's alone, and BOS is read where there is nothing else."""
    plain = SimpleNamespace(encode=LETTERS.encode, bos_id=-1, begin=[])
    assert fit("abcdef", plain, 5, 2, "truncate_left", 8) == ([LETTERS.encode("ab")], LETTERS.encode("cdef"))
    assert fit("", plain, 6, 2, "passages", 8) == fit("", plain, None, 2, "error", 8) == ([], [-1])
    assert fit_continued("ab", ["cd", "ce"], plain, 3, "error", 8) == ([], [97, 98], [[99, 100], [99, 101]])
    assert fit_continued("", ["cd", "ce"], plain, 2, "error", 8) == ([], [-1], [[99, 100], [99, 101]])
    assert fit_continued("abc", ["d"], plain, 2, "truncate_left", 8) == ([[97]], [98, 99], [[100]])


def test_continuations_beside_begin():
    assert fit_continued("abc", ["d", "efg"], LETTERS, 5, "truncate_left", 1) == (
        *([[97]], [-1, 98, 99], [[100], [101, 102, 103]]),
    )
    with pytest.raises(ValueError, match="continuation 1 .* 7 .* 5: "):
        fit_continued("abc", ["d", "efg"], LETTERS, 5, "error", 1)
    with pytest.raises(ValueError, match="continuation 1 .*empty"):
        fit_continued("abc", ["d", ""], LETTERS, 6, "error", 1)


def test_what_is_too_long_is_cut():
    """The window is full, nothing of the text is lost, and new tokens get what the prompt leaves, or half."""
    text = LETTERS.encode("0123456789")
    for new, wanted in ((3, 3), (14, 14), (15, 7), (99, 7)):
        contexts, (bos, *ids), left = cut("0123456789", LETTERS, 15, new, 4)
        assert (bos, left) == (-1, wanted)
        assert [i for part in (*contexts, ids) for i in part] == text
        assert len(ids) == min(10, 16 - 1 - wanted)
    assert cut("ab", LETTERS, 15, 99, 4) == ([], [-1, 97, 98], 13)
    assert cut("", LETTERS, 15, 99, 4) == ([], [-1], 14)
    parts = cut_continued("ab", "0123456789", LETTERS, 5, 4)
    assert parts == ([LETTERS.encode("ab0"), LETTERS.encode("1234")], [-1, ord("5")], LETTERS.encode("6789"))
    assert cut_continued("abcdef", "01", LETTERS, 5, 4) == ([[97, 98, 99]], [-1, 100, 101, 102], [48, 49])
    with pytest.raises(TooLong, match="window's 1"):
        cut_continued("ab", "cd", LETTERS, 1, 4)


def test_no_room():
    with pytest.raises(ValueError, match="2 tokens and 3 .*window of 3 .*truncate_left"):
        fit("a", LETTERS, 3, 3, "error", 8)
    assert fit("a", LETTERS, 4, 3, "error", 8) == ([], [-1, 97])
    with pytest.raises(ValueError, match="100 new tokens .*BOS .*window's 100"):
        fit("a", LETTERS, 100, 100, "truncate_left", 8)
    assert fit("ab", LETTERS, 100, 99, "truncate_left", 8) == ([[97]], [-1, 98])
    with pytest.raises(ValueError, match="chunk_length is 0"):
        fit("a", LETTERS, 100, 9, "truncate_left", 0)
