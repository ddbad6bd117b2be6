"""lm-evaluation-harness' requests, answered by any model behind the seam."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cepe_jax.data.template import Message, Template
from cepe_jax.evaluation.readers.language_model import LanguageModel, Prompt, generate
from cepe_jax.inference.chat import MAX_NEW_TOKENS
from cepe_jax.inference.overflow import Overflow, TooLong, cut, cut_continued, fit, fit_continued, truncate_left
from cepe_jax.progress import track


@dataclass(frozen=True)
class Splitter:
    """The split of a harness' text: the encoder reads what stands before the decoder's window.

    `overflow` says how a text is cut that something follows; one that is itself predicted is cut into whole windows.
    """

    window: int  # tokens that the decoder reads at most, the answer's too
    overflow: Overflow = "truncate_left"
    chunk_length: int = 256  # tokens


class _Rendered:
    """A reader of texts that a chat template has written: names of special tokens are these tokens.

    `begin`: BOS, where the template writes one, as a tokenizer has it: it stays before what the decoder reads.
    """

    def __init__(self, template: Template):
        self._tokenizer, self.bos_id = template.tokenizer, template.tokenizer.bos_id
        self.begin = self._tokenizer.encode_special(template.render([{"role": "user", "content": "?"}]))[:1]
        if self.begin != [self.bos_id]:
            self.begin = []

    def encode(self, text: str) -> list[int]:
        """The ids after `begin`."""
        ids = self._tokenizer.encode_special(text)
        return ids[1:] if self.begin and ids[:1] == self.begin else ids


class Adapter(LM):
    """`lm_eval.simple_evaluate(Adapter(model, Splitter(window=4096)), tasks=[...])`."""

    def __init__(
        self,
        model: LanguageModel,
        splitter: Splitter,
        template: Template | None = None,
        batch: int = 1,
        note: Callable[[Instance, str], None] = lambda request, why: None,
    ):
        """`template`: of a chat model, where the harness is to apply one. `batch`: answers written at once.

        `note` hears of each request that no overflow mode makes fit, before it is cut and answered.
        """
        super().__init__()
        self.model, self.splitter, self.template, self.batch, self.note = model, splitter, template, batch, note
        self._reader = model.tokenizer if template is None else _Rendered(template)

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "" if self.template is None else str(self.template.where)

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        if self.template is None:
            raise ValueError("the harness wants a chat template: give the adapter one")
        if add_generation_prompt:
            return self.template.render(chat_history)
        *before, begun = chat_history  # an answer that has begun: the model goes on with it
        return self.template.render(before) + begun["content"]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log probability, whether it is the greedy one) of each continuation; a context is read once for all of it.

        Choices of one question stand together in what the harness asks.
        """

        def answered() -> Iterator[tuple[float, bool]]:
            for _, asked in groupby(requests, key=lambda request: request.args[0]):
                for prompt, rows in self._continued(list(asked)):
                    for score in self.model.score(prompt, rows):
                        yield score.total, score.greedy

        return self._kept("loglikelihood", requests, answered())

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log probability of each text, every token predicted once, the encoder reading all before the window."""

        def answered() -> Iterator[float]:
            for request in requests:
                yield sum(
                    self.model.score(prompt, [predicted])[0].total for prompt, predicted in self._windows(*request.args)
                )

        return self._kept("loglikelihood_rolling", requests, answered())

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the model's greedy text after each text; ValueError if the task wants samples."""

        def answered() -> Iterator[str]:
            for _, same in groupby(requests, key=lambda request: request.args[1]):
                alike = list(same)
                for first in range(0, len(alike), self.batch):
                    yield from self._written(alike[first : first + self.batch])

        return self._kept("generate_until", requests, answered())

    def _continued(self, requests: list[Instance]) -> list[tuple[Prompt, list[list[int]]]]:
        """Return prompts and what follows each, in order, for requests of one context."""
        (context, _), (window, overflow, chunk_length) = requests[0].args, self._limits
        try:
            continuations = [request.args[1] for request in requests]
            contexts, ids, rows = fit_continued(context, continuations, self._reader, window, overflow, chunk_length)
        except TooLong as error:
            if len(requests) > 1:
                return [part for request in requests for part in self._continued([request])]
            self.note(requests[0], str(error))
            contexts, ids, row = cut_continued(*requests[0].args, self._reader, window, chunk_length)
            rows = [row]
        return [(Prompt(ids, contexts), rows)]

    def _written(self, requests: list[Instance]) -> list[str]:
        """Return the answers to requests that say alike how they are to be written."""
        how, (window, overflow, chunk_length) = requests[0].args[1], self._limits
        settings = normalize_gen_kwargs(how, MAX_NEW_TOKENS)
        if settings["do_sample"]:
            raise ValueError(f"the task wants samples ({how}): only greedy answers are written, give do_sample false")
        new = settings["max_gen_toks"]
        if new == 0:
            return [""] * len(requests)
        try:
            split = [fit(request.args[0], self._reader, window, new, overflow, chunk_length) for request in requests]
        except TooLong as error:
            if len(requests) > 1:
                return [text for request in requests for text in self._written([request])]
            self.note(requests[0], str(error))
            contexts, ids, new = cut(requests[0].args[0], self._reader, window, new, chunk_length)
            split = [(contexts, ids)]
        prompts = [Prompt(ids, contexts) for contexts, ids in split]
        return generate(self.model, prompts, new, [text for text in settings["until"] if text])

    def _windows(self, text: str) -> Iterator[tuple[Prompt, list[int]]]:
        """The text in windows that the decoder reads, each with what stands before it as contexts."""
        tokenizer, seen = self.model.tokenizer, 0
        ids, prefix = tokenizer.encode(text), [*tokenizer.begin, tokenizer.bos_id][0]
        windows = get_rolling_token_windows(ids, prefix, self.splitter.window, context_len=1)
        for read, predicted in map(make_disjoint_window, windows):
            before, _ = truncate_left(ids[: max(0, seen - len(read))], 0, self.splitter.chunk_length)
            seen += len(predicted)
            yield Prompt(read, before), predicted

    @property
    def _limits(self) -> tuple[int, Overflow, int]:
        """(positions, overflow, chunk length): the answer's last token is in the window and takes no position."""
        return self.splitter.window - 1, self.splitter.overflow, self.splitter.chunk_length

    def _kept(self, kind: str, requests: list[Instance], answers: Iterator) -> list:
        """The answers, with progress, each given to the harness' cache as soon as it is there."""
        kept = []
        for request, answer in zip(requests, track(answers, kind, total=len(requests)), strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
            kept.append(answer)
        return kept
