"""Text in, text out: a model with its tokenizer, over contexts of any length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cepe_jax.config import CepeConfig, Compute, DecoderConfig, Dtype, EncoderConfig
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.caches import FULL, Policy
from cepe_jax.inference.chat import MAX_NEW_TOKENS, Chat, ChatSetup, chat_setup
from cepe_jax.inference.context import ContextCache, DeviceMemories, encode, encoder_identity, stacked
from cepe_jax.inference.detokenize import pieces
from cepe_jax.inference.generate import GREEDY, Sampling, check_new_tokens, check_reads_contexts, stream
from cepe_jax.inference.overflow import Overflow, check_encoder, check_moves, fit, fit_continued
from cepe_jax.inference.scoring import Score, score
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.parsing import read_json, shortened
from cepe_jax.weights.build import Source, build
from cepe_jax.weights.hf_config import Facts, window_of
from cepe_jax.weights.source import open_model, open_ours

CHUNK_LENGTH = 256  # tokens of a context that the encoder reads at once: the length of the paper's training
Contexts = ContextCache | Sequence[ContextCache] | None


@dataclass(frozen=True, eq=False)
class TextModel:
    """A model with its tokenizer: text in, text out.

    A prompt begins as the tokenizer says; contexts do not. An answer ends before one of `stop_ids`.
    """

    model: Cepe | Llama = field(repr=False)
    tokenizer: Tokenizer
    window: int | None  # tokens that the decoder reads at most, new ones too; None: no bound is known
    stop_ids: tuple[int, ...]
    cache: Policy = FULL
    _on_devices: DeviceMemories = field(default_factory=DeviceMemories, init=False, repr=False)

    @property
    def has_encoder(self) -> bool:
        return isinstance(self.model, Cepe)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The identity of the contexts that this model's encoder writes."""
        check_reads_contexts(self.model)
        return encoder_identity(self.model, self.tokenizer)

    def encode(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        chunk_length: int = CHUNK_LENGTH,
        known: ContextCache | None = None,
    ) -> ContextCache:
        """Return what the encoder says of each text, or list of ids, for any number of calls.

        A text that `known` holds is not read again.
        """
        if isinstance(texts, str) or any(isinstance(text, int | np.integer) for text in texts):
            raise ValueError("encode got one text: give a list of texts, or of lists of ids")
        passages = [self.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        return encode(self.model, passages, self.identity, chunk_length, known)

    def generate(
        self,
        prompt: str | Sequence[str],
        context: Contexts = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        overflow: Overflow = "error",
        chunk_length: int = CHUNK_LENGTH,
    ) -> str | list[str]:
        """Return what the model writes after the prompt, or after each of several, at most to the first of `stop`.

        All prompts read one context, or each its own of a list. What `overflow` says of a prompt that does not fit:
        "error" refuses it; "truncate_left" lets the decoder read its last tokens, "passages" its last passages (parts
        between blank lines), and the encoder what stands before, in chunks of `chunk_length` tokens. A plain decoder
        takes "truncate_left", and reads nothing of what stands before.
        """
        rows, memory = self._rows(prompt, context, max_new_tokens, overflow, chunk_length)
        written = self._pieces(rows, memory, max_new_tokens, sampling, stop)
        texts = ["".join(of_row) for of_row in zip(*written, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self,
        prompt: str,
        context: ContextCache | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        overflow: Overflow = "error",
        chunk_length: int = CHUNK_LENGTH,
    ) -> Iterator[str]:
        """Yield what `generate` gives, a piece a token ("" while a character or a stop string may be incomplete)."""
        rows, memory = self._rows(prompt, context, max_new_tokens, overflow, chunk_length)
        return (piece for (piece,) in self._pieces(rows, memory, max_new_tokens, sampling, stop))

    def score(
        self,
        prompt: str,
        continuations: Sequence[str],
        context: ContextCache | None = None,
        *,
        overflow: Overflow = "error",
        chunk_length: int = CHUNK_LENGTH,
    ) -> list[Score]:
        """Score each text after the prompt; prompt and context are read once.

        `overflow` as for `generate`: the longest continuation is what must fit beside the prompt; where continuations
        begin within its last token, `fit_continued` says.
        """
        if not continuations:
            return []
        check_encoder(overflow, self.has_encoder)
        fitted = fit_continued(prompt, continuations, self.tokenizer, self._bound(overflow), overflow, chunk_length)
        moved, before, after = fitted
        context = self._with(context, moved, chunk_length)
        return score(self.model, before, after, self._memory([context]), self.cache)

    def chat(
        self,
        system: str | None = None,
        context: ContextCache | None = None,
        *,
        documents: Sequence[str] = (),
        overflow: Overflow = "error",
        chunk_length: int = CHUNK_LENGTH,
    ) -> Chat:
        """Return a conversation by the chat template beside the tokenizer; of any length if there is an encoder.

        The template writes the documents into the prompt, where the decoder reads them; ValueError if it does not.

        `overflow` is for a plain decoder: with "error" a turn is refused for which the window has no room, with
        "truncate_left" the oldest tokens are dropped, `chunk_length` at a time. `chat_setup` states the effect of a
        bounded cache.
        """
        return self.begin(chat_setup(self, system, overflow, chunk_length, documents), context)

    def begin(self, setup: ChatSetup, context: ContextCache | None = None) -> Chat:
        """Return a conversation with this setup, which `chat_setup` has made for this model."""
        if context is not None:
            context.check_is_of(self.identity, "the context")
        elif self.has_encoder:
            context = ContextCache(self.identity)
        return Chat(self.model, setup, self.stop_ids, context)

    def _rows(
        self, prompt: str | Sequence[str], context: Contexts, max_new_tokens: int, overflow: Overflow, chunk_length: int
    ) -> tuple[list[list[int]], Memory | None]:
        """Return what the decoder reads of each prompt, and the memory that it reads beside."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not all(isinstance(one, str) for one in prompts):
            raise ValueError(f"prompt is {shortened(prompt)}: give a text, or a list of texts")
        check_new_tokens(max_new_tokens)
        shared = context is None or isinstance(context, ContextCache)
        contexts = [context] * len(prompts) if shared else list(context)
        check_encoder(overflow, self.has_encoder)
        if len(contexts) != len(prompts):
            raise ValueError(f"{len(contexts)} contexts for {len(prompts)} prompts: give one, or one for each")
        rows = []
        for row, prompt in enumerate(prompts):
            moved, read = fit(prompt, self.tokenizer, self._bound(overflow), max_new_tokens, overflow, chunk_length)
            rows.append(read)
            contexts[row] = self._with(contexts[row], moved, chunk_length)
        return rows, self._memory(contexts)

    def _bound(self, overflow: Overflow) -> int | None:
        return prompt_window(self.window, self.cache, overflow)

    def _with(self, context: ContextCache | None, moved: list[list[int]], chunk_length: int) -> ContextCache | None:
        """Return the context with what is moved to it; a plain decoder drops that."""
        if not moved or not self.has_encoder:
            return context
        more = encode(self.model, moved, self.identity, chunk_length)
        return more if context is None else context + more

    def _memory(self, contexts: list[ContextCache | None]) -> Memory | None:
        for context in contexts:
            if context is not None:
                context.check_is_of(self.identity, "the context")
        if all(context is contexts[0] for context in contexts):
            return None if not contexts or contexts[0] is None else self._on_devices.of(contexts[0])
        return stacked([ContextCache(self.identity) if context is None else context for context in contexts])

    def _pieces(
        self,
        rows: list[list[int]],
        memory: Memory | None,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling],
        stop: Sequence[str],
    ) -> Iterator[list[str]]:
        """The next piece of each row's text, step by step."""
        limits = {"max_new_tokens": max_new_tokens, "stop_ids": self.stop_ids}  # `fit` has looked at the window
        steps = stream(self.model, rows, memory, sampling=sampling, policy=self.cache, **limits)
        return pieces(self.tokenizer, rows, steps, stop)


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """The facts in the config and the tokenizer of a model that writes text; no weight is read yet."""

    source: Source
    config: CepeConfig | DecoderConfig  # the source's, unless a caller wants another over the same tensors
    tokenizer: Tokenizer
    window: int | None
    stop_ids: tuple[int, ...]
    cache: Policy = FULL

    @property
    def has_encoder(self) -> bool:
        return isinstance(self.config, CepeConfig)

    @property
    def decoder(self) -> DecoderConfig:
        return self.config.decoder if isinstance(self.config, CepeConfig) else self.config

    def load(self, dtype: Dtype, verify: bool = False) -> TextModel:
        """Return the model; with `verify` its directory, which is in our format, is compared with hash.json before."""
        if verify:
            open_ours(self.source.path).verify()
        model = build(self.config, Compute(dtype), self.source.read)
        return TextModel(model, self.tokenizer, self.window, self.stop_ids, self.cache)


def prompt_window(window: int | None, cache: Policy, overflow: Overflow) -> int | None:
    """Return how many tokens of a prompt the decoder reads at most; None is no limit.

    A policy for texts of any length imposes no limit, unless `overflow` moves the excess: then the limit is what stays
    in the cache. ValueError if everything stays, so that nothing is to be moved.
    """
    if not cache.any_length:
        return window
    check_moves(cache, overflow)
    return None if overflow == "error" else cache.window


def read_facts(
    path: Path | str,
    tokenizer: Path | str | Tokenizer | None = None,
    window: int | None = None,
    cache: Policy = FULL,
) -> ModelFacts:
    """Return the facts of the model at `path`, settings as of `load`; ValueError for what cannot be loaded."""
    if not hasattr(cache, "create"):
        raise ValueError(f"cache is {shortened(cache)}: give a policy of cepe_jax.inference.caches, as Rolling(2048)")
    source = open_model(path)
    config = source.config
    if type(config) not in (CepeConfig, DecoderConfig):
        kind = "an encoder" if isinstance(config, EncoderConfig) else "a reward model"
        raise ValueError(f"{path} is {kind}, which writes no text: give a CEPE model or a decoder")
    read = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(path if tokenizer is None else tokenizer)
    read.check_is_of(path)
    cepe = isinstance(config, CepeConfig)
    parts = {"decoder": config.decoder, "encoder": config.encoder} if cepe else {"decoder": config}
    for name, part in parts.items():
        if read.vocab_size > part.vocab_size:
            raise ValueError(
                f"{read.path} has {read.vocab_size} ids and the {name} of {path} knows {part.vocab_size}: it is "
                f"another model's tokenizer, give this one's"
            )
    positions = window_of(source.facts)
    if cache.any_length:
        if window is not None:
            instead = "leave it out" if cache.window is None else "give cache.window"
            raise ValueError(f"window is {window}: with this cache the decoder reads texts of any length, {instead}")
    elif window is None:
        window = positions
    elif window < 2 or (positions is not None and window > positions):
        most = "" if positions is None else f", and at most {positions}, what {path} was trained for"
        raise ValueError(f"window is {window}: give 2 or more{most}")
    cache = cache.of(source.path, config.decoder if isinstance(config, CepeConfig) else config, positions)
    return ModelFacts(source, config, read, window, _stop_ids(source, read), cache)


def load(
    path: Path | str,
    dtype: Dtype = "float32",
    tokenizer: Path | str | Tokenizer | None = None,
    window: int | None = None,
    cache: Policy = FULL,
    verify: bool = False,
) -> TextModel:
    """Return the model at `path`, a directory of ours or one of Hugging Face's, with the tokenizer beside it.

    `tokenizer`: it, or where it is, if not beside the model. `window`: how many tokens the decoder reads at most, where
    that is not the directory's max_position_embeddings. `cache`: what it keeps and reads of them.
    `verify`: whether all weights are first compared with hash.json, which takes a second reading.
    Under a mesh (`jax.set_mesh`) the weights are born sharded.
    """
    return read_facts(path, tokenizer, window, cache).load(dtype, verify)


def _stop_ids(source: Source, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end of sequence, and the ids that end a text by generation_config.json, or config.json without it."""
    where = source.path / "generation_config.json"
    ends = read_json(where, Facts).eos_token_id if where.exists() else source.facts.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(sorted({tokenizer.eos_id, *ends}))
