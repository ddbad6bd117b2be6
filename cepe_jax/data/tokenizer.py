"""Text to ids and back: SentencePiece models, and `tokenizer.json` where there is no SentencePiece model."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

PART = 1 << 14  # characters that are encoded as one string where a cut changes nothing
NAMES = "tokenizer.model", "tokenizer.json"  # what a directory's tokenizer is called; the first that is there


class Tokenizer:
    """One tokenizer for decoder and encoder.

    `vocab_size` ids; `bos_id` and `eos_id`; `mask_id` = vocab_size is the encoder's extra id: no text contains it.
    `begin`: the ids that stand before every text that the model reads, as Hugging Face's say: BOS, or nothing.
    `special`: ids by name of the tokens that tokenizer.json or tokenizer_config.json calls special. Written out in a
    text they are text, but for `encode_special`. An added token that neither calls special is a word like others to
    `encode`; as a template may mark turns with it, `escaped` takes it apart, unless it is white space.
    """

    def __init__(self, path: str | Path):
        """Reads `path`: a `.model` or `tokenizer.json` file, or a directory that holds one (the `.model` wins)."""
        path = Path(path)
        if path.is_dir():
            found = _inside(path)
            if found is None:
                raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this directory")
            path = found
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer")
        if path.suffix == ".gguf":
            raise ValueError(f"{path}: run scripts/convert.py to-jax on it, which writes its tokenizer too")
        self.path = path
        self._impl = _HuggingFace(path) if path.suffix == ".json" else _SentencePiece(path)
        self.vocab_size, self.bos_id, self.eos_id = self._impl.vocab_size, self._impl.bos_id, self._impl.eos_id
        self.begin: list[int] = self._impl.begin
        self.special: dict[str, int] = self._impl.special
        self._single = sorted(name for name in self._impl.names if len(name) == 1)
        self._first = _first_characters(self._impl.names)

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        _check_unicode(text)
        return [self.bos_id] * bos + self._impl.encode(text) + [self.eos_id] * eos

    def encode_special(self, text: str, escape: str = "", continues: bool = False) -> list[int]:
        """The ids of a text in which special tokens, written out, are those tokens: what a chat template gives.

        A name that contains the character `escape` is text; the character is taken out, as is what else `escaped`
        wrote. `continues`: the text goes on after another one, so that a space which the tokenizer puts before every
        text is left out.
        """
        _check_unicode(text)
        written = {_written(number, escape): name for number, name in enumerate(self._single)} if escape else {}
        if continues:
            before, ids = (self._impl.encode_special(part, escape, written) for part in ("\n", "\n" + text))
            if ids[: len(before)] == before:  # else the newline is part of a longer piece: nothing is put before
                return ids[len(before) :]
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
        """ValueError when `directory` holds another tokenizer: its model knows other ids."""
        found = _inside(Path(directory))
        if found is not None and found != self.path:
            other = Tokenizer(found)
            if other.fingerprint() != self.fingerprint():
                raise ValueError(f"{self.path} is not the tokenizer of {directory}: use {other.path}")


def _inside(directory: Path) -> Path | None:
    """Where the tokenizer of the directory is."""
    return next((directory / name for name in NAMES if (directory / name).exists()), None)


def _check_unicode(text: str) -> None:
    """ValueError for half a character, which Python's strings may hold and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        said = f"a text holds {text[error.start]!r} at {error.start}, which is no character"
        raise ValueError(f"{said}: read it as UTF-8") from None


