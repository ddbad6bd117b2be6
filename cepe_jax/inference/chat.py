"""A conversation of any length with a model that has a chat template."""

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cepe_jax.data.template import Message, Template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.caches import Policy
from cepe_jax.inference.context import ContextCache
from cepe_jax.inference.detokenize import Detokenizer, StopStrings
from cepe_jax.inference.generate import GREEDY, Sampling, check_new_tokens
from cepe_jax.inference.overflow import Overflow, check_has_window, check_moves
from cepe_jax.inference.session import Session, check_head
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.parsing import shortened

MAX_NEW_TOKENS = 256  # of an answer


def _first(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


class Speaker(Protocol):
    """A model that converses, or the facts of one whose weights are not read yet."""

    tokenizer: Tokenizer
    window: int | None
    cache: Policy
    has_encoder: bool


@dataclass(frozen=True, eq=False)
class ChatSetup:
    """The beginning of a conversation, and its limits."""

    template: Template
    system: str | None
    window: int | None  # tokens that the decoder reads at most; None = no limit
    chunk_length: int  # tokens that leave the window at a time
    drops: bool  # True = a plain decoder forgets these; False = it refuses a turn for which there is no room
    cache: Policy
    documents: tuple[str, ...] = ()  # texts that the template writes into the prompt

    @property
    def head(self) -> int:
        """The number of tokens before whatever a user says first."""
        messages = _first(self.system)
        escape, ids = self.template.escape_for(messages, self.documents), []
        for text in "AB":
            rendered = self.template.render([*messages, {"role": "user", "content": text}], escape, self.documents)
            ids.append(self.template.tokenizer.encode_special(rendered, escape))
        return len(os.path.commonprefix(ids))


def chat_setup(
    speaker: Speaker, system: str | None, overflow: Overflow, chunk_length: int, documents: Sequence[str] = ()
) -> ChatSetup:
    """Return the setup of a conversation with the model; ValueError if there is no room for one.

    The template writes the documents into the prompt, where they stay.

    A model with an encoder encodes tokens before they would leave a cache for texts of any length. A plain decoder
    forgets them, and its conversations are endless.
    """
    if overflow == "passages":
        raise ValueError("overflow is passages: a conversation is cut anywhere, give truncate_left")
    check_moves(speaker.cache, overflow)
    window, drops = speaker.window, overflow == "truncate_left"
    if speaker.cache.any_length:
        window = speaker.cache.window if speaker.has_encoder else None
    else:
        check_has_window(window)
    template = Template(speaker.tokenizer)
    setup = ChatSetup(template, system, window, chunk_length, drops, speaker.cache, tuple(documents))
    check_head(setup.head, window, chunk_length if speaker.has_encoder or drops else 0)
    return setup


class Chat:
    """`messages`: what was said, with each turn from the end of its answer on.

    What the decoder no longer reads itself is in `context`; see `Session`.
    """

    def __init__(
        self, model: Cepe | Llama, setup: ChatSetup, stop_ids: Sequence[int], context: ContextCache | None = None
    ):
        self.messages = _first(setup.system)
        self._template, self._documents, self._stop_ids = setup.template, setup.documents, set(stop_ids)
        self._parts: list[tuple[str, list[int]]] = []  # the rendered conversation so far, piece by piece, and its ids
        self._answer: Generator[str, None, None] | None = None
        limits = setup.window, setup.head, setup.chunk_length
        self.session = Session(model, *limits, context, setup.drops, setup.cache)

    @property
    def context(self) -> ContextCache | None:
        return self.session.context

    def say(
        self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY, stop: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """The answer, a piece a token ("" while a character or a stop string may be incomplete).

        Wherever it is broken off, by an exception, `close` or the next `say`, what was given out of it stays said. A
        turn that is refused (ValueError before its first token: there is no room) was never said.
        """
        check_new_tokens(max_new_tokens)
        if not isinstance(text, str):
            raise ValueError(f"the turn is {shortened(text)}: give a text")
        if self._answer is not None:
            self._answer.close()
        self._answer = self._said(text, max_new_tokens, sampling, StopStrings(stop))
        return self._answer

    def _said(
        self, text: str, max_new_tokens: int, sampling: Sampling, stop: StopStrings
    ) -> Generator[str, None, None]:
        message, session = {"role": "user", "content": text}, self.session
        before = self._parts, session.ids, session.context, session.moved
        escape = self._ask(message)
        asked, given, refused = session.tokens, "", False
        new = Detokenizer(self._template.tokenizer, asked)
        ids: list[int] = []
        try:
            for _ in range(max_new_tokens):
                token = session.next(sampling)
                if token in self._stop_ids:
                    break
                ids.append(token)
                session.ids.append(token)
                given += (piece := stop.add(new.add(token)))
                yield piece
                if stop.found:
                    break
            given += (piece := "" if stop.found else stop.add(new.end()) + stop.end())
            yield piece
        except ValueError:
            refused = not ids
            raise
        finally:
            if refused:
                self._parts, session.ids, session.context, session.moved = before
            else:
                part = self._template.tokenizer.escaped(self._text(ids, asked), escape), ids
                answer = {"role": "assistant", "content": given}
                self._parts, self.messages = [*self._parts, part], [*self.messages, message, answer]

    def _text(self, ids: list[int], before: list[int]) -> str:
        """Return the text that the ids add to that of `before`."""
        text = Detokenizer(self._template.tokenizer, before)
        return "".join(map(text.add, ids)) + text.end()

    def _ask(self, message: Message) -> str:
        """The session holds the conversation up to where the answer begins; returns the escape it is rendered with.

        Of what was rendered and drawn before, all that the template renders in the same way again keeps its ids.
        """
        escape = self._template.escape_for([*self.messages, message], self._documents)
        rendered = self._template.render([*self.messages, message], escape, self._documents)
        kept, at = [], 0
        for part, ids in self._parts:
            if not rendered.startswith(part, at):
                break
            kept.append((part, ids))
            at += len(part)
        kept.append((rendered[at:], self._template.tokenizer.encode_special(rendered[at:], escape, continues=at > 0)))
        self.session.replace([i for _, ids in kept for i in ids])
        self._parts = kept
        return escape
