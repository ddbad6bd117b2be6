"""Losses and gradients against the PyTorch reference's (see golden/README.md); chunks change nothing."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import DECODER, make_decoder

from cepe_jax.data.examples import IGNORE
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.model.logits import token_nll
from cepe_jax.model.parts import split
from cepe_jax.training.objectives import Distill, DistillConfig, MaskedLM, NextToken, sum_over_chunks
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.trainer import init_state, make_train_step
from cepe_jax.weights.build import tensors_of
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.source import load

GOLDEN = Path(__file__).parents[1] / "golden"


def error(ours, wanted) -> float:
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    return np.abs(ours - wanted).max() / (np.abs(wanted).max() or 1.0)


def read(name: str):
    if list((GOLDEN / name).glob("*.bin")):
        pytest.importorskip("torch")
    return load(GOLDEN / name), dict(np.load(GOLDEN / name / "expected.npz"))


def shifted(labels_BT: np.ndarray) -> np.ndarray:
    """The reference's labels stand on their own token; ours on the token before."""
    return np.concatenate([labels_BT[:, 1:], np.full_like(labels_BT[:, :1], IGNORE)], axis=1)


def cepe_batch(golden: dict, mask: str = "encoder_attention_mask") -> dict:
    return {
        "tokens": golden["input_ids"],
        "labels": shifted(golden["labels"]),
        "context": golden["encoder_input_ids"],
        "context_mask": golden[mask].astype(bool),
    }


def loss_and_gradient(objective, model, batch, train=("encoder", "cross"), micro=False):
    """Of the whole batch; with `micro` the sum over its rows."""
    trainable, frozen = split(model, train)

    @jax.jit
    def run(trainable, frozen, batch):
        weights = objective.weights(batch)

        def of_rows(rows):
            whole = type(model).from_parts
            return jax.value_and_grad(lambda t: objective(whole(t | frozen), rows, weights)[0])(trainable)

        if not micro:
            return of_rows(batch)
        by_row = jax.lax.map(of_rows, jax.tree.map(lambda x: x[:, None], batch))
        return jax.tree.map(lambda x: x.sum(axis=0), by_row)

    return run(trainable, frozen, batch)


def in_torch_layout(model, parts: dict) -> dict[str, np.ndarray]:
    """Torch key -> array of what has the shape of `model` in the parts given (gradients, trained weights)."""
    entries = table(model.config)
    whole = type(model).from_parts(model.parts | parts)
    names = {name: array for name, array in tensors_of(whole) if name.split(".")[0] in parts}
    return {entries[name].key: entries[name].to_torch(array) for name, array in names.items()}


def check_gradients(model, gradient, golden: dict, prefix: str) -> None:
    ours = in_torch_layout(model, gradient)
    wanted = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    assert set(ours) == set(wanted)
    worst = {key: error(ours[key], wanted[key]) for key in wanted}
    assert max(worst.values()) <= 1e-4, max(worst, key=worst.get)


@pytest.mark.parametrize(("name", "mask"), [
    ("tiny_mha", "encoder_attention_mask"),
    ("tiny_gqa_last2", "encoder_attention_mask"),
    ("tiny_edge", "mask_holes"),
])  # fmt: skip
def test_next_token_is_the_references(name, mask):
    model, golden = read(name)
    loss, gradient = loss_and_gradient(NextToken(loss_chunk=7), model, cepe_batch(golden, mask))
    assert error(loss, golden["loss_lm"]) <= 1e-4
    check_gradients(model, gradient, golden, "grad_lm/")


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_distillation_is_the_references(name):
    model, golden = read(name)
    taught = {"teacher_prob": golden["distill_prob"], "teacher_index": golden["distill_index"]}
    batch, kl_weight = cepe_batch(golden) | taught, float(golden["kl_loss_cof"])
    loss, gradient = loss_and_gradient(Distill(DistillConfig(kl_weight=kl_weight), loss_chunk=5), model, batch)
    assert error(loss, golden["loss_distill_drop"]) <= 1e-4
    check_gradients(model, gradient, golden, "grad_distill/")
    smooth, _ = loss_and_gradient(Distill(DistillConfig(kl_weight=kl_weight, smooth=1e-6)), model, batch)
    assert error(smooth, golden["loss_distill_smooth_1e-6"]) <= 1e-4


