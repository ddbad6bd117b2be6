"""The objectives of training. Logits exist for one chunk of positions at a time, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from cepe_jax.config import Chunk
from cepe_jax.data.examples import IGNORE, Example
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.layers import chunk_of, cut, fits_a_chunk, joined
from cepe_jax.model.llama import Llama
from cepe_jax.model.logits import token_nll
from cepe_jax.model.lora import without_factors
from cepe_jax.model.reward import Reward
from cepe_jax.sharding import window_parts

Array = jax.Array
Batch = Example  # with an axis of rows (B) before the others


class Objective(Protocol):
    """A loss of a model over a batch, which may be taken in micro-batches."""

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Return the weight of a whole batch for each term: the number of values that the term is a mean of."""
        ...

    def __call__(self, model, batch: Batch, weights: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the share of these rows in the loss, and in each of its terms.

        `weights` are those of the whole batch, so the shares of a batch's micro-batches add up to its loss.
        """
        ...


def chunk_of_logits(setting: Chunk, hidden_BTD: Array, vocab_size: int, axis: str = "vocab") -> int:
    """Return how many positions' logits, which are fp32, exist on a device at once; 0 is all."""
    return chunk_of(setting, hidden_BTD, vocab_size, 4, axis)


def sum_over_chunks(terms: Callable, chunk: int, hidden_BTD: Array, *arrays_BT: tuple[Array, float]):
    """`terms(hidden, *arrays)`, a tree of sums over positions, added up over chunks of `chunk` positions (0 = one).

    Each of `arrays_BT` comes with the value that pads it and adds nothing. The backward pass recomputes a chunk, so
    that what `terms` makes of a chunk (its logits) is never stored for another.
    """
    arrays = [array for array, _ in arrays_BT]
    if fits_a_chunk(chunk, hidden_BTD.shape[1]):
        return terms(hidden_BTD, *arrays)
    parts = window_parts(hidden_BTD.shape[1])
    xs = [cut(array, chunk, fill, parts) for array, fill in ((hidden_BTD, 0), *arrays_BT)]
    sums = jax.lax.map(jax.checkpoint(lambda x: terms(*x)), xs)
    return jax.tree.map(lambda a: a.sum(axis=0), sums)


def hidden_states(model: Cepe | Llama, batch: Batch) -> Array:
    """Return the decoder's (B, T, D) for a batch, with its context and its segments if it has them."""
    memory = model.encode(batch["context"], batch["context_mask"]) if "context" in batch else None
    return model.decode(batch["tokens"], memory, segments_BT=batch.get("segments"))[0]


def _mean(total: Array, weight: Array) -> Array:
    return total / jnp.maximum(weight, 1)


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, the mean over kept labels (paper, section 3.2)."""

    loss_chunk: Chunk = 0  # positions whose logits exist at once; 0 = all; auto: see `chunk_of`

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"nll": (batch["labels"] != IGNORE).sum()}

    def __call__(self, model: Cepe | Llama, batch: Batch, weights) -> tuple[Array, dict[str, Array]]:
        logits = model.decoder.unembedding()

        def terms(hidden_BTD, labels_BT):
            return token_nll(logits(hidden_BTD), labels_BT).sum()

        hidden_BTD = hidden_states(model, batch)
        chunk = chunk_of_logits(self.loss_chunk, hidden_BTD, model.decoder.config.vocab_size)
        nll = _mean(sum_over_chunks(terms, chunk, hidden_BTD, (batch["labels"], IGNORE)), weights["nll"])
        return nll, {"nll": nll}


@dataclass(frozen=True)
class MaskedLM:
    """Cross entropy of the masked tokens, the mean over them."""

    loss_chunk: Chunk = 0  # as of `NextToken`

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"nll": (batch["labels"] != IGNORE).sum()}

    def __call__(self, model: Encoder, batch: Batch, weights) -> tuple[Array, dict[str, Array]]:
        logits = model.mlm_unembedding()

        def terms(hidden_BLE, labels_BL):
            return token_nll(logits(hidden_BLE), labels_BL).sum()

        hidden_BLE = model(batch["tokens"])
        chunk = chunk_of_logits(self.loss_chunk, hidden_BLE, model.config.vocab_size, "encoder_vocab")
        nll = _mean(sum_over_chunks(terms, chunk, hidden_BLE, (batch["labels"], IGNORE)), weights["nll"])
        return nll, {"nll": nll}


def teacher_top(decoder: Llama, tokens_BS: Array, window: int, top_k: int, chunk: Chunk) -> dict[str, Array]:
    """Return what the plain decoder expects after each of the last `window` tokens; no gradient passes.

    `teacher_index` (B, window, K) are its likeliest next tokens, `teacher_prob` (B, window, K + 1) in fp32 their
    probabilities and the rest's mass. Logits exist for `chunk` positions at a time (0 = all).
    """
    if top_k > decoder.config.vocab_size:
        raise ValueError(f"top_k {top_k} exceeds the teacher's vocabulary of {decoder.config.vocab_size}")
    decoder = jax.lax.stop_gradient(decoder)
    hidden_BTD, unembed = decoder.decode(tokens_BS)[0][:, -window:], decoder.unembedding()

    def top(hidden_BTD):
        logits = unembed(hidden_BTD)
        chosen, index = jax.lax.top_k(logits, top_k)
        prob = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        rest = jnp.maximum(1 - prob.sum(axis=-1, keepdims=True), 0)
        return {"teacher_index": index, "teacher_prob": jnp.concatenate([prob, rest], axis=-1)}

    chunk = chunk_of_logits(chunk, hidden_BTD, decoder.config.vocab_size)
    chunks = jax.lax.map(top, cut(hidden_BTD, min(chunk or window, window)))
    return jax.tree.map(lambda x: joined(x, window), chunks)


@dataclass(frozen=True)
class DistillConfig:
    """The weights of CEPED's loss, and the part of the teacher's probabilities that it reads."""

    nll_weight: float = 1.0  # weight of the next token's cross entropy
    kl_weight: float = 2.0  # weight of the divergence from the teacher
    top_k: int = 50  # the teacher's likeliest tokens, which are compared
    smooth: float = 0.0  # added to probabilities; 0: the mass of all other tokens is left out

    def __post_init__(self):
        for name in ("nll_weight", "kl_weight", "top_k"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not self.smooth >= 0:
            raise ValueError(f"smooth is {self.smooth}: give 0 or more")


@dataclass(frozen=True)
class Distill:
    """CEPED: next-token cross entropy plus KL(teacher || student) over the teacher's top K tokens (section 3.3).

    The batch has `teacher_index` (B, n, K) and `teacher_prob` (B, n, K + 1), the last entry the rest's mass, for the
    last n positions. Without them the frozen decoder is the teacher of the whole window: it reads the context, masked
    or not, and then the tokens, all of them real. KL is averaged over all B n positions, ignored labels too. Without
    `smooth` the rest's mass is left out and nothing renormalised; with it, it counts, and `smooth` is added to both
    distributions' K + 1 entries.
    """

    config: DistillConfig
    loss_chunk: Chunk = 0  # as of `NextToken`

    def weights(self, batch: Batch) -> dict[str, Array]:
        B, n = batch.get("teacher_index", batch["tokens"]).shape[:2]
        return {"nll": (batch["labels"] != IGNORE).sum(), "kl": jnp.asarray(B * n)}

    def __call__(self, model: Cepe, batch: Batch, weights) -> tuple[Array, dict[str, Array]]:
        if "teacher_index" not in batch:
            B, T = batch["tokens"].shape
            tokens_BS = jnp.concatenate([batch["context"].reshape(B, -1), batch["tokens"]], axis=1)
            batch = batch | teacher_top(model.decoder, tokens_BS, T, self.config.top_k, self.loss_chunk)

        unembed = model.decoder.unembedding()

        def terms(hidden_BTD, labels_BT, prob_BTK, index_BTK, taught_BT):
            logits = unembed(hidden_BTD)
            kl_BT = self._kl(jax.nn.log_softmax(logits), prob_BTK.astype(jnp.float32), index_BTK)
            return token_nll(logits, labels_BT).sum(), jnp.where(taught_BT, kl_BT, 0.0).sum()

        T, n = batch["labels"].shape[1], batch["teacher_index"].shape[1]
        front = (0, 0), (T - n, 0), (0, 0)
        prob_BTK, index_BTK = jnp.pad(batch["teacher_prob"], front), jnp.pad(batch["teacher_index"], front)
        taught_BT = jnp.broadcast_to(jnp.arange(T) >= T - n, batch["labels"].shape)
        per_position = (batch["labels"], IGNORE), (prob_BTK, 0), (index_BTK, 0), (taught_BT, False)
        hidden_BTD = hidden_states(model, batch)
        chunk = chunk_of_logits(self.loss_chunk, hidden_BTD, model.decoder.config.vocab_size)
        nll, kl = sum_over_chunks(terms, chunk, hidden_BTD, *per_position)
        nll, kl = _mean(nll, weights["nll"]), _mean(kl, weights["kl"])
        return self.config.nll_weight * nll + self.config.kl_weight * kl, {"nll": nll, "kl": kl}

    def _kl(self, log_student_BTV: Array, teacher_BTK: Array, index_BTK: Array) -> Array:
        log_student = jnp.take_along_axis(log_student_BTV, index_BTK, axis=-1)
        if self.config.smooth:
            student = jnp.exp(log_student)
            student = jnp.concatenate([student, 1 - student.sum(axis=-1, keepdims=True)], axis=-1)
            entries = teacher_BTK.shape[-1]
            teacher_BTK = (teacher_BTK + self.config.smooth) / (1 + self.config.smooth * entries)
            log_student = jnp.log((student + self.config.smooth) / (1 + self.config.smooth * entries))
        else:
            teacher_BTK = teacher_BTK[..., :-1]
        log_teacher = jnp.log(jnp.where(teacher_BTK > 0, teacher_BTK, 1.0))
        return (teacher_BTK * (log_teacher - log_student)).sum(axis=-1)


def _rows_of_pairs(batch: Batch) -> tuple[Array, Array]:
    """Return tokens and mask of a batch of pairs as rows (2 B, T)."""
    return tuple(batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "token_mask"))


def _memory_of_pairs(model: Cepe | Reward, batch: Batch) -> Memory | None:
    """Return the contexts' memory with a row for each text: both answers are read after one context."""
    if "context" not in batch:
        return None
    memory = model.encode(batch["context"], batch["context_mask"])
    return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), memory)


