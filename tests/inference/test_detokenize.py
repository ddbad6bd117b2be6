"""Text while its tokens come: the pieces joined are the decoding of the whole, for any tokens and cuts."""

import random
from types import SimpleNamespace

import pytest
from support.tokenizers import TEXTS, as_llama_2, byte_ids, byte_level, to_tokenizers

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train
from cepe_jax.inference.detokenize import TORN, Detokenizer, StopStrings

KINDS = "ours", "as llama 2", "byte level", "byte fallback"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    home = tmp_path_factory.mktemp("tokenizers")
    made = {"ours": train(TEXTS, 330, home / "ours.model"), "as llama 2": Tokenizer(as_llama_2(home / "llama.model"))}
    made["byte level"] = Tokenizer(byte_level(home / "bytes.json"))
    made["byte fallback"] = Tokenizer(to_tokenizers(home / "llama.model", home / "llama.json"))
    return made


def pieces_of(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    text = Detokenizer(tokenizer, prompt)
    return [*map(text.add, new), text.end()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text(tokenizers, kind):
    """Whole characters, spaces as they are, after a prompt that ends anywhere in a text."""
    tokenizer = tokenizers[kind]
    text = "It is\n\n   a  test. 🙂🏴‍☠️ é漢字 def f(x):\n\treturn  x"
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        if TORN not in (prompt := tokenizer.decode(ids[:cut])):
            pieces = pieces_of(tokenizer, [tokenizer.bos_id, *ids[:cut]], ids[cut:])
            assert prompt + "".join(pieces) == text
            assert not any(TORN in piece for piece in pieces)
            assert len([piece for piece in pieces if piece]) >= (len(ids) - cut) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens(tokenizers, kind):
    """Bytes that are no text, spaces first, BOS and EOS between: the decoding of all, after the prompt's."""
    tokenizer, rng = tokenizers[kind], random.Random(0)
    spaces = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).strip()]
    for _ in range(300):
        prompt = [tokenizer.bos_id, *tokenizer.encode(rng.choice(["", "a", "x ", "\n", " "]))]
        new = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(12))
        new = rng.choices(spaces, k=rng.randrange(3)) + new
        whole = tokenizer.decode(prompt + new)
        assert tokenizer.decode(prompt) + "".join(pieces_of(tokenizer, prompt, new)) == whole


# Never a character; characters with one byte torn; what is invalid though it looks like UTF-8: overlong, a surrogate.
TORN_BYTES = [b"\xff" * 400, b"\x80" * 400, b"\xe6\xbc" * 200, b"\xf0\x9f\x98" * 133, "漢".encode() * 9 + b"\xe6"]
TORN_BYTES += ["🙂漢é".encode()[at:] * 3 for at in range(4)]
TORN_BYTES += [b"\xc0\x80" * 9, b"\xed\xa0\x80" * 9, "\ufffd▁".encode() * 9]
UNITS = [b"\xff", b"\x80", b"\xe6", b"\xbc", b"\xf0\x9f", b"\xc3", b"a", "🙂".encode(), "é".encode(), "\ufffd".encode()]


def decoded(kind: str, content: bytes) -> str:
    """By Python's own decoder: U+FFFD for each byte that is no part of a character, byte-level for each run of such."""
    if kind == "byte level":
        return content.decode("utf-8", "replace")
    return "".join(TORN if "\ud800" < c < "\ue000" else c for c in content.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("kind", KINDS)
def test_torn_bytes_are_given_at_once(tokenizers, kind):
    """No more than three characters wait for a fourth byte, and however long it goes on, few tokens are read again."""
    tokenizer, rng = tokenizers[kind], random.Random(0)
    ids, before = byte_ids(tokenizer.path), tokenizer.encode("a")
    reads, decode = [], tokenizer.decode
    noting = SimpleNamespace(decode=lambda ids: reads.append(len(ids)) or decode(ids))
    for content in TORN_BYTES + [b"".join(rng.choices(UNITS, k=rng.randrange(12))) for _ in range(200)]:
        text, given = Detokenizer(noting, before), ""
        for end, byte in enumerate(content, 1):
            given += text.add(ids[byte])
            whole = decoded(kind, content[:end])
            assert whole.startswith(given)
            assert len(whole) - len(given) <= 3
        assert given + text.end() == decoded(kind, content) == decode(before + [ids[byte] for byte in content])[1:]
    assert max(reads) < 40


def test_a_torn_character_is_given_as_the_decoder_gives_it(tokenizers):
    tokenizer = tokenizers["ours"]
    first, *rest = tokenizer.encode("漢")
    assert len(rest) == 2
    text = Detokenizer(tokenizer, tokenizer.encode("a"))
    assert [text.add(first), text.add(rest[0]), text.end()] == ["", "", tokenizer.decode([first, rest[0]])]
    text = Detokenizer(tokenizer)
    assert [text.add(i) for i in (first, *rest, first, tokenizer.encode("b")[0])] == ["", "", "漢", "", TORN + "b"]


def stopped(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    """What is given out, and whether a stop string ended it; what may begin one is not given out, and nothing else."""
    strings, given, text = StopStrings(stop), "", ""
    for piece in pieces:
        given, text = given + strings.add(piece), text + piece
        if strings.found:
            return given, True
        begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        assert given == text[: len(text) - max(begun, default=0)]
    return given + strings.end(), False


def ends_at(stop: list[str], text: str) -> tuple[str, bool]:
    """The same, letter by letter: the text before the longest stop string that the first letter completes."""
    for end in range(len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))], True
    return text, False


def test_stop_strings_wherever_pieces_cut_them():
    rng = random.Random(0)
    found = 0
    for _ in range(3000):
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randrange(4))]
        text = "".join(rng.choices("abc", k=rng.randrange(12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        wanted = ends_at(stop, text)
        assert stopped(stop, pieces) == wanted
        found += wanted[1]
    assert 500 < found < 2500


@pytest.mark.parametrize("stop", ["END", [""], ["a", ""]])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="stop is "):
        StopStrings(stop)
