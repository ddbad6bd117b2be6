"""Text to ids and back: SentencePiece models, and `tokenizer.json` where there is no SentencePiece model."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from cepe_jax.directories import staged_path

PART = 1 << 14  # characters that are encoded as one string where a cut changes nothing
MAX_SENTENCE = 1 << 20  # bytes of one text in training
NAMES = "tokenizer.model", "tokenizer.json"  # what a directory's tokenizer is called; the first that is there


class Tokenizer:
    """One tokenizer for decoder and encoder.

    `vocab_size` ids; `bos_id` and `eos_id`; `mask_id` = vocab_size is the encoder's extra id: no text contains it.
    Special tokens written out in a text are text, but for `encode_special`; `special` has their ids by name.
    """

    def __init__(self, path: str | Path):
        """Reads `path`: a `.model` or `tokenizer.json` file, or a directory that holds one (the `.model` wins)."""
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in NAMES if (path / name).exists()]
            if not found:
                raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this directory")
            path = found[0]
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer")
        self.path = path
        self._impl = _HuggingFace(path) if path.suffix == ".json" else _SentencePiece(path)
        self.vocab_size, self.bos_id, self.eos_id = self._impl.vocab_size, self._impl.bos_id, self._impl.eos_id
        self.special: dict[str, int] = self._impl.special

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        _check_unicode(text)
        return [self.bos_id] * bos + self._impl.encode(text) + [self.eos_id] * eos

    def encode_special(self, text: str, escape: str = "", continues: bool = False) -> list[int]:
        """The ids of a text in which special tokens, written out, are those tokens: what a chat template gives.

        A name that contains the character `escape` is text; the character is taken out. `continues`: the text goes on
        after another one, so that a space which the tokenizer puts before every text is left out.
        """
        _check_unicode(text)
        if continues:
            before, ids = self._impl.encode_special("\n", escape), self._impl.encode_special("\n" + text, escape)
            if ids[: len(before)] == before:  # else the newline is part of a longer piece: nothing is put before
                return ids[len(before) :]
        return self._impl.encode_special(text, escape)

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
        if any((Path(directory) / name).exists() for name in NAMES):
            other = Tokenizer(directory)
            if other.fingerprint() != self.fingerprint():
                raise ValueError(f"{self.path} is not the tokenizer of {directory}: use {other.path}")


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


def _named_beside(path: Path) -> dict[str, int]:
    """The special tokens that tokenizer_config.json beside `path` names, and their ids."""
    named = settings_beside(path).get("added_tokens_decoder", {})
    return {token["content"]: int(i) for i, token in named.items() if token.get("special")}


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
        self.decode = self.processor.decode
        self._newline = self._newline_prefix()
        piece, named = self.processor.id_to_piece, _named_beside(path)
        known = {name: i for name, i in named.items() if i < self.vocab_size and piece(i) == name}
        self.special = known | {piece(i): i for i in range(self.vocab_size) if self.processor.is_control(i)}
        self._special_ids, self._foreign = set(self.special.values()), set(named) - set(self.special)
        self._names = re.compile("|".join(sorted(map(re.escape, {*self.special, *named}), key=len, reverse=True)))
        self._path = path

    def encode(self, text: str) -> list[int]:
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

    def encode_special(self, text: str, escape: str) -> list[int]:
        """Each text between special tokens is encoded by itself, as Meta's own code does."""
        ids, names = [], [*self._names.findall(text), None]
        for part, name in zip(self._names.split(text), names, strict=True):
            between = self.encode(part.replace(escape, ""))
            if escape and escape in part and self._special_ids & set(between):  # the model finds the name in any text
                between = [i for piece in part.split(escape) for i in self.encode(piece)]
            if name in self._foreign:
                beside = "which tokenizer_config.json names: put the model's tokenizer.json in its place"
                raise ValueError(f"{self._path} has no token {name}, {beside}")
            ids += between if name is None else [*between, self.special[name]]
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
        self.special = {self.tokenizer.id_to_token(i): i for i in (self.bos_id, self.eos_id)}
        self.special |= {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special |= {n: i for n, i in _named_beside(path).items() if self.tokenizer.token_to_id(n) == i}

    @cached_property
    def _parser(self):
        """A copy of the tokenizer that finds special tokens in a text as it stands, before it is normalised."""
        import tokenizers

        parser = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        added = parser.get_added_tokens_decoder()
        options = {i: {"lstrip": added[i].lstrip, "rstrip": added[i].rstrip} for i in added}
        names = self.special.items()
        parser.add_special_tokens([tokenizers.AddedToken(n, normalized=False, **options.get(i, {})) for n, i in names])
        return parser

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

    def encode_special(self, text: str, escape: str) -> list[int]:
        """As the library finds special tokens; normalising, which comes after, takes the escape out."""
        from tokenizers import normalizers

        own = self.tokenizer.normalizer
        steps = [normalizers.Replace(escape, "")] * bool(escape) + [own] * (own is not None)
        self._parser.normalizer = normalizers.Sequence(steps)
        return self._parser.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def table(self):
        return (self.tokenizer.to_str(),)


def training_pieces(text: str) -> Iterator[str]:
    """The text in pieces that SentencePiece takes: it drops what is longer than MAX_SENTENCE. Lines stay whole."""
    most, start = MAX_SENTENCE // 4, 0  # a character has up to four bytes
    while len(text) - start > most:
        end = text.rfind("\n", start, start + most) + 1 or start + most
        yield text[start:end]
        start = end
    yield text[start:]


def train(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """A byte-fallback BPE model at `path` that gives texts back exactly: newlines, tabs and indents are kept.

    One character is not: U+2581, which SentencePiece writes for a space, comes back as one.
    """
    staged, faults, refusal = staged_path(path), [], None

    def watched() -> Iterator[str]:
        try:
            yield from texts
        except Exception as error:  # of the texts: SentencePiece would make a RuntimeError of its traceback
            faults.append(error)

    try:
        with open(staged, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=watched(),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                split_digits=True,
                max_sentence_length=MAX_SENTENCE,
                num_threads=2,
                minloglevel=2,
            )
    except RuntimeError as error:
        refusal = str(error).strip().splitlines()[-1]
    if faults or refusal:
        staged.unlink()
        raise faults[0] if faults else ValueError(f"cannot train {vocab_size} pieces on these texts: {refusal}")
    staged.rename(path)
    return Tokenizer(path)
