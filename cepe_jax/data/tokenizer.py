"""Text to ids and back: one face for SentencePiece models and `tokenizer.json`.

**Special tokens and the escape.** A text that is encoded never contains a special token: its name, written out, is
text. A chat template is the exception. It writes the names of special tokens into one text with the contents of
messages, which users wrote and which may hold such names, too. So that these stay text, the contents pass through
`escaped` before they are rendered, with a character `escape` that no message contains (a private one of Unicode):

1. In a content, `escape` follows the first character of every name of an added token, also where names overlap: no name
   is left in it. A name of a single character, which cannot be taken apart, is written as its number between escapes.
2. The template renders, and writes its own names as they are.
3. `encode_special` finds the names that are left, which are the template's, as the tokens they are; the texts between
   them are encoded without the escapes. Should the model find a name in one of these all the same, as some
   SentencePiece models do, the text is encoded in the pieces that the escapes make of it.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cepe_jax.data.tokenizer_files import NAMES, PADDING, TOKENIZER_FILES, Placed, first_characters, local_files
from cepe_jax.data.tokenizer_json import JsonTokenizer, read_library_tokenizer
from cepe_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer, is_tiktoken, read_processor
from cepe_jax.directories import Place, download_hint, is_remote, place


class Tokenizer:
    """One tokenizer for decoder and encoder.

    `vocab_size` ids; `bos_id` and `eos_id`; `mask_id` = vocab_size is the encoder's extra id: no text contains it.
    `begin`: the ids that stand before every text that the model reads, as Hugging Face's say: BOS, or nothing.
    `special`: ids by name of the tokens that the tokenizer's files call special. Written out in a text they are text,
    except for `encode_special`. An added token that none of them calls special is a word like others to `encode`; as a
    template may mark turns with it, `escaped` takes it apart, unless it is white space.
    """

    def __init__(self, path: str | Place):
        """Read `path`: a `.model` or `tokenizer.json` file, or a directory that holds one (`file_in` says which).

        In a bucket it is a directory.
        """
        path = local_files(place(path)) if is_remote(path) else Path(path)
        if path.is_dir():
            own = file_in(path)
            if own is None:
                raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this directory")
            path = own
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer{download_hint(path)}")
        if path.suffix == ".gguf":
            raise ValueError(f"{path}: run scripts/convert.py to-jax on it, which writes its tokenizer too")
        self.path = path
        self._impl = JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
        self.vocab_size, self.bos_id, self.eos_id = self._impl.vocab_size, self._impl.bos_id, self._impl.eos_id
        self.begin: list[int] = self._impl.begin
        self.special: dict[str, int] = self._impl.special
        self._single = sorted(name for name in self._impl.names if len(name) == 1)
        self._first = first_characters(self._impl.names)

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [i for part in self.parts(text, bos, eos) for i in part]

    def parts(self, text: str, bos: bool = False, eos: bool = False) -> Iterator[list[int]]:
        """Yield the ids that `encode` returns in parts: lists of all ids of a long text would take gigabytes."""
        _check_unicode(text)
        yield [self.bos_id] * bos
        yield from self._impl.parts(text)
        yield [self.eos_id] * eos

    def encode_special(self, text: str, escape: str = "", continues: bool = False) -> list[int]:
        """The ids of a text in which special tokens, written out, are those tokens: what a chat template gives.

        A name that contains the character `escape` is text; the character is taken out, as is what else `escaped`
        wrote. `continues`: the text goes on after another one, so that a space which the tokenizer puts before every
        text is left out.
        """
        if continues:
            before, ids = (self.encode_special(part, escape) for part in ("\n", "\n" + text))
            if ids[: len(before)] == before:  # else the newline is part of a longer piece: nothing is put before
                return ids[len(before) :]
        return [i for i, _, _ in self.placed_special(text, escape)]

    def placed_special(self, text: str, escape: str = "") -> Placed:
        """The ids that `encode_special` gives, each with its place in the text: its first character, and one past it.

        Several ids may stand for one character; SentencePiece gives all but the last of these an empty place before it.
        """
        _check_unicode(text)
        written = {_written(number, escape): name for number, name in enumerate(self._single)} if escape else {}
        return self._impl.encode_special(text, escape, written)

    def escaped(self, text: str, escape: str) -> str:
        """The text so that `encode_special` finds no added token in it; `escape` is a character that it has not.

        `escape` follows the first character of each name; a name of one character is written as its number.
        """
        if not escape:
            return text

        def apart(found: re.Match) -> str:
            return _written(self._single.index(found[0]), escape) if found[0] in self._single else found[0] + escape

        return self._first.sub(apart, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; BOS, EOS and ids that a longer table of the model's knows have none."""
        ends = self.bos_id, self.eos_id
        return self._impl.decode([int(i) for i in ids if i < self.vocab_size and i not in ends])

    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids, BOS and EOS too, whatever options their files store."""
        table = map(repr, (self.bos_id, self.eos_id, *self._impl.table()))
        return hashlib.sha256("\n".join(table).encode()).hexdigest()

    def check_is_of(self, directory: Path | str) -> None:
        """Raise ValueError if `directory` holds another tokenizer: its model knows other ids."""
        own = file_in(directory)
        if own is not None and own != self.path and Tokenizer(own)._ids() != self._ids():
            raise ValueError(f"{self.path} is not the tokenizer of {directory}: use {own}")

    def _ids(self) -> tuple[int, int, dict[str, int]]:
        """Return what a model must agree on: equal for a tokenizer.model and a tokenizer.json made from it."""
        return self.bos_id, self.eos_id, self._impl.vocabulary()


def opened_tokenizer(directory: Place) -> Tokenizer:
    """Return the directory's tokenizer, opened once by a process that works on one unit after another.

    The library of tokenizer.json gives back half a megabyte less than it took for each.
    """
    stats = [(directory / name).stat() for name in TOKENIZER_FILES if (directory / name).exists()]
    times = [stat.mtime if is_remote(directory) else stat.st_mtime_ns for stat in stats]
    return _opened(directory, tuple(times))


@functools.lru_cache(maxsize=2)
def _opened(directory: Place, times: tuple[int, ...]) -> Tokenizer:
    return Tokenizer(directory)


def file_in(directory: Path | str) -> Path | None:
    """Return the file of the directory that is its tokenizer, None if there is none.

    Of two files it is the one that knows more tokens, padding aside, and of equals the SentencePiece model: the other
    was made from it.
    """
    paths = [path for name in NAMES if (path := Path(directory) / name).exists()]
    return max(paths, key=_count) if len(paths) > 1 else next(iter(paths), None)


def _count(path: Path) -> int:
    """Return how many tokens the file itself knows, padding aside; 0 for tiktoken's format, which is not read."""
    if path.suffix == ".json":
        names = read_library_tokenizer(path).get_vocab(with_added_tokens=True)
    elif is_tiktoken(path):
        names = ()
    else:
        processor = read_processor(path)
        names = map(processor.id_to_piece, range(processor.vocab_size()))
    return sum(PADDING.fullmatch(name) is None for name in names)


def _check_unicode(text: str) -> None:
    """ValueError for half a character, which Python's strings may hold and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        said = f"a text holds {text[error.start]!r} at {error.start}, which is no character"
        raise ValueError(f"{said}: read it as UTF-8") from None


def _written(number: int, escape: str) -> str:
    """Return what stands for the name of one character with this number: two escapes stand nowhere else."""
    return f"{escape}{escape}{number}{escape}"
