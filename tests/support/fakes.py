"""Language models and tokenizers that note what they are asked and answer by a formula or a script."""

from collections.abc import Callable

import numpy as np

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
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


class Asked:
    """log p of token i is -(1 + i % 7) / 4, and the more contexts there are, the higher: `gain` for each."""

    stop_ids = ()

    def __init__(self, tokenizer: Tokenizer, gain: float = 0.125):
        self.tokenizer, self.gain = tokenizer, gain
        self.asked: list[tuple[Prompt, list[list[int]]]] = []

    def score(self, prompt: Prompt, continuations) -> list[Score]:
        self.asked.append((prompt, [list(row) for row in continuations]))
        return [Score(self.log_probs(prompt, row).astype(np.float32), False) for row in continuations]

    def log_probs(self, prompt: Prompt, row) -> np.ndarray:
        return -(1 + np.asarray(row) % 7) / 4 + self.gain * len(prompt.contexts)
