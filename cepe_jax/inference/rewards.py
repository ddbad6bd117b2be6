"""Scores of answers by a reward model, under a context in the prompt or read by the encoder."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from cepe_jax.config import Compute, ContextRewardConfig, Dtype, RewardConfig
from cepe_jax.data.examples import ExampleConfig, chunks_of
from cepe_jax.data.preferences import Pair, Route, texts_of
from cepe_jax.data.template import Message, Template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.generate import bucket, power_of_two, right_padded
from cepe_jax.inference.text import CHUNK_LENGTH
from cepe_jax.model.reward import Reward
from cepe_jax.parsing import shortened
from cepe_jax.progress import track
from cepe_jax.weights.build import build
from cepe_jax.weights.source import open_model

SHORTEST = 32  # tokens that a short text is filled up to


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model with its chat template. `route` says where contexts go: it has been trained so."""

    model: Reward
    template: Template
    route: Route

    def scores(
        self,
        conversations: Sequence[Sequence[Message]],
        contexts: Sequence[str] | None = None,
        batch_size: int = 16,
        chunk_length: int = CHUNK_LENGTH,
    ) -> np.ndarray:
        """Return a score in fp32 for each conversation, whose last message is the answer that is judged.

        `contexts`: what each is judged by, "" for nothing. Conversations of about one length are read at once.
        """
        contexts = [""] * len(conversations) if contexts is None else contexts
        if len(contexts) != len(conversations):
            raise ValueError(f"{len(contexts)} contexts for {len(conversations)} conversations: give one for each")
        known: dict[str, list[int]] = {}
        rows = [self._row(*both, known) for both in zip(conversations, contexts, strict=True)]
        lengths = [max(power_of_two(len(ids)), SHORTEST) if len(ids) <= 512 else bucket(len(ids)) for ids, _ in rows]
        batches = []
        for _, group in itertools.groupby(sorted(range(len(rows)), key=lengths.__getitem__), key=lengths.__getitem__):
            alike = list(group)
            batches += [alike[at : at + batch_size] for at in range(0, len(alike), batch_size)]
        found = np.zeros(len(rows), np.float32)
        for batch in track(batches, "score, batches", len(batches)) if len(batches) > 8 else batches:
            filled = batch + batch[-1:] * (batch_size - len(batch))
            tokens_BT, mask_BT = right_padded([rows[n][0] for n in filled], lengths[batch[0]])
            documents = [rows[n][1] for n in filled]
            chunks = max(-(-len(document) // chunk_length) for document in documents)
            memory = self._memory(documents, chunks, chunk_length) if chunks else None
            found[batch] = np.asarray(_score(self.model, tokens_BT, mask_BT, memory))[: len(batch)]
        return found

    def _row(
        self, conversation: Sequence[Message], context: str, known: dict[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of the text and those that the encoder reads; `known` are the ids of texts seen before."""
        *before, answer = conversation or [{}]
        if answer.get("role") != "assistant" or not answer.get("content", "").strip():
            said = shortened(answer.get("content", ""))
            raise ValueError(f"the last message, {said}, is no answer: give one of the assistant that says something")
        pair = Pair(messages=before, chosen="", rejected="", context=context, category="")
        messages, documents = texts_of(pair, self.route)
        if (name := repr((messages, answer))) not in known:
            known[name] = self.template.ids_of([*messages, answer])
        encode = self.template.tokenizer.encode
        return known[name], [token for document in documents for token in encode(document)]

    def _memory(self, documents: list[list[int]], chunks: int, chunk_length: int):
        config = ExampleConfig(num_chunks=power_of_two(chunks), chunk_length=chunk_length)
        made = [chunks_of(np.array(tokens, np.int32), [len(tokens)], config) for tokens in documents]
        return _encode(self.model, *(np.stack([one[name] for one in made]) for name in ("context", "context_mask")))


_score, _encode = jax.jit(Reward.__call__), jax.jit(Reward.encode)


def load_reward(
    path: Path | str, dtype: Dtype = "float32", tokenizer: Path | str | None = None, route: Route | None = None
) -> RewardModel:
    """Return the reward model at `path`, with the tokenizer and chat template beside it or at `tokenizer`.

    `route`: where contexts go, if not to its encoder, or of a model without one into the prompt.
    """
    source = open_model(path)
    if not isinstance(source.config, RewardConfig | ContextRewardConfig):
        raise ValueError(f"{path} has no head that scores: train stage reward, or give a classifier of one number")
    if route not in (None, *get_args(Route)):
        raise ValueError(f"route is {shortened(route)}: give {', '.join(get_args(Route))}")
    reads = isinstance(source.config, ContextRewardConfig)
    if route == "encoder" and not reads:
        raise ValueError(f"{path} has no encoder: give route prompt or none")
    template = Template(Tokenizer(path if tokenizer is None else tokenizer))
    template.tokenizer.check_is_of(path)
    model = build(source.config, Compute(dtype), source.read)
    return RewardModel(model, template, route or ("encoder" if reads else "prompt"))
