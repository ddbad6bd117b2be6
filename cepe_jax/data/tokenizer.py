"""Text to ids and back: SentencePiece models, `tokenizer.json`, and tokens that the files beside them add."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from cepe_jax.directories import download_hint

PART = 1 << 14  # characters that are encoded as one string where a cut changes nothing
BYTE = "<0x{:02X}>"  # how a piece that is a byte is called
NAMES = "tokenizer.model", "tokenizer.json"  # what a directory's tokenizer is called
BESIDE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"  # files that say more of its tokens
PADDING = re.compile(r"\W+pad(ding)?\W+", re.IGNORECASE)  # names of tokens that no text contains
OPTIONS = "lstrip", "rstrip", "single_word", "normalized"  # how the library finds an added token
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # how a file in its format begins: a token in base 64, its rank


class Tokenizer:
    """One tokenizer for decoder and encoder.

    `vocab_size` ids; `bos_id` and `eos_id`; `mask_id` = vocab_size is the encoder's extra id: no text contains it.
    `begin`: the ids that stand before every text that the model reads, as Hugging Face's say: BOS, or nothing.
    `special`: ids by name of the tokens that the tokenizer's files call special. Written out in a text they are text,
    except for `encode_special`. An added token that none of them calls special is a word like others to `encode`; as a
    template may mark turns with it, `escaped` takes it apart, unless it is white space.
    """

    def __init__(self, path: str | Path):
        """Read `path`: a `.model` or `tokenizer.json` file, or a directory that holds one (`file_in` says which)."""
        path = Path(path)
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
        """Raise ValueError if `directory` holds another tokenizer: its model knows other ids."""
        own = file_in(directory)
        if own is not None and own != self.path and Tokenizer(own)._ids() != self._ids():
            raise ValueError(f"{self.path} is not the tokenizer of {directory}: use {own}")

    def _ids(self) -> tuple[int, int, dict[str, int]]:
        """Return what a model must agree on: equal for a tokenizer.model and a tokenizer.json made from it."""
        return self.bos_id, self.eos_id, self._impl.vocabulary()


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
        names = _library_tokenizer(path).get_vocab(with_added_tokens=True)
    elif _is_tiktoken(path):
        names = ()
    else:
        processor = _processor(path)
        names = map(processor.id_to_piece, range(processor.vocab_size()))
    return sum(PADDING.fullmatch(name) is None for name in names)


def _is_tiktoken(path: Path) -> bool:
    with open(path, "rb") as file:
        return TIKTOKEN.match(file.read(1024)) is not None


def _processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
    if _is_tiktoken(path):
        other = path.with_name("tokenizer.json")
        mend = f"use {other}" if other.exists() else "put the model's tokenizer.json there"
        raise ValueError(f"{path}: a vocabulary of tiktoken, as Llama 3's, not a SentencePiece model: {mend}")
    raise ValueError(f"{path}: not a SentencePiece model ({reason})")


def _library_tokenizer(path: Path):
    """Read a tokenizer.json."""
    import tokenizers  # only where a tokenizer.json is read

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None


def _check_unicode(text: str) -> None:
    """ValueError for half a character, which Python's strings may hold and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        said = f"a text holds {text[error.start]!r} at {error.start}, which is no character"
        raise ValueError(f"{said}: read it as UTF-8") from None


def settings_beside(path: Path, name: str = "tokenizer_config.json") -> dict:
    """Return what the file of this name says beside the tokenizer at `path`, {} if there is none."""
    beside = path.with_name(name)
    if not beside.exists():
        return {}
    try:
        settings = json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: not JSON ({error}): copy it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{beside}: holds no settings by name: copy it again")
    return settings


def tokens_in(setting: Any) -> list[str]:
    """Return the tokens that a setting names: one, as text or as an object, or a list of them."""
    match setting:
        case str():
            return [setting] * bool(setting)
        case {"content": str(name)}:
            return [name]
        case list():
            return [name for item in setting for name in tokens_in(item)]
    return []


