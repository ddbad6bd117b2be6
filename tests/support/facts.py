"""Planted facts among documents that share words with the questions, and toys that are trained to look them up.

A document says the values of two keys, and twice mentions each of two keys whose values other documents say. So a
search by words finds the documents that mention a key before the one that says its value.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from cepe_jax.config import CrossLayers, EncoderConfig
from cepe_jax.data.examples import IGNORE, Example
from cepe_jax.model.cepe import Cepe, cross_from_self_attention, encoder_from_decoder
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.trainer import init_state, make_train_step
from support.toys import OPTIMIZED, TOY

KEYS = VALUES = 128
FILLERS = 64
DOCUMENTS = 16  # of a corpus
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
BOS, DOT, FIRST = 1, 3, 4  # ids; keys, values and fillers follow
SPECIAL = ["<unk>", "<s>", "</s>", "."]
Stage = tuple[int, Sequence[int], int]  # steps; documents of an example, of which one is drawn; documents of a batch
# Induction heads work at distances that they were trained on: texts grow little by little.
DECODER_STAGES: list[Stage] = [
    (100, (2, 4), 64),
    (200, (5, 6), 128),
    (200, (6, 7, 8), 128),
    (200, (4, 8, 10, 12), 128),
    (400, (2, 8, 12, 14, 16), 128),
]
CEPE_STAGES: list[Stage] = [(300, (1, 2, 4, 8), 64)]


def words() -> list[str]:
    """Return the words by their ids: the special ones, then keys, values and fillers, which no language has."""
    rng, made = np.random.default_rng(0), dict.fromkeys(SPECIAL)
    while len(made) < FIRST + KEYS + VALUES + FILLERS:
        made["".join(rng.choice(SYLLABLES, 2))] = None
    return list(made)


def write_tokenizer(home: Path) -> None:
    """Write a tokenizer of these words, which stand between white space."""
    vocabulary = {word: number for number, word in enumerate(words())}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    home.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


# A document's words after its first DOT come in parts, in any order: values of two keys, mentions of two, fillers.
PARTS = np.repeat(np.arange(10), [3, 3, 2, 2, 2, 2, 1, 1, 1, 1])


@dataclass(frozen=True)
class Corpus:
    documents_DL: np.ndarray  # ids
    keys_D2: np.ndarray  # whose values each document says
    values_D2: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Corpus":
        """Return documents that say the values of different keys, all of them different."""
        keys_D2 = FIRST + rng.permutation(KEYS)[: 2 * DOCUMENTS].reshape(-1, 2)
        values_D2 = FIRST + KEYS + rng.permutation(VALUES)[: 2 * DOCUMENTS].reshape(-1, 2)
        after_D2 = (
            np.arange(DOCUMENTS)[:, None]
            + rng.permuted(np.tile(np.arange(1, DOCUMENTS), (DOCUMENTS, 1)), axis=1)[:, :2]
        )
        mentioned_D2 = keys_D2[after_D2 % DOCUMENTS, rng.integers(2, size=(DOCUMENTS, 2))]
        dot_D1 = np.full((DOCUMENTS, 1), DOT)
        columns = []
        for fact in (0, 1):
            columns += [keys_D2[:, [fact]], values_D2[:, [fact]], dot_D1]
        for mention in (0, 0, 1, 1):
            columns += [mentioned_D2[:, [mention]], dot_D1]
        words_DL = np.concatenate([*columns, fillers(rng, (DOCUMENTS, 4))], axis=1)
        places_DP = rng.permuted(np.tile(np.arange(10), (DOCUMENTS, 1)), axis=1)
        order_DL = np.argsort(places_DP[:, PARTS], axis=1, kind="stable")
        return cls(np.concatenate([dot_D1, np.take_along_axis(words_DL, order_DL, axis=1)], axis=1), keys_D2, values_D2)

    def question(self, rng: np.random.Generator, document: int, fact: int) -> list[int]:
        """Return what is asked for the value of one of a document's keys: fillers, and then the key."""
        return [DOT, *fillers(rng, 2), self.keys_D2[document, fact]]


def fillers(rng: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
    return FIRST + KEYS + VALUES + rng.integers(FILLERS, size=shape)


def batch(rng: np.random.Generator, in_encoder: bool, documents: int, rows: int) -> Example:
    """Return texts in each of which up to 16 values are asked for, after so many documents or beside them."""
    contexts, tails = [], []
    for _ in range(rows):
        corpus = Corpus.draw(rng)
        chosen = rng.choice(DOCUMENTS, documents, replace=False)
        facts = rng.permutation([(document, fact) for document in chosen for fact in (0, 1)])[:16]
        contexts.append(corpus.documents_DL[chosen])
        tails.append([[*corpus.question(rng, *fact), corpus.values_D2[*fact]] for fact in facts])
    context_BCL, tail_BQL = np.array(contexts, np.int32), np.array(tails, np.int32)
    labels_BQL = np.full_like(tail_BQL, IGNORE)
    labels_BQL[:, :, -1] = tail_BQL[:, :, -1]
    before_BT = np.full((rows, 1), BOS, np.int32)
    if not in_encoder:
        before_BT = np.concatenate([before_BT, context_BCL.reshape(rows, -1)], axis=1)
    tokens_BT = np.concatenate([before_BT, tail_BQL.reshape(rows, -1)], axis=1)
    labels_BT = np.concatenate([np.full_like(before_BT, IGNORE), labels_BQL.reshape(rows, -1)], axis=1)
    read = Example(tokens=tokens_BT[:, :-1], labels=labels_BT[:, 1:])
    return read | {"context": context_BCL, "context_mask": np.ones(context_BCL.shape, bool)} if in_encoder else read


def tuned(model: Llama | Cepe, stages: list[Stage], seed: int) -> Llama | Cepe:
    """Return the model after it was trained, whole, to say values."""
    trainable, frozen = split(jax.tree.map(np.array, model), tuple(model.parts))
    config = OptimizerConfig(learning_rate=1e-3)
    optimizer = config.build(config.schedule(sum(steps for steps, _, _ in stages)))
    step = make_train_step(NextToken(), optimizer, type(model)).__wrapped__
    step = jax.jit(step, donate_argnums=0, compiler_options=OPTIMIZED)
    state, rng, nll = init_state(trainable, optimizer), np.random.default_rng(seed), []
    for steps, counts, total in stages:
        for _ in range(steps):
            count = int(rng.choice(counts))
            state, metrics = step(state, frozen, batch(rng, isinstance(model, Cepe), count, max(total // count, 2)))
        nll.append(round(float(metrics["nll"]), 3))
    print(f"{type(model).__name__}, seed {seed}: nll after each stage {nll}", flush=True)
    return type(model).from_parts(state.trainable | frozen)


def with_encoder(decoder: Llama, seed: int) -> Cepe:
    """Return a CEPE of the decoder whose encoder is its first layer, and whose cross-attention is that of its last."""
    names = "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "rope"
    sizes = {name: getattr(TOY, name) for name in names}
    config = EncoderConfig(vocab_size=TOY.vocab_size + 1, num_layers=1, **sizes)
    first, second = jax.random.split(jax.random.key(seed))
    cross = cross_from_self_attention(decoder, config, CrossLayers("last", 1), "copy", key=second)
    return Cepe(decoder, encoder_from_decoder(decoder, config, key=first), cross)