def test_distillation_over_the_tail_is_the_references():
    model, golden = read("tiny_edge")
    taught = {"teacher_prob": golden["tail_distill_prob"], "teacher_index": golden["tail_distill_index"]}
    batch = cepe_batch(golden, "mask_holes") | taught
    for chunk in (0, 16):
        loss, gradient = loss_and_gradient(Distill(DistillConfig(kl_weight=2.0), loss_chunk=chunk), model, batch)
        assert error(loss, golden["loss_distill_tail"]) <= 1e-4
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_masked_lm_is_the_references():
    model, golden = read("tiny_mlm")
    mask = golden["attention_mask"].astype(bool)

    class Padded(MaskedLM):
        """The reference's rows are padded; those of our data are not."""

        def __call__(self, model, batch, weights):
            class Masked:
                config, mlm_unembedding = model.config, model.mlm_unembedding

                def __call__(self, tokens):
                    return model(tokens, mask)

            return super().__call__(Masked(), batch, weights)

    batch = {"tokens": golden["input_ids"], "labels": golden["labels"]}
    loss, gradient = loss_and_gradient(Padded(loss_chunk=3), model, batch, train=("encoder",))
    assert error(loss, golden["loss"]) <= 1e-4
    check_gradients(model, gradient, golden, "grad/")


def test_three_steps_are_the_references():
    """Clipping, AdamW and their order: encoder and cross-attention after three steps."""
    model, golden = read("tiny_edge")
    rates = jnp.asarray(golden["adamw_learning_rates"])
    optimizer = OptimizerConfig(clip_norm=1.0, eps=1e-4).build(lambda count: rates[count])
    trainable, frozen = split(model, ("encoder", "cross"))
    state, step = init_state(trainable, optimizer), make_train_step(NextToken(), optimizer, Cepe)
    norms = []
    for _ in rates:
        state, metrics = step(state, frozen, cepe_batch(golden, "mask_holes"))
        norms.append(metrics["grad_norm"])
    assert error(norms, golden["adamw_gradient_norms"]) <= 1e-4
    check_gradients(model, state.trainable, golden, "adamw/")


@pytest.fixture(scope="module")
def batch(cepe):
    rng = np.random.default_rng(0)
    B, T, C, L, K = 3, 11, 2, 5, 4
    labels = rng.integers(0, 64, (B, T))
    labels[0] = IGNORE
    labels[1, ::2] = IGNORE
    labels[:, :4] = IGNORE  # a whole chunk
    teacher = rng.dirichlet(np.ones(K + 1), (B, 6))
    return {
        "tokens": rng.integers(0, 64, (B, T)),
        "labels": labels,
        "context": rng.integers(0, 64, (B, C, L)),
        "context_mask": rng.random((B, C, L)) < 0.7,
        "teacher_prob": teacher,
        "teacher_index": rng.integers(0, 64, (B, 6, K)),
    }


@pytest.fixture(scope="module")
def tied() -> Llama:
    return make_decoder(dataclasses.replace(DECODER, tied_head=True))


