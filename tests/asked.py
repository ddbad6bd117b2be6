"""A language model for tests of what asks one: it notes what it is asked, and answers by a formula."""

import numpy as np

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.language_model import Prompt
from cepe_jax.inference.scoring import Score


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