def _first_characters(names: Iterable[str]) -> re.Pattern:
    """Finds each character with which one of the names begins, also where names overlap."""
    return re.compile("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names) or "(?!)")


def _written(number: int, escape: str) -> str:
    """What stands for the name of one character with this number: two escapes stand nowhere else."""
    return f"{escape}{escape}{number}{escape}"


def _added_beside(path: Path) -> dict[str, dict]:
    """Return, by name, what the files beside `path` say of added tokens: `id`, `special` and the library's options."""
    settings, ids = settings_beside(path), settings_beside(path, "added_tokens.json")
    for name, i in ids.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{path.with_name('added_tokens.json')}: the id of {name} is {i!r}: copy it again")
    decoder = settings.get("added_tokens_decoder") or {}
    for i, token in decoder.items():
        if not i.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            where = path.with_name("tokenizer_config.json")
            raise ValueError(f"{where}: added_tokens_decoder has {i!r}: {token!r}, no token with its id: copy it again")
    roles = settings_beside(path, "special_tokens_map.json") | settings
    special = {n for key, role in roles.items() if key.endswith(("_token", "_tokens")) for n in tokens_in(role)}
    added = {name: {"id": i, "special": name in special} for name, i in ids.items()}
    return added | {token["content"]: {"special": False} | token | {"id": int(i)} for i, token in decoder.items()}


def _without_padding(added: dict[str, dict], size: int) -> dict[str, dict]:
    """Leave out padding after all other ids: the models of some directories that add it have no row for it."""
    last = max((t["id"] for name, t in added.items() if not PADDING.fullmatch(name)), default=0)
    return {name: token for name, token in added.items() if token["id"] <= max(last, size - 1)}


def _ends(path: Path, usual: dict[str, tuple[str, ...]], id_of: Callable[[str], int | None]) -> list[tuple[str, int]]:
    """Return name and id of begin and end of sequence: as the settings beside say, else by their usual names."""
    settings, ends = settings_beside(path), []
    for role, names in usual.items():
        names = tokens_in(settings.get(role)) or names
        known = [(name, i) for name in names if (i := id_of(name)) is not None]
        if not known:
            raise ValueError(f"{path}: no {role}: looked for {' and '.join(names)}; name it in tokenizer_config.json")
        ends.append(known[0])
    return ends


def _marks(name: str, special: bool) -> bool:
    """Whether an added token of this name may mark a turn."""
    return special or not name.isspace()


class _SentencePiece:
    def __init__(self, path: Path):
        self.processor = _processor(path)
        size, piece = self.processor.vocab_size(), self.processor.id_to_piece
        ends = self.processor.bos_id(), self.processor.eos_id()
        if min(ends) < 0:
            raise ValueError(f"{path}: has no begin- or end-of-sequence piece: train one with both")
        settings, beside = settings_beside(path), _added_beside(path)
        lacking = {n: token for n, token in beside.items() if token["id"] >= size or piece(token["id"]) != n}
        self._added = _without_padding(lacking, size)
        own = {n: token for n, token in beside.items() if n not in lacking and _marks(n, token["special"])}
        control = {piece(i): i for i in range(size) if self.processor.is_control(i)}
        self._known = control | {name: token["id"] for name, token in (own | self._added).items()}
        self.vocab_size = max(size - 1, *self._known.values()) + 1
        usual = {role: (piece(i),) for role, i in zip(("bos_token", "eos_token"), ends, strict=True)}
        ends = _ends(path, usual, self._id_of)
        (_, self.bos_id), (_, self.eos_id) = ends
        self.begin = [self.bos_id] * (settings.get("add_bos_token") is not False)  # Llama's default
        self._known |= dict(ends)
        special = {*control, *dict(ends), *(name for name, token in beside.items() if token["special"])}
        self.special = {name: i for name, i in self._known.items() if name in special}
        self.names = {name for name in self._known if _marks(name, name in special)}
        options = {name: beside.get(name, {}) for name in self._known}
        self._names = _finder(options)
        self._words = _finder({name: options[name] for name in self._added if name not in self.special})
        self._name_of = {token["id"]: name for name, token in self._added.items()}
        # Texts after an added token: transformers' `legacy` puts the space before each of them, as before the first.
        self._inside = self.processor
        if self._added and settings.get("legacy") is False:
            self._inside = _without_prefix(self.processor)
        self._newline = _newline_prefix(self.processor)
        # What the model finds in any text, though it is special.
        self._found = {name: i for name, i in self.special.items() if i in self.processor.encode(name)}
        self._first = _first_characters(self._found)

    def _id_of(self, name: str) -> int | None:
        i = self._known.get(name, self.processor.piece_to_id(name))
        return i if name in self._known or self.processor.id_to_piece(i) == name else None

    def encode(self, text: str) -> list[int]:
        return self._split(text, self._words, self._plain)

    def _split(self, text: str, names: re.Pattern, encode: Callable[[str, bool], list[int]]) -> list[int]:
        """Return the ids of a text: each name in it is its token, and what stands between is encoded by itself.

        `encode` is told whether a name stands before.
        """
        ids, at = [], 0
        for name in names.finditer(text):
            ids += encode(text[at : name.start()], at > 0)
            ids.append(self._known[name[0] if name[0] in self._known else name[0].strip()])
            at = name.end()
        return ids + encode(text[at:], at > 0)

    def _plain(self, text: str, inside: bool) -> list[int]:
        ids = self._encode(text, inside)
        if not self._found or set(self._found.values()).isdisjoint(ids):
            return ids
        bounds = [0, *(found.end() for found in self._first.finditer(text)), len(text)]
        return self._apart([text[a:b] for a, b in itertools.pairwise(bounds)], set(self._found.values()))

    def _apart(self, pieces: list[str], names: set[int]) -> list[int]:
        """The ids of the pieces, each by itself. Where one is a name all the same, it is an unknown word."""
        ids = [i for piece in pieces for i in self._encode(piece)]
        return [self.processor.unk_id() if i in names else i for i in ids]

    def _encode(self, text: str, inside: bool = False) -> list[int]:
        """The ids of the whole text. SentencePiece slows down with the length of a string, so long ones are cut."""
        processor = self._inside if inside else self.processor
        if len(text) < 2 * PART or self._newline is None:
            return processor.encode(text)
        starts = [0]
        while (cut := text.find("\n", starts[-1] + PART)) >= 0:
            starts.append(cut)
        pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        parts = processor.encode(pieces, num_threads=1)  # processes share the cores
        ids = parts[0]
        prefix = self._newline if processor is self.processor else 0
        for part in parts[1:]:
            ids += part[prefix:]
        return ids

    def encode_special(self, text: str, escape: str, written: dict[str, str]) -> list[int]:
        """Each text between special tokens is encoded by itself, as Meta's own code does."""
        marks = set(self._known.values())

        def between(part: str, inside: bool) -> list[int]:
            for said, single in written.items():
                part = part.replace(said, escape + single + escape)
            ids = self._encode(part.replace(escape, ""), inside)
            if escape and escape in part and marks & set(ids):  # the model finds the name in any text
                ids = self._apart(part.split(escape), marks)
            return ids

        return self._split(text, self._names, between)

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return self.processor.decode(ids)
        texts: list[str] = []
        for name, run in itertools.groupby(ids, self._name_of.get):
            processor = self._inside if texts else self.processor
            known = [i for i in run if name or i < self.processor.vocab_size()]  # ids may have gaps
            texts.append(name * len(known) if name else processor.decode(known))
        return "".join(texts)

    def vocabulary(self) -> dict[str, int]:
        pieces = {self.processor.id_to_piece(i): i for i in range(self.processor.vocab_size())}
        return pieces | {name: token["id"] for name, token in self._added.items()}

    def table(self):
        for i in range(self.processor.vocab_size()):
            yield self.processor.id_to_piece(i), self.processor.get_score(i)
        for name, token in sorted(self._added.items()):
            yield name, token["id"], name in self.special, self._inside is self.processor


def _finder(names: dict[str, dict]) -> re.Pattern:
    """Find the names in a text, the longest first, each with the white space that its options count to it."""
    longest = sorted(names, key=len, reverse=True)
    space = {side: {name: r"\s*" * names[name].get(side, False) for name in names} for side in ("lstrip", "rstrip")}
    return re.compile("|".join(space["lstrip"][n] + re.escape(n) + space["rstrip"][n] for n in longest) or "(?!)")


def _without_prefix(processor: sentencepiece.SentencePieceProcessor) -> sentencepiece.SentencePieceProcessor:
    """Return the same model, which puts no space before a text."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _newline_prefix(processor: sentencepiece.SentencePieceProcessor) -> int | None:
    """Return how many ids stand before a newline that begins a text (a dummy prefix); None if cuts change ids.

    A cut before a newline changes nothing where no longer piece has one and normalising leaves white space alone,
    in a BPE model, whose scores are ranks. A unigram model sums scores from the beginning of the text, and rounds.
    """
    if any(processor.get_score(i) % 1 for i in range(processor.vocab_size())):
        return None
    pieces = map(processor.id_to_piece, range(processor.vocab_size()))
    if any("\n" in piece and piece != "\n" for piece in pieces):
        return None
    probe = " a \t\n\n  b\n"
    if processor.decode(processor.encode(probe)) != probe:
        return None
    alone, after = processor.encode("\n"), processor.encode("a\n")
    prefix = len(alone) - (len(after) - len(processor.encode("a")))
    parts = [processor.encode(part) for part in (" a \t", "\n", "\n  b", "\n")]
    joined = parts[0] + [i for part in parts[1:] for i in part[prefix:]]
    return prefix if joined == processor.encode(probe) else None


class _HuggingFace:
    def __init__(self, path: Path):
        self.tokenizer = _library_tokenizer(path)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        beside = _added_beside(path)
        self._add(path, {name: token for name, token in beside.items() if self.tokenizer.token_to_id(name) is None})
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        falls_back = self.tokenizer.decoder is not None and self.tokenizer.decoder.decode([BYTE.format(65)]) == "A"
        pieces = {self.tokenizer.token_to_id(BYTE.format(byte)): byte for byte in range(256 if falls_back else 0)}
        self._bytes = {i: byte for i, byte in pieces.items() if i is not None}  # ids of pieces that are a byte
        usual = {"bos_token": ("<s>", "<|begin_of_text|>"), "eos_token": ("</s>", "<|end_of_text|>")}
        ends = _ends(path, usual, self.tokenizer.token_to_id)
        (_, self.bos_id), (_, self.eos_id) = ends
        whole = self.tokenizer.encode("a", add_special_tokens=True)  # as the file's own post-processor says
        self.begin = whole.ids[: len(list(itertools.takewhile(bool, whole.special_tokens_mask)))]
        added = self.tokenizer.get_added_tokens_decoder()
        beside = {n: token for n, token in beside.items() if self.tokenizer.token_to_id(n) == token["id"]}
        self.special = dict(ends) | {token.content: i for i, token in added.items() if token.special}
        self.special |= {name: token["id"] for name, token in beside.items() if token["special"]}
        all_names = {*self.special, *beside, *(token.content for token in added.values())}
        self.names = {name for name in all_names if _marks(name, name in self.special)}
        late = [name for name, i in self.special.items() if i in added and not added[i].special]
        if late:  # to `encode` too
            self.tokenizer.add_special_tokens([self._added_token(name) for name in late])

    def _add(self, path: Path, lacking: dict[str, dict]) -> None:
        """Add the tokens that only the files beside know; ValueError where their ids are not the next ones."""
        import tokenizers

        lacking = _without_padding(lacking, self.tokenizer.get_vocab_size(with_added_tokens=True))
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
        return parser

    def _added_token(self, name: str):
        """As the file says of it, but found in a text as it stands."""
        import tokenizers

        token = self.tokenizer.get_added_tokens_decoder().get(self.tokenizer.token_to_id(name))
        options = OPTIONS[:3] if token is not None else ()
        return tokenizers.AddedToken(name, normalized=False, **{option: getattr(token, option) for option in options})

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
