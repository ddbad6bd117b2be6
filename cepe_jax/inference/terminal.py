"""The work of scripts/generate.py: files, the terminal, and one model between them."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cepe_jax.checks import check_chunk_length
from cepe_jax.config import Dtype
from cepe_jax.data.retriever import Chunk, Retriever
from cepe_jax.data.sources import decoded
from cepe_jax.devices import Devices, on_devices, peak_memory
from cepe_jax.exits import in_one_line
from cepe_jax.inference.answers import PromptRetrieval, after_chunks, reader_of
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.inference.chat import MAX_NEW_TOKENS, Chat, chat_setup
from cepe_jax.inference.context import ContextCache
from cepe_jax.inference.detokenize import StopStrings
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.overflow import Overflow, check_encoder, fit
from cepe_jax.inference.text import CHUNK_LENGTH, ModelFacts, TextModel, prompt_window, read_facts


@dataclass(frozen=True)
class GenerateConfig:
    model: Path  # a model directory
    tokenizer: Path | None = None  # its file or directory; None: beside the model
    prompt: str = ""  # text to continue
    chat: bool = False  # a conversation on standard input instead of a prompt
    system: str | None = None  # system message of a chat; None: the template's own
    document_file: tuple[Path, ...] = ()  # files of text that the chat template writes into the prompt
    context_file: tuple[Path, ...] = ()  # files of text that the encoder reads
    contexts: Path | None = None  # a file of encoded contexts: those in it are not encoded again, new ones are added
    corpus: Path | None = None  # documents that are searched for the prompt: a folder of texts, or a dataset of them
    retrieve: PromptRetrieval | None = None  # the search in the corpus
    chunk_length: int = CHUNK_LENGTH  # tokens that the encoder reads at once
    window: int | None = None  # tokens that the decoder reads at most; None: the model directory's
    cache: CacheConfig = CacheConfig()  # what the decoder keeps and reads of the tokens before
    max_new_tokens: int = MAX_NEW_TOKENS  # tokens of an answer at most
    stop: tuple[str, ...] = ()  # texts before the first of which an answer ends
    overflow: Overflow = "error"  # a prompt longer than the window: refused, or its beginning goes to the encoder
    sampling: Sampling = Sampling()  # how the next token is drawn
    dtype: Dtype = "float32"  # type of weights and activations
    verify: bool = False  # first compare the whole directory, which is in our format, with its hash.json
    mesh: Devices = Devices()  # how devices share the model and the contexts
    timings: bool = False  # print seconds and tokens per second on stderr

    def __post_init__(self):
        if bool(self.prompt) == self.chat:
            raise ValueError("give a prompt, or chat for a conversation on standard input")
        if self.system is not None and not self.chat:
            raise ValueError("system is of a chat: put it into the prompt, or give chat")
        if self.document_file and not self.chat:
            raise ValueError("document_file is of a chat: put the text into the prompt, or give chat")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if self.corpus is None and self.retrieve is not None:
            raise ValueError("retrieve is given, and there is no corpus to search: give corpus too")
        if self.corpus is not None and self.chat:
            raise ValueError(f"corpus is {self.corpus}, which is searched for a prompt: give one, or leave corpus out")
        StopStrings(self.stop)
        check_chunk_length(self.chunk_length)


def read_text(path: Path) -> str:
    text, fault = decoded(path.read_bytes(), path)
    if fault:
        raise ValueError(f"{fault}: give text in UTF-8, or leave it out")
    return text


def run_generate(config: GenerateConfig) -> None:
    """Writes what the model says of the prompt, or of each line of standard input, to standard output as it comes."""
    texts = [read_text(path) for path in config.context_file]
    kept, new = config.contexts, bool(texts or config.corpus)
    if kept is not None and (kept.is_dir() or not (kept.parent.is_dir() if new else kept.exists())):
        raise FileNotFoundError(f"{kept}: no such file, and no context_file or no directory to make it")
    facts = read_facts(config.model, config.tokenizer, config.window, config.cache.policy)
    # Whatever this model cannot do is refused before any weight is read.
    if (texts or config.contexts) and not facts.has_encoder:
        raise ValueError(
            f"{config.model} is a plain decoder, which reads no contexts: leave out context_file and contexts, put the "
            f"text into the prompt (overflow truncate_left cuts it), or give a CEPE model"
        )
    setup, chunks = None, []
    if config.corpus is not None:
        chunks, config, more = _retrieved(facts, config)
        texts += more
    if config.chat:
        documents = [read_text(path) for path in config.document_file]
        setup = chat_setup(facts, config.system, config.overflow, config.chunk_length, documents)
        if facts.cache.window is not None:
            goes = "encoded" if facts.has_encoder else "forgotten, except the first ones"
            _note(f"of a conversation the cache keeps {facts.cache.window:,} tokens, and older ones are {goes}")
    else:
        _check_prompt(facts, config)
    with on_devices(config.mesh):
        model = facts.load(config.dtype, config.verify)
        context = _context(model, config, texts)
        if setup:
            _converse(model.begin(setup, context), config)
        else:
            _answer(model, context, config)
            for chunk in chunks:
                last = chunk.start + chunk.length - 1
                _note(f"read: {chunk.document}, tokens {chunk.start:,} to {last:,}, score {chunk.score:.3g}")


def _retrieved(facts: ModelFacts, config: GenerateConfig) -> tuple[list[Chunk], GenerateConfig, list[str]]:
    """Return the best chunks for the prompt, the config with those that the prompt gets, and texts for the encoder."""
    start = time.perf_counter()
    settings = config.retrieve or PromptRetrieval()
    reader = reader_of(settings.into, facts.has_encoder)
    retriever = Retriever.open(config.corpus, facts.tokenizer, settings)
    found = retriever.search(settings.query or config.prompt, settings.k)
    if not found:
        _note(f"no chunk of {config.corpus} has a word of what is searched for: nothing of it is read")
    if config.timings:
        _note(f"corpus: {len(found)} of {len(retriever):,} chunks, {time.perf_counter() - start:.2f} s")
    chunks = retriever.in_order(found)
    if reader == "encoder":
        return found, config, [chunk.text for chunk in chunks]
    return found, replace(config, prompt=after_chunks(config.prompt, chunks)), []


def _check_prompt(facts: ModelFacts, config: GenerateConfig) -> None:
    """Raise ValueError if the prompt does not fit."""
    check_encoder(config.overflow, facts.has_encoder)
    limits = config.max_new_tokens, config.overflow, config.chunk_length
    window = prompt_window(facts.window, facts.cache, config.overflow)
    before, _ = fit(config.prompt, facts.tokenizer, window, *limits)
    if before and not facts.has_encoder:
        _note(f"the first {sum(map(len, before)):,} tokens of the prompt do not fit into the window and are not read")


def _context(model: TextModel, config: GenerateConfig, texts: list[str]) -> ContextCache | None:
    """The contexts to read: of the texts, or where there are none all that are kept. What is new is kept too."""
    if not texts and (config.contexts is None or config.corpus is not None):
        return None
    start = time.perf_counter()
    kept = ContextCache(model.identity)
    if config.contexts is not None and config.contexts.exists():
        kept = ContextCache.load(config.contexts, model.identity)
    context = model.encode(texts, chunk_length=config.chunk_length, known=kept) if texts else kept
    known = {passage.digest for passage in kept.passages}
    new = {passage.digest for passage in context.passages} - known
    if config.contexts is not None and new:
        context.add_to(config.contexts)
    if config.timings:
        size = f"{context.num_tokens:,} tokens, {context.nbytes / 2**20:.1f} MiB"
        _note(f"contexts: {size}, {len(new)} of {len(context)} new, {time.perf_counter() - start:.2f} s")
    return context


def _answer(model: TextModel, context: ContextCache | None, config: GenerateConfig) -> None:
    start = time.perf_counter()
    limits = {"max_new_tokens": config.max_new_tokens, "sampling": _seeded(config.sampling), "stop": config.stop}
    where = {"overflow": config.overflow, "chunk_length": config.chunk_length}
    _show(model.stream(config.prompt, context, **limits, **where), start, config.timings)


def _converse(chat: Chat, config: GenerateConfig) -> None:
    """Answer the lines of standard input. A turn that is refused is told, and the conversation goes on.

    Ctrl-C ends an answer, of which the part that was said stays said; between answers it ends the conversation.
    """
    limits = {"max_new_tokens": config.max_new_tokens, "sampling": _seeded(config.sampling), "stop": config.stop}
    try:
        for line in _lines():
            answer = chat.say(line, **limits)
            try:
                _show(answer, time.perf_counter(), config.timings)
            except KeyboardInterrupt:
                answer.close()
                print(flush=True)
            except ValueError as error:
                print(flush=True)
                _note(f"refused: {in_one_line(error)}")
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _seeded(sampling: Sampling) -> Sampling:
    """Return the sampling with a seed; one that is drawn is told, so that the same command can be repeated."""
    seeded = sampling.seeded()
    if seeded.temperature > 0 and sampling.seed is None:
        _note(f"a seed was drawn: --sampling.seed={seeded.seed} repeats this")
    return seeded


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that say something."""
    terminal = sys.stdin.isatty()
    if terminal:
        _note("Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            text = line.decode("utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            _note(f"not UTF-8 at byte {error.start}: the line was left out")
            continue
        if text.strip():
            yield text


def _show(pieces: Iterable[str], start: float, timings: bool) -> None:
    """Prints the pieces as they come, and with `timings` how long they took since `start`."""
    times = []
    for piece in pieces:
        times.append(time.perf_counter())
        print(piece, end="", flush=True)
    print(flush=True)
    if timings:
        tokens = len(times) - 1  # the last piece is what was held back
        each = f", then {(times[-2] - times[0]) / (tokens - 1):.4f} s a token" if tokens > 1 else ""
        memory = f"{peak_memory() / 2**20:.0f} MiB of memory at most"
        _note(f"{tokens} tokens, the first after {times[0] - start:.2f} s{each}, {memory}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
