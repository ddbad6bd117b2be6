"""`tokenizer.json`, read by Hugging Face's library, with the tokens that the files beside it add."""

import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from cepe_jax.data.tokenizer_files import Id, Placed, added_beside, ends_of, marks_turns, without_padding
from cepe_jax.parsing import check_is_file, in_words

BYTE = "<0x{:02X}>"  # how a piece that is a byte is called
PART = 1 << 16  # characters that are encoded as one string where a cut changes nothing
AROUND = 64  # characters on each side of a cut that are compared: longer than words that a vocabulary knows
LETTER = r"[^\W\d_]"
# Places at which patterns of words start a new word, each with a text before it and one after it.
CUTS = {
    rf"(?<={LETTER})\n": ("a b", "\n b\n\na"),
    rf"(?<={LETTER}) (?={LETTER})": ("a b", " c\n"),
    rf"(?<=\S\n)(?={LETTER})": ("a b.\n", "c d"),
    rf"(?<={LETTER}[^\w\s])\n(?=\S)": ("a b.", "\nc"),
}
OPTIONS = "lstrip", "rstrip", "single_word", "normalized"  # how the library finds an added token


class _Added(msgspec.Struct):
    id: Id
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, Id] | list[Any] = {}


class _Ids(msgspec.Struct):
    """The ids in a tokenizer.json."""

    model: _Model
    added_tokens: list[_Added] = []


def read_library_tokenizer(path: Path):
    """Read a tokenizer.json; ValueError if it gives a token two ids or an id two tokens: the library drops one."""
    import tokenizers  # only where a tokenizer.json is read

    check_is_file(path)
    try:
        # before the library makes a table up to the highest id
        written = msgspec.json.decode(path.read_bytes(), type=_Ids)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a tokenizer.json ({in_words(str(error))}): copy it again") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and where it panics no Exception
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
    pieces = written.model.vocab if isinstance(written.model.vocab, dict) else {}
    added = [(token.content, token.id) for token in written.added_tokens]
    for name, i in itertools.chain(pieces.items(), added):
        if tokenizer.token_to_id(name) != i or tokenizer.id_to_token(i) != name:
            raise ValueError(f"{path}: token {name!r} or its id {i} is there twice: copy it again")
    return tokenizer


