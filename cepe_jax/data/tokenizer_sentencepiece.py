"""SentencePiece models, with the tokens that the files beside them add."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from cepe_jax.data.tokenizer_files import (
    Placed,
    added_beside,
    ends_of,
    first_characters,
    marks_turns,
    settings_beside,
    without_padding,
)
from cepe_jax.parsing import check_is_file

PART = 1 << 14  # characters that are encoded as one string where a cut changes nothing
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # how a file in its format begins: a token in base 64, its rank


def is_tiktoken(path: Path) -> bool:
    with open(path, "rb") as file:
        return TIKTOKEN.match(file.read(1024)) is not None


def read_processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model."""
    check_is_file(path)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        processor.id_to_piece(list(range(processor.vocab_size())))
        return processor
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a token is not UTF-8 ({error.reason} in {error.object[:20]}): copy it again"
        ) from None
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
    if is_tiktoken(path):
        other = path.with_name("tokenizer.json")
        mend = f"use {other}" if other.exists() else "put the model's tokenizer.json there"
        raise ValueError(f"{path}: a vocabulary of tiktoken, as Llama 3's, not a SentencePiece model: {mend}")
    raise ValueError(f"{path}: not a SentencePiece model ({reason})")


class SentencePieceTokenizer:
    def __init__(self, path: Path):
        self.processor = read_processor(path)
        size, piece = self.processor.vocab_size(), self.processor.id_to_piece
        ends = self.processor.bos_id(), self.processor.eos_id()
        if min(ends) < 0:
            raise ValueError(f"{path}: has no begin- or end-of-sequence piece: train one with both")
        settings, beside = settings_beside(path), added_beside(path)
        lacking = {n: token for n, token in beside.items() if token["id"] >= size or piece(token["id"]) != n}
        self._added = without_padding(lacking, size)
        own = {n: token for n, token in beside.items() if n not in lacking and marks_turns(n, token["special"])}
        control = {piece(i): i for i in range(size) if self.processor.is_control(i)}
        self._known = control | {name: token["id"] for name, token in (own | self._added).items()}
        self.vocab_size = max(size - 1, *self._known.values()) + 1
        usual = {role: (piece(i),) for role, i in zip(("bos_token", "eos_token"), ends, strict=True)}
        ends = ends_of(path, usual, self._id_of)
        (_, self.bos_id), (_, self.eos_id) = ends
        self.begin = [self.bos_id] * (settings.get("add_bos_token") is not False)  # Llama's default
        self._known |= dict(ends)
        special = {*control, *dict(ends), *(name for name, token in beside.items() if token["special"])}
        self.special = {name: i for name, i in self._known.items() if name in special}
        self.names = {name for name in self._known if marks_turns(name, name in special)}
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
        self._first = first_characters(self._found)

    def _id_of(self, name: str) -> int | None:
        i = self._known.get(name, self.processor.piece_to_id(name))
        return i if name in self._known or self.processor.id_to_piece(i) == name else None

    def parts(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text in parts: each added word is its token, and texts between them stand alone."""
        at = 0
        for word in self._words.finditer(text):
            yield from self._plain(text[at : word.start()], at > 0)
            yield [self._id_in(word)]
            at = word.end()
        yield from self._plain(text[at:], at > 0)

    def _id_in(self, name: re.Match) -> int:
        return self._known[name[0] if name[0] in self._known else name[0].strip()]

    def _plain(self, text: str, inside: bool) -> Iterator[list[int]]:
        """Yield the ids of a text, none of which is a special token's."""
        processor, names = self._inside if inside else self.processor, set(self._found.values())
        starts = self._cuts(text)
        for start, part in zip(starts, _between(text, starts), strict=True):
            prefix = self._prefix(processor) if start else 0
            ids = processor.encode(part)
            if names.isdisjoint(ids):
                yield ids[prefix:]
                continue
            pieces = processor.encode(_between(part, [0, *(name.end() for name in self._first.finditer(part))]))
            pieces[0] = pieces[0][prefix:]
            # A piece that is a name all the same is an unknown word.
            yield [self.processor.unk_id() if i in names else i for piece in pieces for i in piece]

    def _cuts(self, text: str) -> list[int]:
        """Return where the parts of a text begin: SentencePiece slows down with the length of a string."""
        starts = [0]
        if len(text) >= 2 * PART and self._newline is not None:
            while (cut := text.find("\n", starts[-1] + PART)) >= 0:
                starts.append(cut)
        return starts

    def _prefix(self, processor: sentencepiece.SentencePieceProcessor) -> int:
        """Return how many ids stand before those of a later part."""
        return self._newline if processor is self.processor else 0

    def _placed(self, text: str, inside: bool = False) -> Placed:
        """The ids of the whole text, each with its place in it."""
        processor, placed = self._inside if inside else self.processor, []
        starts = self._cuts(text)
        for start, part in zip(starts, _between(text, starts), strict=True):
            found = processor.encode(part, return_type="offset_mapping")
            new = [(i, start + a, start + b) for i, (a, b) in zip(found["ids"], found["offsets"], strict=True)]
            placed += new[self._prefix(processor) :] if start else new
        return placed

    def encode_special(self, text: str, escape: str, written: dict[str, str]) -> Placed:
        """Each text between special tokens is encoded by itself, as Meta's own code does."""
        marks, placed, at = set(self._known.values()), [], 0
        said = re.compile("|".join(map(re.escape, [*written, escape])) if escape else "(?!)")
        for name in [*self._names.finditer(text), None]:
            end = name.start() if name else len(text)
            clean, places, cuts, last = "", [], [0], at  # without escapes; the place of each character; where they were
            for escaped in [*said.finditer(text, at, end), None]:
                stop = escaped.start() if escaped else end
                clean += text[last:stop]
                places += ((n, n + 1) for n in range(last, stop))
                if escaped:
                    cuts.append(len(clean))
                    if escaped[0] in written:
                        clean += written[escaped[0]]
                        places.append(escaped.span())
                        cuts.append(len(clean))
                    last = escaped.end()
            found = self._placed(clean, inside=at > 0)
            if len(cuts) > 1 and marks & {i for i, _, _ in found}:  # the model finds the name in any text
                pieces = zip(cuts, _between(clean, cuts), strict=True)
                found = [(i, cut + a, cut + b) for cut, piece in pieces for i, a, b in self._placed(piece)]
                found = [(self.processor.unk_id() if i in marks else i, a, b) for i, a, b in found]
            places.append((end, end))
            placed += ((i, places[a][0], places[max(a, b - 1)][a < b]) for i, a, b in found)
            if name:
                placed.append((self._id_in(name), *name.span()))
                at = name.end()
        return placed

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


def _between(text: str, starts: list[int]) -> list[str]:
    """Return the parts of a text that begin there."""
    return [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


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
