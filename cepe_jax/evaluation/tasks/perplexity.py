"""The perplexity of held-out windows: nll of their last tokens, after contexts of one kind and number."""

import functools
import glob
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.corpus import Corpus, PrepareConfig
from cepe_jax.data.examples import RETRIEVED, Document, ExampleConfig
from cepe_jax.data.loader import Sequences
from cepe_jax.data.recipes import WindowsInContext
from cepe_jax.data.records import DATASET, Records
from cepe_jax.data.sources import RawDocument, plan, read
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import LanguageModel, Prompt
from cepe_jax.evaluation.tasks.evaluation import Point, Unit
from cepe_jax.evaluation.tasks.selection import reservoir_by_domain
from cepe_jax.identity import as_json
from cepe_jax.parsing import Seed

Kind = Literal["previous", "other", "retrieved"]  # the text before the window; another document's; passages found
DOCUMENTS = 16  # of a domain, from which sliding windows are drawn at least: no long book has them all


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The nll of the last tokens of held-out windows. The axis is the number of contexts."""

    data: Path  # a dataset of documents or of retrieved passages; or raw documents, a file or a directory of such
    chunks: tuple[int, ...]  # numbers of contexts, 0 for none: all are measured on the same windows
    window: int  # tokens of the document that the decoder reads
    scored: int  # last tokens of the window, whose nll counts
    kinds: tuple[Kind, ...] = ("previous",)  # contexts: the text before, another document's, or retrieved passages
    chunk_length: int = 256  # tokens of a context, of retrieved ones the most
    place: Literal["last", "middle", "sliding"] = "last"  # one window of a document, or all a stride apart
    stride: int = 0  # sliding: tokens from a window to the next; 0 = scored, so that no token is scored twice
    windows: int = 0  # windows of a domain at most, few of each document, drawn by the seed; 0 = all
    split: str = "test"  # split of a dataset
    seed: Seed = 0  # draws the windows

    section = family = "perplexity"
    origin = Point("none", 0)
    axis_name = "tokens of context"
    unit = Unit("nats per token", scale=1, digits=4, lower_is_better=True, exponential="perplexity")

    def __post_init__(self):
        if min(self.chunks, default=-1) < 0 or len(set(self.chunks)) < len(self.chunks):
            raise ValueError(f"chunks is {list(self.chunks)}: give different numbers, 0 for no context")
        check_chunk_length(self.chunk_length)
        if not 0 < self.scored < self.window:
            raise ValueError(f"scored is {self.scored}: give 1 or more, and fewer than the window's {self.window}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or {"retrieved"} < set(self.kinds):
            raise ValueError(f"kinds is {list(self.kinds)}: give previous, other or both, or retrieved alone")
        if self.stride < 0 or (self.stride and self.place != "sliding"):
            raise ValueError(f"stride is {self.stride}: give a number of tokens, where place is sliding alone")
        if self.windows < 0:
            raise ValueError(f"windows is {self.windows}: give a number, or 0 for all")

    @property
    def context(self) -> int:
        """Tokens that a window has before it: of the most chunks."""
        return max(self.chunks) * self.chunk_length

    @property
    def to_draw(self) -> int:
        """Windows of a domain whose documents are held: of two documents, for one of them is the other's other."""
        return max(self.windows, 2)

    def starts(self, length: int) -> Sequence[int]:
        """Return the starts of the windows in a text of this length; none if it is too short for the longest context.

        If windows are drawn, those of one text are few, and spread evenly over it.
        """
        last = length - self.window
        if last < self.context:
            return range(0)
        if self.place == "sliding":
            every = range(self.context, last + 1, self.stride or self.scored)
            most = max(self.windows // DOCUMENTS, 1) if self.windows else len(every)
            return every if len(every) <= most else [every[i * len(every) // most] for i in range(most)]
        start = last if self.place == "last" else max(self.context, last // 2)
        return range(start, start + 1)

    def points(self) -> list[Point]:
        numbers = sorted(self.chunks)
        return [point for n in numbers for point in ([Point(kind, n) for kind in self.kinds] if n else [self.origin])]

    def on_axis(self, value: int) -> int:
        return value * self.chunk_length

    def values(self, record: dict) -> dict[str, float]:
        return {"nll": record["nll"]}

    def group_of(self, record: dict) -> str:
        """Return the document: its windows are dependent."""
        return record["document"]

    def identity(self) -> dict:
        """Return all settings except `kinds`, and of `chunks` the largest, for which every window has room."""
        settings = as_json(self)
        del settings["kinds"]
        return settings | {"chunks": max(self.chunks)}

    def facts(self) -> dict:
        return {}

    def places(self) -> dict[Path, str]:
        return {self.data: ""}

    def refusal(self, reads: str) -> str:
        return ""

    def note(self) -> str:
        return (
            f"nll of the last {self.scored} of {self.window} tokens, in nats per token, and in brackets the "
            f"perplexity, exp of the mean. A column for each number of contexts, of {self.chunk_length} tokens or "
            f"fewer. ± is the standard error, which takes windows of one document for dependent; n counts windows, and "
            f"where they are fewer, documents. Gains are paired by window; positive is better."
        )

    def measure(self, point: Point, model: LanguageModel) -> Iterator[dict]:
        """Yield a record of each window: nll of its scored tokens in nats per token, beside `point.value` contexts.

        The contexts are those before the window in their order, or the best passages, the best one last.
        """
        kind, count = point
        for window in iter_windows(self, model.tokenizer):
            if count and kind not in window.contexts:
                raise ValueError(f"{self.data} has contexts of the kinds {', '.join(window.contexts)}, and not {kind}")
            contexts = window.contexts[kind][-count:] if count else []
            if len(contexts) < count:
                raise ValueError(
                    f"{self.data}: {len(contexts)} passages were found for {window.document}, and {count} are asked "
                    f"for: retrieve with a larger --k, or lower chunks"
                )
            scores = window.scores[-count:] if window.scores and count else None
            ids = window.tokens.tolist()
            prompt = Prompt(ids[: -self.scored], [context.tolist() for context in contexts], scores)
            begun = time.perf_counter()
            (score,) = model.score(prompt, [ids[-self.scored :]])
            seconds = time.perf_counter() - begun
            name = f"{window.document}:{window.start}"
            nll = -score.total / self.scored
            if not math.isfinite(nll):
                raise ValueError(f"nll of {name} is {nll}: the model's probabilities are no numbers there")
            yield {
                "id": name,
                "document": window.document,
                "domain": window.domain,
                "nll": nll,
                "scored": self.scored,
                "read": len(ids) + sum(map(len, contexts)),
                "seconds": seconds,
            }


@dataclass(frozen=True)
class Window:
    document: str
    domain: str
    start: int  # the window's first token in its document
    tokens: np.ndarray
    contexts: dict[Kind, list[np.ndarray]]  # of each kind the most that are asked for, what matters most last
    scores: list[float] | None = None  # of retrieved contexts


def iter_windows(config: Perplexity, tokenizer: Tokenizer) -> Iterator[Window]:
    """Yield the windows, the same at every point. ValueError if there are none."""
    if not config.data.exists():
        raise FileNotFoundError(f"{config.data}: no such file or directory")
    if not (config.data / DATASET).exists() and not (config.data / "units").exists():
        return _in_documents(config, _raw_documents(config, tokenizer))
    records = Records(config.data, config.split)
    if records.index["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(
            f"{config.data} has other tokens than those of the model at {tokenizer.path}: prepare it with the model's "
            f"tokenizer, or give raw documents"
        )
    if records.name == RETRIEVED:
        return _with_passages(config)
    return _in_documents(config, _prepared_documents(config))


def _in_documents(config: Perplexity, documents: Iterable[Document]) -> Iterator[Window]:
    """Yield windows of these documents.

    `other` contexts end where that document's own window starts: window i uses its window i, or its last one.
    """

    def starts(document: Document) -> Sequence[int]:
        return config.starts(len(document.tokens))

    def before(document: Document, end: int) -> list[np.ndarray]:
        step = config.chunk_length
        return [document.tokens[at : at + step] for at in range(end - config.context, end, step)]

    document = None
    remaining: dict[str, int] = {}  # windows that a domain may still have
    for document, other in _pairs(document for document in documents if starts(document)):
        if document is other and "other" in config.kinds:
            raise ValueError(f"{config.data}: only {document.name} is long enough, and other needs two documents")
        own, others = starts(document), starts(other)
        if config.windows:
            own = own[: remaining.setdefault(document.domain, config.windows)]
            remaining[document.domain] -= len(own)
        for number, start in enumerate(own):
            contexts = {
                "previous": before(document, start),
                "other": before(other, others[min(number, len(others) - 1)]),
            }
            tokens = document.tokens[start : start + config.window]
            yield Window(document.name, document.domain, start, tokens, contexts)
    if document is None:
        raise ValueError(
            f"{config.data}: no document has the {config.context + config.window} tokens of the longest context and "
            f"the window: lower chunks or window"
        )


def _pairs(documents: Iterable[Document]) -> Iterator[tuple[Document, Document]]:
    """Each document and the next one of its domain, the first after the last; two of each domain are held.

    With one that is alone in its domain goes another domain's, and only where there is no other, itself.
    """
    first: dict[str, Document] = {}
    last: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.domain, document)
        if document.domain in last:
            yield last[document.domain], document
        last[document.domain] = document
    for domain, document in last.items():
        others = (one for other, one in first.items() if other != domain)
        yield document, first[domain] if document is not first[domain] else next(others, document)


def _prepared_documents(config: Perplexity) -> Iterator[Document]:
    corpus = Corpus(config.data, config.split)
    for number in _numbers(corpus.records, config, config.to_draw, lambda length: len(config.starts(length - 2))):
        document = corpus[number]
        yield Document(document.name, document.tokens[1:-1], document.domain)  # neither BOS nor EOS is text


def _with_passages(config: Perplexity) -> Iterator[Window]:
    sizes = ExampleConfig(window=config.window, chunk_length=config.chunk_length)
    sequences, most = Sequences(config.data, WindowsInContext(sizes), config.split), max(config.chunks)
    first_scored = config.window - config.scored
    if (query := sequences.query["query_tokens"]) > first_scored:
        raise ValueError(
            f"{config.data}: its passages were found for the first {query} tokens, and tokens from {first_scored} on "
            f"are scored: lower scored"
        )
    for number in _numbers(sequences.records, config, config.windows, lambda length: 1):
        record = sequences[number]
        document, _, start = record["name"].split("\n")[0].rpartition("@")
        rows = zip(record["passages"][:most], record["lengths"][:most], strict=True)
        yield Window(
            document,
            record["domain"],
            int(start),
            record["tokens"][: config.window],
            {"retrieved": [row[:length] for row, length in rows][::-1]},
            record["scores"][:most].tolist()[::-1],
        )


def _numbers(records: Records, config: Perplexity, most: int, windows_in: Callable[[int], int]) -> list[int]:
    """The numbers of the records to read, where windows are drawn those with the `most` first ones of each domain.

    `windows_in` counts the windows in one of so many tokens.
    """
    table = sorted(
        (int(number), domain, windows_in(int(length)))
        for shard in range(len(records.facts["shards"]))
        for domain, of_domain in records.lengths(shard).items()
        for number, length in zip(*of_domain, strict=True)
    )
    if not config.windows:
        return [number for number, _, count in table if count]
    draws = np.random.default_rng(config.seed).random(len(records))
    candidates = ((domain, draws[number], (number, count)) for number, domain, count in table)
    return reservoir_by_domain(candidates, most, lambda item: item)


def _raw_documents(config: Perplexity, tokenizer: Tokenizer) -> Iterable[Document]:
    """Documents of files as `prepare_data.py` reads them, tokenised: all, one after another, or those that are drawn.

    ValueError for one that cannot be read.
    """
    if config.windows:
        return _drawn_documents(config, tokenizer)
    return (_tokenised(raw, tokenizer) for raw in _long_enough(config))


@functools.lru_cache(maxsize=1)  # for the next number of chunks: to read all files again may take minutes
def _drawn_documents(config: Perplexity, tokenizer: Tokenizer) -> list[Document]:
    def candidates() -> Iterator[tuple[str, float, RawDocument]]:
        for raw in _long_enough(config):
            digest = hashlib.sha256(f"{config.seed}:{raw.name}".encode()).digest()
            yield raw.domain, int.from_bytes(digest[:8], "big") / 2**64, raw

    def read_windows(raw: RawDocument) -> tuple[Document, int]:
        document = _tokenised(raw, tokenizer)
        return document, len(config.starts(len(document.tokens)))

    return reservoir_by_domain(candidates(), config.to_draw, read_windows)


def _long_enough(config: Perplexity) -> Iterator[RawDocument]:
    """The documents that may have a window: no token is less than a byte but one, which tokenizers put first."""
    root, patterns = config.data, PrepareConfig.patterns
    if config.data.is_file():
        root, patterns = config.data.parent, (glob.escape(config.data.name),)
    for unit in plan(root, patterns, (), PrepareConfig.unit_bytes):
        for extent in unit:
            for raw in read(root, extent, domain_field=""):
                if raw.text is None:
                    raise ValueError(f"{raw.fault}: mend it, or take it out")
                if config.starts(len(raw.text.encode()) + 1):
                    yield raw


def _tokenised(raw: RawDocument, tokenizer: Tokenizer) -> Document:
    return Document(raw.name, np.array(tokenizer.encode(raw.text), np.int32), raw.domain)
