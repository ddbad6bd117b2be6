"""CEPED's teacher: the frozen decoder over the unmasked context and the window, against the method in fp64."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import DECODER, float64, make_cepe
from support.oracles import NONE, method

from cepe_jax.data.examples import IGNORE
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.model.parts import split
from cepe_jax.training.objectives import Distill, DistillConfig, teacher_top

K = 5


@pytest.fixture(scope="module")
def batch(tokens_BT, context_BCL, context_mask_BCL) -> dict[str, np.ndarray]:
    """Ids of the decoder alone; a context masked in part and whole, and labels of which some are ignored."""
    labels = np.random.default_rng(0).integers(0, DECODER.vocab_size, tokens_BT.shape)
    labels[0, ::2] = IGNORE
    context = np.minimum(context_BCL, DECODER.vocab_size - 1)
    return {"tokens": tokens_BT, "labels": labels, "context": context, "context_mask": context_mask_BCL}


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def log_teacher(cepe, batch) -> np.ndarray:
    """(B, T, V): the decoder reads every token of the context in order, then the window; nothing is a memory."""
    weights, rows = float64(cepe), []
    for context, tokens in zip(batch["context"], batch["tokens"], strict=True):
        whole = np.concatenate([*context, tokens])
        rows.append(log_softmax(method(weights, cepe.config, whole, NONE[0], NONE[0]))[-len(tokens) :])
    return np.stack(rows)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_teacher_is_the_decoder_over_context_and_window(cepe, batch, log_teacher, chunk):
    """And the window alone is taught: with other lengths of chunks, whole and filled up."""
    B, T = batch["tokens"].shape
    tokens_BS = np.concatenate([batch["context"].reshape(B, -1), batch["tokens"]], axis=1)
    taught = jax.jit(lambda decoder, tokens: teacher_top(decoder, tokens, T, K, chunk))(cepe.decoder, tokens_BS)
    wanted = np.argsort(-log_teacher, axis=-1)[..., :K]
    np.testing.assert_array_equal(taught["teacher_index"], wanted)
    prob = np.exp(np.take_along_axis(log_teacher, wanted, -1))
    np.testing.assert_allclose(taught["teacher_prob"][..., :K], prob, rtol=1e-4)
    np.testing.assert_allclose(taught["teacher_prob"][..., K], 1 - prob.sum(-1), rtol=1e-4)


def test_the_loss_is_the_papers(cepe, batch, log_teacher):
    """Cross entropy over kept labels plus twice the divergence over every position, both written out."""
    weights = float64(cepe)
    rows = zip(batch["tokens"], batch["context"], batch["context_mask"], strict=True)
    log_student = log_softmax(np.stack([method(weights, cepe.config, *row) for row in rows]))
    index = np.argsort(-log_teacher, axis=-1)[..., :K]
    log_p, log_q = (np.take_along_axis(x, index, -1) for x in (log_teacher, log_student))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    kept = batch["labels"] != IGNORE
    nll = -np.take_along_axis(log_student, np.where(kept, batch["labels"], 0)[..., None], -1)[..., 0][kept].mean()
    objective = Distill(DistillConfig(top_k=K), 3)
    loss, terms = jax.jit(lambda cepe, batch: objective(cepe, batch, objective.weights(batch)))(cepe, batch)
    assert float(terms["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(terms["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(loss) == pytest.approx(nll + 2 * kl, rel=1e-5)


def test_stored_probabilities_teach_the_same(cepe, batch):
    """In the types of a dataset: 16 bits for ids and probabilities."""
    B, T = batch["tokens"].shape
    tokens_BS = np.concatenate([batch["context"].reshape(B, -1), batch["tokens"]], axis=1)
    taught = jax.jit(lambda decoder, tokens: teacher_top(decoder, tokens, T, K, 0))(cepe.decoder, tokens_BS)
    stored = {"teacher_index": np.uint16(taught["teacher_index"]), "teacher_prob": np.float16(taught["teacher_prob"])}
    objective = Distill(DistillConfig(top_k=K, smooth=1e-6))
    both = batch, batch | stored
    run = jax.jit(lambda cepe, both: [objective(cepe, one, objective.weights(one))[1] for one in both])
    online, stored = run(cepe, both)
    assert float(stored["nll"]) == float(online["nll"])
    assert float(stored["kl"]) == pytest.approx(float(online["kl"]), rel=2e-3)
    assert float(stored["kl"]) != float(online["kl"])


def test_no_gradient_passes_the_teacher(cepe, batch):
    gradient = jax.grad(lambda decoder: teacher_top(decoder, batch["tokens"], 7, K, 0)["teacher_prob"].max())(
        cepe.decoder
    )
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_no_logits_of_the_whole_window_are_stored():
    """The largest array of the compiled gradient, teacher and all, is one chunk's logits."""
    B, T, C, L, V, chunk = 2, 48, 2, 8, 2048, 16
    context = {"context": jnp.int32, "context_mask": bool}
    shapes = jax.eval_shape(make_cepe)
    shapes.decoder = jax.eval_shape(lambda: Llama(dataclasses.replace(DECODER, vocab_size=V), key=jax.random.key(0)))
    objective = Distill(DistillConfig(top_k=K), chunk)

    def loss(trainable, frozen, batch):
        return objective(Cepe.from_parts(trainable | frozen), batch, objective.weights(batch))[0]

    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("tokens", "labels")}
    batch |= {name: jax.ShapeDtypeStruct((B, C, L), dtype) for name, dtype in context.items()}
    text = jax.jit(jax.grad(loss)).lower(*split(shapes, ("encoder", "cross")), batch).compile().as_text()
    arrays = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert max(arrays) == B * chunk * V


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_weight": 0.0}, "kl_weight is 0.0: .*above 0"),
        ({"kl_weight": -2.0}, "kl_weight is -2.0"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"nll_weight": 0.0}, "nll_weight is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"smooth": -1e-6}, "smooth is -1e-06: .* 0 "),
    ],
)
def test_bad_losses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DistillConfig(), **changes)


def test_a_teacher_has_as_many_tokens_as_are_asked_for(cepe, batch):
    with pytest.raises(ValueError, match="top_k 65 .*vocabulary of 64"):
        teacher_top(cepe.decoder, batch["tokens"], 7, 65, 0)