def _preferred(margin_B: Array) -> Array:
    """Return how many margins are above zero; one that is zero counts half."""
    return (margin_B > 0).sum() + 0.5 * (margin_B == 0).sum()


@dataclass(frozen=True)
class BradleyTerry:
    """-log sigmoid(r(chosen) - r(rejected)), the mean over pairs (Bradley and Terry 1952)."""

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"pairs": jnp.asarray(len(batch["tokens"]))}

    def __call__(self, model: Reward, batch: Batch, weights) -> tuple[Array, dict[str, Array]]:
        scores_B2 = model(*_rows_of_pairs(batch), _memory_of_pairs(model, batch)).reshape(-1, 2)
        margin_B = scores_B2[:, 0] - scores_B2[:, 1]
        loss = _mean(jax.nn.softplus(-margin_B).sum(), weights["pairs"])
        return loss, {"accuracy": _mean(_preferred(margin_B), weights["pairs"])}


def log_probabilities(model: Cepe | Llama, batch: Batch, chunk: Chunk) -> Array:
    """Return the logarithm (B, 2) of each answer's probability; logits exist for `chunk` positions at a time."""
    tokens_RT, real_RT = _rows_of_pairs(batch)
    logits = model.decoder.unembedding()
    hidden_RTD, _ = model.decode(tokens_RT, _memory_of_pairs(model, batch), token_mask_BT=real_RT)

    def terms(hidden_RTD, labels_RT):
        return token_nll(logits(hidden_RTD), labels_RT).sum(axis=1)

    labels_RT = batch["labels"].reshape(tokens_RT.shape)
    chunk = chunk_of_logits(chunk, hidden_RTD, model.decoder.config.vocab_size)
    return -sum_over_chunks(terms, chunk, hidden_RTD, (labels_RT, IGNORE)).reshape(-1, 2)


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), the mean over pairs.

    The reference is `reference` (B, 2) in the batch, the log-probabilities of both answers; without it the model
    without its low-rank factors, which alone train then.
    """

    beta: float = 0.1
    loss_chunk: Chunk = 0  # as of `NextToken`

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"pairs": jnp.asarray(len(batch["tokens"]))}

    def __call__(self, model: Cepe | Llama, batch: Batch, weights) -> tuple[Array, dict[str, Array]]:
        if (reference_B2 := batch.get("reference")) is None:
            reference_B2 = log_probabilities(jax.lax.stop_gradient(without_factors(model)), batch, self.loss_chunk)
        gained_B2 = log_probabilities(model, batch, self.loss_chunk) - reference_B2
        margin_B = self.beta * (gained_B2[:, 0] - gained_B2[:, 1])
        terms = {"accuracy": _preferred(margin_B), "margin": margin_B.sum()}
        terms |= {f"gained_{name}": gained_B2[:, n].sum() for n, name in enumerate(("chosen", "rejected"))}
        loss = _mean(jax.nn.softplus(-margin_B).sum(), weights["pairs"])
        return loss, {name: _mean(term, weights["pairs"]) for name, term in terms.items()}
