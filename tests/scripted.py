"""A model that says what a test wants, and keeps what it was asked; its tokens are the letters of a text."""

from collections.abc import Callable

import numpy as np

from cepe_jax.evaluation.language_model import Prompt
from cepe_jax.inference.scoring import Score

BOS = 1


class Letters:
    bos_id = BOS
    begin = [BOS]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(i) for i in ids if i != BOS)


def whole_text(prompt: Prompt) -> str:
    """Contexts and prompt, as a plain decoder reads them."""
    return Letters().decode([i for ids in (*prompt.contexts, prompt.ids) for i in ids])


class Scripted:
    """`says` what it writes after a prompt. `log_prob`: of a continuation's text after a prompt, on its last letter."""

    tokenizer = Letters()
    stop_ids = (2,)

    def __init__(self, says: Callable[[Prompt], str] = str, log_prob: Callable[[Prompt, str], float] | None = None):
        self.says, self.log_prob = says, log_prob
        self.asked: list[Prompt] = []

    def stream(self, prompts, max_new_tokens):
        self.asked += prompts
        texts = [self.says(prompt)[:max_new_tokens] for prompt in prompts]
        for step in range(max(map(len, texts))):
            yield [ord(text[step]) if step < len(text) else None for text in texts]

    def score(self, prompt, continuations):
        self.asked.append(prompt)
        texts = [self.tokenizer.decode(continuation) for continuation in continuations]
        return [Score(np.array([0.0] * (len(t) - 1) + [self.log_prob(prompt, t)]), False) for t in texts]
