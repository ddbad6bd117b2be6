"""A teacher's dataset: what the decoder expects of each sequence, and a stage that learns from it as online."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support.datasets import make_data
from support.models import SIZES, forget

from cepe_jax.config import DECODERS, ENCODERS
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.records import Records
from cepe_jax.data.retrieval import RetrieveConfig, retrieve
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.training.teacher import TeacherConfig, teach
from cepe_jax.weights.source import load, save

VOCAB, WINDOW, CONTEXT, K = 400, 20, 12, 6
EXAMPLES = ExampleConfig(window=WINDOW, num_chunks=3, chunk_length=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Sequences of 32 tokens, passages for them, a decoder that may read 32, and an encoder."""
    home = make_data(tmp_path_factory.mktemp("data"), VOCAB)
    sizes = {"vocab_size": VOCAB, "num_layers": 2} | SIZES
    save(Llama(dataclasses.replace(DECODERS["tiny"], **sizes), key=jax.random.key(1)), home / "decoder", home / "docs")
    save(Encoder(dataclasses.replace(ENCODERS["tiny"], **sizes), key=jax.random.key(2)), home / "encoder")
    limited(home / "decoder", 32)
    passages = {"passages": home / "docs", "passage_split": "train", "passage_length": 4, "query_tokens": 8}
    retrieve(RetrieveConfig(data=home / "filtered", out=home / "retrieved", k=1, workers=1, **passages))
    return home


def limited(model, positions: int) -> None:
    forget(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"huggingface": {"max_position_embeddings": positions}}))


def preparation(home, **changes) -> TeacherConfig:
    sizes = {"window": WINDOW, "context": CONTEXT, "top_k": K, "batch_size": 50}
    config = TeacherConfig(model=home / "decoder", data=home / "filtered", out=home / "taught", **sizes)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def taught(home):
    teach(preparation(home))
    return home


def test_the_dataset_is_what_the_decoder_expects(taught):
    """The last record of a batch that is filled up too."""
    sequences, records = Records(taught / "filtered", "train"), Records(taught / "taught", "train")
    assert len(sequences) == len(records)
    assert len(sequences) % 50
    tokens = np.stack([record["tokens"][: CONTEXT + WINDOW] for record in sequences])
    probs = np.asarray(jax.nn.softmax(jax.jit(Llama.__call__)(load(taught / "decoder"), tokens)[:, CONTEXT:]))
    wanted = np.sort(probs, axis=-1)[..., : -K - 1 : -1]
    for record, prob, top in zip(records, probs, wanted, strict=True):
        assert (record["teacher_index"].dtype, record["teacher_prob"].dtype) == (np.uint16, np.float16)
        chosen = np.take_along_axis(prob, record["teacher_index"].astype(int), axis=-1)
        np.testing.assert_allclose(chosen, top, rtol=1e-4)
        rest = 1 - top.sum(-1, keepdims=True)
        np.testing.assert_allclose(record["teacher_prob"], np.concatenate([top, rest], axis=-1), rtol=1e-3)


def test_a_dataset_is_made_once_and_of_one_teacher(taught, caplog):
    teach(preparation(taught, batch_size=7))
    assert f"{taught}/taught is finished" in caplog.text
    with pytest.raises(ValueError, match="another run, top_k .* 6 .* 5 "):
        teach(preparation(taught, top_k=5))


def stage(home, out, **changes) -> TrainConfig:
    fields = {
        "stage": "ceped",
        "data": home / "taught",
        "out": out,
        "steps": 1,
        "batch_size": 4,
        "examples": EXAMPLES,
        "log_every": 1,
    }
    fields |= {"decoder": str(home / "decoder"), "encoder": str(home / "encoder"), "distill": DistillConfig(top_k=K)}
    return TrainConfig(**fields | changes)


def test_both_teachers_teach_the_same(taught, tmp_path):
    """To the rounding of 16 bits: the same examples, masks and teacher.

    8 CPU-seconds: two runs of a stage, the teacher's probabilities stored and computed.
    """
    first = []
    for data in ("filtered", "taught"):
        run_stage(stage(taught, tmp_path / data, data=taught / data))
        first.append(json.loads((tmp_path / data / "metrics.jsonl").read_text()))
    online, prepared = first
    assert prepared["nll"] == online["nll"]
    assert prepared["kl"] == pytest.approx(online["kl"], rel=2e-3)
    assert prepared["kl"] != online["kl"]
    assert prepared["loss"] == pytest.approx(prepared["nll"] + 2 * prepared["kl"], rel=1e-6)
    assert prepared["kl"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "cepe", "distill": None}, "taught holds teacher .*filtered"),
        ({"distill": DistillConfig(top_k=5)}, "taught has 6 .*distill.top_k is 5"),
        ({"mix": {"taught": 1.0, "filtered": 1.0}}, "mix .*teacher's probabilities"),
        ({"mix": {"retrieved": 1.0}}, "retrieved holds retrieved .*filtered"),
        ({"mix": {"filtered": 1.0}, "train": ("cross", "decoder")}, "decoder .*teacher .*train"),
        ({"mix": {"filtered": 1.0}, "decoder": "short"}, "short reads 31 .* 32: "),
        ({"evaluation": "filtered", "train": ("cross", "decoder")}, "filtered: .*decoder .*teacher"),
        ({"evaluation": "filtered", "decoder": "short"}, "short reads 31 .* 32: "),
        ({"evaluation": "retrieved"}, "retrieved holds retrieved .*filtered"),
        (
            {"stage": "cepe", "distill": None, "mix": {"filtered": 1.0}, "evaluation": "taught"},
            "taught holds teacher .*filtered",
        ),
    ],
)
def test_what_no_stage_learns_from(taught, tmp_path, changes, message):
    if changes.get("decoder") == "short":
        shutil.copytree(taught / "decoder", tmp_path / "short")
        limited(tmp_path / "short", 31)
        changes = changes | {"decoder": str(tmp_path / "short")}
    if "mix" in changes:
        changes = changes | {"data": taught}
    if "evaluation" in changes:
        changes = changes | {"evaluation": EvalConfig(taught / changes["evaluation"], "train", batches=1)}
    with pytest.raises(ValueError, match=message):
        run_stage(stage(taught, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 21}, "sequences of 33 tokens.*--length=33"),
        ({"window": 8, "context": 8}, "sequences of 16 tokens.*--length=16"),
        ({"data": "docs"}, "docs: .*no sequences"),
        ({"model": "encoder"}, "encoder is .*encoder: .*decoder"),
        ({"top_k": 401}, "vocabulary of 400 .* 401, top_k"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_what_cannot_be_taught(home, tmp_path, changes, message):
    places = {name: home / value for name, value in changes.items() if isinstance(value, str)}
    with pytest.raises(ValueError, match=message):
        teach(preparation(home, out=tmp_path / "out", **changes | places))
    assert not (tmp_path / "out").exists()


def test_a_teacher_reads_its_window_alone(home, tmp_path):
    shutil.copytree(home / "decoder", tmp_path / "short")
    limited(tmp_path / "short", 31)
    with pytest.raises(ValueError, match=f"{tmp_path}/short reads 31 .* 32: "):
        teach(preparation(home, model=tmp_path / "short", out=tmp_path / "out"))