CASES = {
    "next token": (NextToken(), "cepe", ()),
    "tied head": (NextToken(), "tied", ("context", "context_mask")),
    "masked": (MaskedLM(), "encoder", ()),
    "taught": (Distill(DistillConfig()), "cepe", ()),
    "taught online": (Distill(DistillConfig(top_k=4)), "cepe", ("teacher_prob", "teacher_index")),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_change_neither_loss_nor_gradient(request, batch, case):
    """In micro-batches too: lengths that do not divide, and a chunk without a label.

    5 CPU-seconds: gradients whole, in chunks and in micro-batches are three programs.
    """
    objective, name, absent = CASES[case]
    model = request.getfixturevalue(name)
    train = ("encoder", "cross") if name == "cepe" else tuple(model.parts)
    batch = {field: value for field, value in batch.items() if field not in absent}
    whole, wanted = loss_and_gradient(objective, model, batch, train)
    assert float(whole) > 1
    chunked = dataclasses.replace(objective, loss_chunk=4)
    loss, gradient = loss_and_gradient(chunked, model, batch, train, micro=True)
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert error(ours, theirs) <= 1e-5


def test_a_batch_without_a_kept_label_has_loss_and_gradient_zero(cepe, batch):
    loss, gradient = loss_and_gradient(NextToken(4), cepe, batch | {"labels": np.full_like(batch["labels"], IGNORE)})
    assert float(loss) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_every_label_except_ignore_counts():
    """Token 0 is a target like any other."""
    logits, labels = np.random.default_rng(0).standard_normal((1, 3, 5)), np.array([[0, IGNORE, 4]])
    wanted = np.log(np.exp(logits).sum(-1)) - [[logits[0, 0, 0], 0.0, logits[0, 2, 4]]]
    np.testing.assert_allclose(token_nll(logits, labels), wanted * (labels != IGNORE), rtol=1e-6)


def test_a_prompt_has_no_part_in_the_loss_except_what_is_read_of_it(cepe, batch):
    """The gradient for a position without a label is zero, and another prompt changes that of no label."""
    labels = np.full(batch["labels"].shape, IGNORE)
    labels[:, -3:] = batch["labels"][:, -3:].clip(0)
    hidden = np.random.default_rng(0).standard_normal((*labels.shape, DECODER.width)).astype(np.float32)

    class Read:
        """A model that has read something, whatever the tokens."""

        decoder = cepe.decoder

        def __init__(self, hidden):
            self.hidden = hidden

        def decode(self, tokens, memory, segments_BT=None):
            return self.hidden, None

    def gradient(tokens):
        rows = {"tokens": tokens, "labels": labels}
        return jax.grad(lambda hidden: NextToken()(Read(hidden), rows, NextToken().weights(rows))[0])(hidden)

    first, second = gradient(batch["tokens"]), gradient((batch["tokens"] + 1) % 7)
    assert np.abs(first).sum(axis=(0, 2)).astype(bool).tolist() == [False] * (labels.shape[1] - 3) + [True] * 3
    np.testing.assert_array_equal(first, second)


def test_teacher_mass_of_zero_adds_nothing(cepe, batch):
    """A zero and its index: another index there changes nothing, and nothing is NaN."""
    prob, index = batch["teacher_prob"].copy(), batch["teacher_index"].copy()
    prob[:, :, 1] = 0
    one, _ = loss_and_gradient(Distill(DistillConfig()), cepe, batch | {"teacher_prob": prob})
    index[:, :, 1] = (index[:, :, 1] + 9) % 64
    other, gradient = loss_and_gradient(
        Distill(DistillConfig()), cepe, batch | {"teacher_prob": prob, "teacher_index": index}
    )
    assert float(one) == float(other)
    assert np.isfinite(float(one))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_no_logits_of_the_whole_batch_are_stored():
    """Forward and backward through a chunked head: the compiled program has no array of B x T x V entries."""
    B, T, D, V, chunk = 2, 64, 8, 512, 16
    hidden, head, labels = jnp.ones((B, T, D)), jnp.ones((V, D)), jnp.zeros((B, T), int)

    def program(chunk):
        def loss(hidden, head):
            def terms(h, y):
                return optax.softmax_cross_entropy_with_integer_labels(h @ head.T, y).sum()

            return sum_over_chunks(terms, chunk, hidden, (labels, IGNORE))

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()

    def largest(text):

        shapes = re.findall(r"f32\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(program(0)) >= B * T * V
    assert largest(program(chunk)) <= B * chunk * V