def settings_beside(path: Path) -> dict:
    """What tokenizer_config.json says beside the tokenizer at `path`; {} where there is none."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.exists():
        return {}
    try:
        settings = json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: not JSON ({error}): copy it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{beside}: holds no settings by name: copy it again")
    return settings


def _first_characters(names: Iterable[str]) -> re.Pattern:
    """Finds each character with which one of the names begins, also where names overlap."""
    return re.compile("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names) or "(?!)")


def _written(number: int, escape: str) -> str:
    """What stands for the name of one character with this number: two escapes stand nowhere else."""
    return f"{escape}{escape}{number}{escape}"


def _added_beside(path: Path) -> dict[str, tuple[int, bool]]:
    """Id of each added token that tokenizer_config.json beside `path` names, and whether it is special."""
    named = settings_beside(path).get("added_tokens_decoder", {})
    return {token["content"]: (int(i), bool(token.get("special"))) for i, token in named.items()}


def _marks(name: str, special: bool) -> bool:
    """Whether an added token of this name may mark a turn."""
    return special or not name.isspace()


class _SentencePiece:
    def __init__(self, path: Path):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: has no begin- or end-of-sequence piece: train one with both")
        self.begin = [self.bos_id] * settings_beside(path).get("add_bos_token", True)  # Llama's default
        self.decode = self.processor.decode
        self._newline = self._newline_prefix()
        piece = self.processor.id_to_piece
        added = {name: facts for name, facts in _added_beside(path).items() if _marks(name, facts[1])}
        control = {piece(i): i for i in range(self.vocab_size) if self.processor.is_control(i)}
        known = {name: i for name, (i, _) in added.items() if i < self.vocab_size and piece(i) == name}
        self.special = {name: i for name, i in known.items() if added[name][1]} | control
        self._known, self.names = known | control, {*control, *added}
        self._foreign = self.names - set(self._known)
        self._names = re.compile("|".join(sorted(map(re.escape, self.names), key=len, reverse=True)))
        # What the model finds in any text, though it is special.
        self._found = {name: i for name, i in self.special.items() if i in self.processor.encode(name)}
        self._first = _first_characters(self._found)
        self._path = path

    def encode(self, text: str) -> list[int]:
        ids = self._encode(text)
        if not self._found or set(self._found.values()).isdisjoint(ids):
            return ids
        bounds = [0, *(found.end() for found in self._first.finditer(text)), len(text)]
        return self._apart([text[a:b] for a, b in itertools.pairwise(bounds)], set(self._found.values()))

    def _apart(self, pieces: list[str], names: set[int]) -> list[int]:
        """The ids of the pieces, each by itself. Where one is a name all the same, it is an unknown word."""
        ids = [i for piece in pieces for i in self._encode(piece)]
        return [self.processor.unk_id() if i in names else i for i in ids]

    def _encode(self, text: str) -> list[int]:
        """The ids of the whole text. SentencePiece slows down with the length of a string, so long ones are cut."""
        if len(text) < 2 * PART or self._newline is None:
            return self.processor.encode(text)
        starts = [0]
        while (cut := text.find("\n", starts[-1] + PART)) >= 0:
            starts.append(cut)
        pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        parts = self.processor.encode(pieces, num_threads=1)  # processes share the cores
        ids = parts[0]
        for part in parts[1:]:
            ids += part[self._newline :]
        return ids

    def encode_special(self, text: str, escape: str, written: dict[str, str]) -> list[int]:
        """Each text between special tokens is encoded by itself, as Meta's own code does."""
        ids, names, marks = [], [*self._names.findall(text), None], set(self._known.values())
        for part, name in zip(self._names.split(text), names, strict=True):
            for said, single in written.items():
                part = part.replace(said, escape + single + escape)
            between = self._encode(part.replace(escape, ""))
            if escape and escape in part and marks & set(between):  # the model finds the name in any text
                between = self._apart(part.split(escape), marks)
            if name in self._foreign:
                beside = "which tokenizer_config.json names: put the model's tokenizer.json in its place"
                raise ValueError(f"{self._path} has no token {name}, {beside}")
            ids += between if name is None else [*between, self._known[name]]
        return ids

    def _newline_prefix(self) -> int | None:
        """How many ids a text that begins with a newline has before it (a dummy prefix); None if cuts change ids.

        A cut before a newline changes nothing where no longer piece has one and normalising leaves white space alone,
        in a BPE model, whose scores are ranks. A unigram model sums scores from the beginning of the text, and rounds.
        """
        if any(self.processor.get_score(i) % 1 for i in range(self.vocab_size)):
            return None
        pieces = map(self.processor.id_to_piece, range(self.vocab_size))
        if any("\n" in piece and piece != "\n" for piece in pieces):
            return None
        probe = " a \t\n\n  b\n"
        if self.processor.decode(self.processor.encode(probe)) != probe:
            return None
        alone, after = self.processor.encode("\n"), self.processor.encode("a\n")
        prefix = len(alone) - (len(after) - len(self.processor.encode("a")))
        parts = [self.processor.encode(part) for part in (" a \t", "\n", "\n  b", "\n")]
        joined = parts[0] + [i for part in parts[1:] for i in part[prefix:]]
        return prefix if joined == self.processor.encode(probe) else None

    def table(self):
        return ((self.processor.id_to_piece(i), self.processor.get_score(i)) for i in range(self.vocab_size))


