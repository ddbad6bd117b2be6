"""lm-evaluation-harness' requests, answered by any model behind the seam."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cepe_jax.evaluation.language_model import LanguageModel, Prompt, generate
from cepe_jax.inference.chat import MAX_NEW_TOKENS
from cepe_jax.inference.overflow import Overflow, fit, fit_continued, truncate_left
from cepe_jax.inference.template import Message, Template
from cepe_jax.progress import track


@dataclass(frozen=True)
class Splitter:
    """What of a harness' text the encoder reads: what stands before the decoder's window.

    `overflow` says how a text is cut that something follows; one that is itself predicted is cut into whole windows.
    """

    window: int  # tokens that the decoder reads at most, the answer's too
    overflow: Overflow = "truncate_left"
    chunk_length: int = 256  # tokens


class _Rendered:
    """How a text is read that a chat template has written: names of special tokens are these tokens.

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

    def __init__(self, model: LanguageModel, splitter: Splitter, template: Template | None = None, batch: int = 1):
        """`template`: of a chat model, where the harness is to apply one. `batch`: answers written at once."""
        super().__init__()
        self.model, self.splitter, self.template, self.batch = model, splitter, template, batch
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
            for context, asked in groupby(requests, key=lambda request: request.args[0]):
                contexts, ids, rows = fit_continued(context, [r.args[1] for r in asked], self._reader, *self._limits)
                for score in self.model.score(Prompt(ids, contexts), rows):
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
        """What the model writes greedily after each text; ValueError where the task wants samples."""

        def answered() -> Iterator[str]:
            for _, same in groupby(requests, key=lambda request: request.args[1]):
                alike = list(same)
                for first in range(0, len(alike), self.batch):
                    yield from self._written([r.args[0] for r in alike[first : first + self.batch]], alike[0].args[1])

        return self._kept("generate_until", requests, answered())

    def _written(self, texts: list[str], how: dict) -> list[str]:
        settings = normalize_gen_kwargs(how, MAX_NEW_TOKENS)
        if settings["do_sample"]:
            raise ValueError(f"the task wants samples ({how}): only greedy answers are written, give do_sample false")
        new = settings["max_gen_toks"]
        window, overflow, chunk_length = self._limits
        split = [fit(text, self._reader, window, new, overflow, chunk_length) for text in texts]
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
        return self.splitter.window, self.splitter.overflow, self.splitter.chunk_length

    def _kept(self, kind: str, requests: list[Instance], answers: Iterator) -> list:
        """The answers, with progress, each given to the harness' cache as soon as it is there."""
        kept = []
        for request, answer in zip(requests, track(answers, kind, total=len(requests)), strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
            kept.append(answer)
        return kept
