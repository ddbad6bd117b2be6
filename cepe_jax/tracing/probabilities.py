"""The probability of an n-gram of an answer: by a model (arXiv 2407.14985, equation 2), and by the infinity-gram.

A text is the prompt and the answer after it, with a space between them if neither has white space there. A token is
one of an n-gram's if a character of the n-gram is the token's: a token that straddles the border counts whole, and one
that is the space before alone does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.scoring import score
from cepe_jax.inference.text import TextModel
from cepe_jax.parsing import shortened
from cepe_jax.progress import track
from cepe_jax.tracing.index import Index, Ngram
from cepe_jax.tracing.table import Example, Target
from cepe_jax.tracing.words import words_of


class HoldsSpecial(ValueError):
    """The name of a special token stands in a text, which cannot be told from the token in places."""


@dataclass(frozen=True)
class Read:
    """A text as ids, BOS first if a model's texts begin with it, with the place of each id in the text."""

    ids: list[int]
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> "Read":
        """Read a text; HoldsSpecial if the name of a special token stands in it."""
        placed = tokenizer.placed_special(text)
        if [i for i, _, _ in placed] != tokenizer.encode(text):
            raise HoldsSpecial(f"{shortened(text)} holds the name of a special token: take it out")
        begin = tokenizer.begin or [tokenizer.bos_id]
        return cls([*begin, *(i for i, _, _ in placed)], [(-1, -1)] * len(begin) + [(a, b) for _, a, b in placed])

    def tokens(self, start: int, end: int) -> slice:
        """Return the tokens that have one of the characters [start, end); ValueError if none has.

        A space that a tokenizer puts before every text is one of the first character's.
        """
        at = [n for n, (a, b) in enumerate(self.places) if 0 <= a < end and max(b, a + 1) > start]
        if not at:
            raise ValueError(f"no token has characters {start} to {end} of a text: give a tokenizer that keeps all")
        return slice(at[0], at[-1] + 1)


def text_of(example: Example) -> tuple[str, int]:
    """Return the text of an example, and where its answer begins."""
    prompt, answer = example["prompt"], example["answer"]
    between = "" if not prompt or prompt[-1:].isspace() or answer[:1].isspace() else " "
    return prompt + between + answer, len(prompt + between)


@dataclass(frozen=True)
class Scored:
    """The log-probability of an answer."""

    total: float  # of all its tokens, in nats
    tokens: int
    greedy: bool  # each token is the most probable one


def score_targets(
    model: TextModel, examples: Sequence[Example], targets: Sequence[Target], compat: bool = False
) -> tuple[list[Scored], np.ndarray]:
    """Return the score of each example's answer, and log P of the tokens of each target, in nats (N,).

    `compat` repeats a fault of the authors' code, whose probability of an n-gram is that of the whole rest of the
    answer from the n-gram's first token on (`compute_llm_prob.py` never resets its mark after a match).
    """
    owned: dict[int, list[int]] = {}
    for n, target in enumerate(targets):
        owned.setdefault(target.example, []).append(n)
    scores, logs_N = [], np.zeros(len(targets))
    for number, example in enumerate(track(examples, "score, examples")):
        text, begin = text_of(example)
        try:
            read = Read.of(text, model.tokenizer)
        except HoldsSpecial as error:
            raise ValueError(f"example {number + 1}: {error}") from None
        if model.window is not None and len(read.ids) > model.window:
            raise ValueError(
                f"example {number + 1} has {len(read.ids)} tokens and the window {model.window}: shorten its prompt"
            )
        first = read.tokens(begin, len(text)).start
        scored = score(model.model, read.ids[:first], [read.ids[first:]], policy=model.cache)[0]
        scores.append(Scored(scored.total, len(scored.log_probs), scored.greedy))
        for n in owned.get(number, ()):
            end = len(text) if compat else begin + targets[n].end
            span = read.tokens(begin + targets[n].start, end)
            logs_N[n] = scored.log_probs[span.start - first : span.stop - first].sum(dtype=np.float64)
    return scores, logs_N


def infinity_gram(index: Index, contexts: Sequence[Ngram], words: Sequence[str]) -> np.ndarray:
    """Return log P of each word after its context (Q,): C(context', word) / C(context').

    context' is the longest end of the context that occurs in the corpus. NaN for a word that never follows it.
    """
    low_Q, high_Q = np.zeros(len(words), np.int64), np.array([len(context) for context in contexts], np.int64)
    steps_Q = np.ones_like(low_Q)
    while len(rows := np.flatnonzero(low_Q < high_Q)):
        tried = np.minimum(low_Q + steps_Q, high_Q)[rows]
        occurs = index.counts([contexts[n][-length:] for n, length in zip(rows, tried, strict=True)]) > 0
        low_Q[rows[occurs]], high_Q[rows[~occurs]] = tried[occurs], tried[~occurs] - 1
        steps_Q[rows] = np.where(occurs, 2 * steps_Q[rows], 1)
    used = [context[len(context) - length :] for context, length in zip(contexts, low_Q, strict=True)]
    both = index.counts([(*context, word) for context, word in zip(used, words, strict=True)])
    return np.log(np.where(both > 0, both, np.nan) / index.counts(used))


def infinity_of_targets(index: Index, examples: Sequence[Example], targets: Sequence[Target]) -> np.ndarray:
    """Return log P of each target's words by the infinity-gram (N,), which reads the prompt and the answer before them.

    As in the paper, words of probability 0 are left out of the product. NaN if no word remains.
    """
    contexts, words, owners = [], [], []
    for number, target in enumerate(targets):
        prompt, answer = (words_of(examples[target.example][side]) for side in ("prompt", "answer"))
        for at, word in enumerate(target.y, target.word):
            contexts.append((*prompt, *answer[:at]))
            words.append(word)
            owners.append(number)
    logs = infinity_gram(index, contexts, words)
    known = ~np.isnan(logs)
    sums = np.bincount(np.array(owners)[known], logs[known], len(targets))
    return np.where(np.bincount(np.array(owners)[known], minlength=len(targets)) > 0, sums, np.nan)