class _HuggingFace:
    def __init__(self, path: Path):
        import tokenizers  # only where a tokenizer.json is read

        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._ends(path)
        whole = self.tokenizer.encode("a", add_special_tokens=True)  # as the file's own post-processor says
        self.begin = whole.ids[: len(list(itertools.takewhile(bool, whole.special_tokens_mask)))]
        added = self.tokenizer.get_added_tokens_decoder()
        beside = {n: facts for n, facts in _added_beside(path).items() if self.tokenizer.token_to_id(n) == facts[0]}
        self.special = {self.tokenizer.id_to_token(i): i for i in (self.bos_id, self.eos_id)}
        self.special |= {token.content: i for i, token in added.items() if token.special}
        self.special |= {name: i for name, (i, special) in beside.items() if special}
        all_names = {*self.special, *beside, *(token.content for token in added.values())}
        self.names = {name for name in all_names if _marks(name, name in self.special)}
        late = [name for name, i in self.special.items() if i in added and not added[i].special]
        if late:  # to `encode` too
            self.tokenizer.add_special_tokens([self._added_token(name) for name in late])

    @cached_property
    def _parser(self):
        """A copy of the tokenizer that finds special tokens in a text as it stands, before it is normalised."""
        import tokenizers

        parser = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        parser.add_special_tokens([self._added_token(name) for name in self.names])
        return parser

    def _added_token(self, name: str):
        """As the file says of it, but found in a text as it stands."""
        import tokenizers

        token = self.tokenizer.get_added_tokens_decoder().get(self.tokenizer.token_to_id(name))
        options = ("lstrip", "rstrip", "single_word") if token is not None else ()
        return tokenizers.AddedToken(name, normalized=False, **{option: getattr(token, option) for option in options})

    def _ends(self, path: Path) -> tuple[int, int]:
        """Ids of begin and end of sequence: as tokenizer_config.json beside it says, else by their usual names."""
        settings = settings_beside(path)
        usual = {"bos_token": ("<s>", "<|begin_of_text|>"), "eos_token": ("</s>", "<|end_of_text|>")}
        ids = []
        for role, names in usual.items():
            if said := settings.get(role):
                names = (said["content"] if isinstance(said, dict) else said,)
            present = [i for name in names if (i := self.tokenizer.token_to_id(name)) is not None]
            if not present:
                raise ValueError(
                    f"{path}: no {role}: looked for {' and '.join(names)}; name it in tokenizer_config.json"
                )
            ids.append(present[0])
        return ids[0], ids[1]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str, escape: str, written: dict[str, str]) -> list[int]:
        """As the library finds special tokens; normalising, which comes after, takes the escape out."""
        from tokenizers import normalizers

        own = self.tokenizer.normalizer
        steps = [normalizers.Replace(said, name) for said, name in written.items()]
        steps += [normalizers.Replace(escape, "")] * bool(escape) + [own] * (own is not None)
        self._parser.normalizer = normalizers.Sequence(steps)
        return self._parser.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def table(self):
        return (self.tokenizer.to_str(),)