class JsonTokenizer:
    def __init__(self, path: Path):
        self.tokenizer = read_library_tokenizer(path)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        beside = added_beside(path)
        self._add(path, {name: token for name, token in beside.items() if self.tokenizer.token_to_id(name) is None})
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        falls_back = self.tokenizer.decoder is not None and self.tokenizer.decoder.decode([BYTE.format(65)]) == "A"
        pieces = {self.tokenizer.token_to_id(BYTE.format(byte)): byte for byte in range(256 if falls_back else 0)}
        self._bytes = {i: byte for i, byte in pieces.items() if i is not None}  # ids of pieces that are a byte
        usual = {"bos_token": ("<s>", "<|begin_of_text|>", "<|endoftext|>"), "eos_token": ("</s>", "<|end_of_text|>")}
        ends = ends_of(path, usual, self.tokenizer.token_to_id)
        (_, self.bos_id), (_, self.eos_id) = ends
        whole = self.tokenizer.encode("a", add_special_tokens=True)  # as the file's own post-processor says
        self.begin = whole.ids[: len(list(itertools.takewhile(bool, whole.special_tokens_mask)))]
        added = self.tokenizer.get_added_tokens_decoder()
        beside = {n: token for n, token in beside.items() if self.tokenizer.token_to_id(n) == token["id"]}
        self.special = dict(ends) | {token.content: i for i, token in added.items() if token.special}
        self.special |= {name: token["id"] for name, token in beside.items() if token["special"]}
        all_names = {*self.special, *beside, *(token.content for token in added.values())}
        self.names = {name for name in all_names if marks_turns(name, name in self.special)}
        late = [name for name, i in self.special.items() if i in added and not added[i].special]
        if late:  # to `encode` too
            self.tokenizer.add_special_tokens([self._added_token(name) for name in late])

    def _add(self, path: Path, lacking: dict[str, dict]) -> None:
        """Add the tokens that only the files beside know; ValueError where their ids are not the next ones."""
        import tokenizers

        lacking = without_padding(lacking, self.tokenizer.get_vocab_size(with_added_tokens=True))
        for name, token in sorted(lacking.items(), key=lambda item: item[1]["id"]):
            options = {key: token[key] for key in OPTIONS if key in token}
            self.tokenizer.add_tokens([tokenizers.AddedToken(name, **options)])
            if (i := self.tokenizer.token_to_id(name)) != token["id"]:
                ids = f"the files beside it call {token['id']}, and here {i} is the next id"
                raise ValueError(f"{path} has no token {name}, which {ids}: put the tokenizer.json saved with it there")

    @cached_property
    def _parser(self):
        """A copy of the tokenizer that finds special tokens in a text as it stands, before it is normalised."""
        import tokenizers

        parser = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        parser.add_special_tokens([self._added_token(name) for name in self.names])
        parser.post_processor = None  # which may leave the white space of a token out of its place in the text
        return parser

    def _added_token(self, name: str):
        """Return the token as the file says of it, but found in a text as it stands."""
        import tokenizers

        token = self.tokenizer.get_added_tokens_decoder().get(self.tokenizer.token_to_id(name))
        options = OPTIONS[:3] if token is not None else ()
        return tokenizers.AddedToken(name, normalized=False, **{option: getattr(token, option) for option in options})

    def parts(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text, of a long one in parts: the library takes 160 bytes for each character."""
        start = 0
        while self._cuts and (cut := self._cut(text, start + PART)):
            yield self._encode_part(text[start:cut], start > 0)
            start = cut
        yield self._encode_part(text[start:], start > 0)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        return self._encode(text)[self._prefix if continues else 0 :]

    def _cut(self, text: str, start: int) -> int:
        """Return the first place from `start` on, 0 if there is none, where a cut changes no id around it."""
        cuts = (place.start() for place in self._cuts.finditer(text, start))
        return next((cut for cut in cuts if self._is_exact(text[cut - AROUND : cut], text[cut : cut + AROUND])), 0)

    def _is_exact(self, left: str, right: str) -> bool:
        return self._encode(left) + self._encode_part(right, True) == self._encode(left + right)

    @cached_property
    def _prefix(self) -> int:
        """The number of ids that stand before those of every text: a space that is put there."""
        return len(self._encode("\n")) - len(self._encode("a\n")) + len(self._encode("a"))

    @cached_property
    def _cuts(self) -> re.Pattern | None:
        """The places where texts may be cut, in which no piece lies; None if there are none.

        A unigram model sums scores from the beginning of the text, and rounds.
        """
        if type(self.tokenizer.model).__name__ != "BPE" or self._prefix < 0:
            return None
        pieces = (self.tokenizer.decode([i], skip_special_tokens=False) for i in range(self.vocab_size))
        pieces = "\0".join(pieces).replace("\ufffd", "a")  # part of a character: it may be a letter's
        exact = [place for place, around in CUTS.items() if self._is_exact(*around) and not re.search(place, pieces)]
        return re.compile("|".join(exact)) if exact else None

    def encode_special(self, text: str, escape: str, written: dict[str, str]) -> Placed:
        """Encode, with special tokens as the library finds them; normalising, which comes later, drops the escape."""
        from tokenizers import normalizers

        own = self.tokenizer.normalizer
        steps = [normalizers.Replace(said, name) for said, name in written.items()]
        steps += [normalizers.Replace(escape, "")] * bool(escape) + [own] * (own is not None)
        self._parser.normalizer = normalizers.Sequence(steps)
        found = self._parser.encode(text, add_special_tokens=False)
        return [(i, *place) for i, place in zip(found.ids, found.offsets, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Return the text. Each byte that is no part of a character is U+FFFD, as SentencePiece has it.

        The library's decoder of bytes would write every byte beside it as U+FFFD too, those of whole characters.
        """
        if self._bytes.keys().isdisjoint(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        names = []
        for are_bytes, group in itertools.groupby(ids, key=self._bytes.__contains__):
            if not are_bytes:
                names += filter(None, map(self.tokenizer.id_to_token, group))
                continue
            for character in bytes(self._bytes[i] for i in group).decode("utf-8", "surrogateescape"):
                torn = "\udc80" <= character <= "\udcff"
                names += ["\ufffd"] if torn else [BYTE.format(byte) for byte in character.encode()]
        return self.tokenizer.decoder.decode(names)

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def table(self):
        return (self.tokenizer.to_str(),)
