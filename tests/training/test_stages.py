"""Every stage of the paper, end to end on a tiny corpus; what cannot start says why."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest
from support.datasets import make_data
from support.models import SIZES, bits, forget

from cepe_jax.config import DECODERS, ENCODERS, CrossLayers, LoraConfig
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches
from cepe_jax.data.records import Records
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.model.cepe import Cepe
from cepe_jax.sharding import abstract_mesh
from cepe_jax.training import run, settings, stages
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.objectives import DistillConfig
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import dry_run, run_stage
from cepe_jax.training.settings import MeshConfig, RematConfig, TrainConfig
from cepe_jax.weights.source import load

EXAMPLES = {
    "lm": ExampleConfig(window=16),
    "mlm": ExampleConfig(window=8),
    "warmup": ExampleConfig(window=8, num_chunks=1, chunk_length=8),
    "cepe": ExampleConfig(window=16, num_chunks=2, chunk_length=8),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 400)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The directory that holds every stage's run; the stages in the order of the quick start."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        small = {"vocab_size": 1, "num_layers": 2} | SIZES
        patch.setitem(DECODERS, "tiny", dataclasses.replace(DECODERS["tiny"], **small))
        patch.setitem(ENCODERS, "tiny", dataclasses.replace(ENCODERS["tiny"], **small | {"num_layers": 1}))
        decoder, encoder = str(root / "lm/model"), str(root / "mlm/model")
        of_a_cepe = {"cross_layers": CrossLayers("last", 1), "chunk_positions": 2}
        for stage, start in (
            ("lm", {"decoder": "tiny"}),
            ("mlm", {"decoder": decoder, "encoder": "tiny"}),
            ("warmup", {"decoder": decoder, "encoder": encoder} | of_a_cepe),
            ("cepe", {"cepe": str(root / "warmup/model"), "micro_batch": 2, "loss_chunk": 5}),
        ):
            mix = {"filtered": 1.0, "packed": 2.0} if stage == "cepe" else {"filtered": 1.0}
            run_stage(TrainConfig(stage, data, root / stage, 3, 4, mix=mix, examples=EXAMPLES[stage], **start))
    return root


def test_each_stage_trains_what_it_should(runs):
    """The decoder keeps its bits from its first stage to the last; encoder and cross-attention move in each.

    15 CPU-seconds, with the fixture: all stages one after another, which the tests below start from.
    """
    lm, mlm, warmup, cepe = (load(runs / stage / "model").parts for stage in ("lm", "mlm", "warmup", "cepe"))
    assert isinstance(load(runs / "cepe/model"), Cepe)
    assert bits(lm["decoder"]) == bits(warmup["decoder"]) == bits(cepe["decoder"])
    for part in ("encoder", "cross"):
        assert all(a != b for a, b in zip(bits(warmup[part]), bits(cepe[part]), strict=True))
    assert mlm["encoder"].config.mlm_head
    assert not warmup["encoder"].config.mlm_head
    assert mlm["encoder"].config.vocab_size == lm["decoder"].config.vocab_size + 1 == 401
    assert cepe["cross"].layers == CrossLayers("last", 1)
    assert cepe["encoder"].config.chunk_positions == 2
    assert not mlm["encoder"].config.chunk_positions


def test_a_stage_leaves_its_configuration_metrics_and_tokenizer(runs, data):
    config = json.loads((runs / "cepe/config.json").read_text())
    assert (config["stage"], config["steps"], config["examples"]["num_chunks"]) == ("cepe", 3, 2)
    assert config["optimizer"]["learning_rate"] == 3e-4  # a default, resolved
    lines = [json.loads(line) for line in (runs / "cepe/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert 0 < lines[-1]["nll"] < 10
    assert (runs / "cepe/model/tokenizer.model").read_bytes() == (data / "filtered/tokenizer.model").read_bytes()


def test_a_finished_stage_is_not_trained_again(runs, data, caplog):
    mix = {"filtered": 1.0, "packed": 2.0}
    start = {"cepe": "moved", "micro_batch": 2, "loss_chunk": 5, "mix": mix, "examples": EXAMPLES["cepe"]}
    config = TrainConfig("cepe", data, runs / "cepe", 3, 4, **start)
    assert run_stage(config) == runs / "cepe/model"
    assert f"{runs}/cepe/model is finished" in caplog.text
    with pytest.raises(ValueError, match="another run, steps .* 3 .* 4 "):
        run_stage(dataclasses.replace(config, steps=4))
    with pytest.raises(ValueError, match="another run, mix .*1.0.* there .*2.0.* here"):
        run_stage(dataclasses.replace(config, mix={"filtered": 2.0, "packed": 2.0}))
    assert run_stage(dataclasses.replace(config, workers=2)) == runs / "cepe/model"


def test_a_killed_run_reads_on_where_it_was(runs, data, tmp_path, monkeypatch):
    """Cut off one step after a checkpoint: no batch is skipped or repeated, and the model is the same bit for bit.

    8 CPU-seconds: three runs whose batches and bits are compared.
    """
    start = {"cepe": str(runs / "warmup/model"), "mix": {"filtered": 1.0, "packed": 2.0}, "examples": EXAMPLES["cepe"]}
    config = TrainConfig("cepe", data, tmp_path / "whole", 5, 4, save_every=3, **start)
    seen: list[tuple[int, bytes]] = []

    def watched(data, batch_size, first, *rest):
        for step, batch in enumerate(batches(data, batch_size, first, *rest), first):
            seen.append((step, batch["context"].tobytes()))
            if dying and step == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(run, "batches", watched)
    dying = False
    whole = run_stage(config)
    uninterrupted = seen[:5]
    seen.clear()
    cut = dataclasses.replace(config, out=tmp_path / "cut")
    dying = True
    with pytest.raises(KeyboardInterrupt):
        run_stage(cut)
    dying = False
    resumed = run_stage(cut)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 3, 4]
    assert seen[:3] + seen[5:] == uninterrupted
    assert bits(load(whole)) == bits(load(resumed))


def test_the_record_is_of_the_run_that_has_checkpoints(runs, data, tmp_path, monkeypatch):
    """A start that was cut off before its first leaves no settings to the next."""

    def none(*_):
        raise KeyboardInterrupt

    def rate() -> float:
        return json.loads((tmp_path / "out/config.json").read_text())["optimizer"]["learning_rate"]

    config = TrainConfig(
        "lm", data / "packed", tmp_path / "out", 2, 4, decoder=str(runs / "lm/model"), examples=EXAMPLES["lm"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(run, "batches", none)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    assert rate() == 3e-4
    other = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-3))
    run_stage(other)
    assert rate() == 1e-3
    shutil.rmtree(tmp_path / "out/model")
    with pytest.raises(ValueError, match="another run, optimizer "):
        run_stage(config)
    assert rate() == 1e-3
    run_stage(dataclasses.replace(other, remat=RematConfig("full"), attention="xla", loss_chunk=4, mlp_chunk=4))


def test_evaluation_changes_nothing(runs, data, tmp_path):
    """It reads the test split, the same batches at every time; the run may go on without it, and has the same bits.

    10 CPU-seconds: two runs whose bits are compared.
    """
    unseen = tmp_path / "unseen"
    sample(SampleConfig(data=data / "docs", out=unseen, kind="filtered", length=32, split="test", workers=1))
    start = {"cepe": str(runs / "warmup/model"), "mix": {"filtered": 1.0, "packed": 2.0}, "examples": EXAMPLES["cepe"]}
    config = TrainConfig("cepe", data, tmp_path / "with", 2, 4, log_every=1, **start)
    evaluated = dataclasses.replace(config, evaluation=EvalConfig(unseen, every=1, batches=2))

    def lines(name: str) -> list[dict]:
        times = {"seconds_per_step", "tokens_per_second", "peak_memory"}
        entries = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in entry.items() if key not in times} for entry in entries]

    model = run_stage(evaluated)
    assert [(line["step"], "eval_nll" in line) for line in lines("with")] == [(n, e) for n in (1, 2) for e in (0, 1)]
    assert run_stage(config) == model
    without = run_stage(dataclasses.replace(config, out=tmp_path / "without"))
    assert bits(load(model)) == bits(load(without))
    assert [line for line in lines("with") if "eval_nll" not in line] == lines("without")
    assert lines("with")[1]["eval_nll"] != lines("with")[3]["eval_nll"]  # the weights moved between them
    still = OptimizerConfig(learning_rate=1e-30)
    run_stage(dataclasses.replace(evaluated, out=tmp_path / "still", optimizer=still))
    first, second = (line["eval_nll"] for line in lines("still") if "eval_nll" in line)
    assert first == second != lines("still")[0]["nll"]
    for changes, message in (
        ({"batches": 1000}, r"unseen has \d+ .*evaluation.batches .* 4000: "),
        ({"split": "train"}, "unseen: .*split train: .*test"),
    ):
        evaluation = dataclasses.replace(evaluated.evaluation, **changes)
        with pytest.raises(ValueError, match=message):
            run_stage(dataclasses.replace(evaluated, out=tmp_path / "refused", evaluation=evaluation))
    assert not (tmp_path / "refused").exists()


def test_a_dry_run_tells_what_a_run_would_be(runs, data, tmp_path, monkeypatch):
    """From shapes alone: nothing is loaded or written. The counts are those of the model that was trained."""
    start = {
        "decoder": str(runs / "lm/model"),
        "encoder": str(runs / "mlm/model"),
        "cross_layers": CrossLayers("last", 1),
    }
    mix = {"filtered": 1.0, "packed": 3.0}
    config = TrainConfig("cepe", data, tmp_path / "out", 7, 4, mix=mix, examples=EXAMPLES["cepe"], **start)
    for module, name in ((stages, "load"), (run, "starting_model"), (run, "batches")):
        monkeypatch.delattr(module, name)
    said = "\n".join(dry_run(config))
    parts = load(runs / "cepe/model").parts
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in parts.items()}
    trains = sizes["encoder"] + sizes["cross"]
    assert said.startswith(f"cepe: {trains:,} parameters train, {sizes['decoder']:,} are frozen, vocabulary of 400\n")
    assert "7 steps of 4 sequences, 128 tokens in contexts and windows: 896 tokens" in said
    assert json.loads(said[said.index("\n{") :])["optimizer"]["learning_rate"] == 3e-4
    assert "1 x cpu, mesh {'data': 1, 'fsdp': 1, 'context': 1, 'memory': 1, 'tensor': 1}" in said.splitlines()
    examples = len(Records(data / "packed", "train"))
    assert f"packed: {7 * 4 * 0.75 / examples:.2f} times each of its {examples} examples" in said
    assert not (tmp_path / "out").exists()
    told = []
    with pytest.raises(ValueError, match=" 32 .* 4128"):
        told += dry_run(dataclasses.replace(config, examples=ExampleConfig(window=32)))
    assert any("chip hours" in line for line in told)  # the price is told all the same
    monkeypatch.setattr(run, "make_mesh", lambda **_: abstract_mesh(tensor=4))
    with pytest.raises(ValueError, match="cross.k: .* 1 .*kv_heads .*mesh.tensor, .* 4"):
        run_stage(config)  # before anything is loaded, too


def test_a_run_is_of_its_data(runs, data, tmp_path):
    """The same names with other records in them are another run's."""
    for kind in ("filtered", "packed"):
        sample(SampleConfig(data=data / "docs", out=tmp_path / kind, kind=kind, length=32, seed=5, stride=0, workers=1))
    mix = {"filtered": 1.0, "packed": 2.0}
    start = {"cepe": "moved", "micro_batch": 2, "loss_chunk": 5, "mix": mix, "examples": EXAMPLES["cepe"]}
    with pytest.raises(ValueError, match="another run, dataset "):
        run_stage(TrainConfig("cepe", tmp_path, runs / "cepe", 3, 4, **start))


def test_a_start_that_is_neither_directory_nor_preset(data, tmp_path):
    with pytest.raises(ValueError, match="llama2-7b .*preset: .* llama2_7b"):
        run_stage(
            TrainConfig("lm", data / "packed", tmp_path / "out", 3, 4, decoder="llama2-7b", examples=EXAMPLES["lm"])
        )


def test_a_model_of_another_vocabulary_is_refused(runs, tmp_path):
    config = TrainConfig(
        "cepe",
        make_data(tmp_path, 420) / "packed",
        tmp_path / "out",
        3,
        4,
        cepe=str(runs / "cepe/model"),
        examples=EXAMPLES["cepe"],
    )
    with pytest.raises(ValueError, match="tokenizer of .*: use .*tokenizer.model"):
        run_stage(config)
    bare = tmp_path / "bare"
    shutil.copytree(runs / "cepe/model", bare)
    forget(bare)
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="decoder's vocabulary .* 400 .* 420 ids"):
        run_stage(dataclasses.replace(config, cepe=str(bare)))
    assert not (tmp_path / "out").exists()


def test_in_bfloat16_the_frozen_part_is_narrow_and_what_trains_is_not(runs, data, tmp_path):
    start = {
        "cepe": str(runs / "warmup/model"),
        "examples": EXAMPLES["cepe"],
        "dtype": "bfloat16",
        "remat": RematConfig("full", "full"),
    }
    model = run_stage(TrainConfig("cepe", data / "packed", tmp_path / "out", 2, 4, **start))
    tensors = json.loads((model / "hash.json").read_text())["tensors"]
    assert {(name.split(".")[0], facts["dtype"]) for name, facts in tensors.items()} == {
        ("decoder", "bfloat16"),
        ("encoder", "float32"),
        ("cross", "float32"),
    }
    losses = [json.loads(line)["nll"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["nll"] for line in (runs / "cepe/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] == pytest.approx(whole[-1], rel=0.2)


def test_factors_train_beside_a_frozen_decoder_and_go_on(runs, data, tmp_path):
    """Of a decoder alone, and beside cross-attention; a later run trains those that are there."""
    lora = LoraConfig(2, 4.0, ("q", "up"))
    start = {"decoder": str(runs / "lm/model"), "mix": {"filtered": 1.0}, "examples": EXAMPLES["lm"]}
    config = TrainConfig("lm", data, tmp_path / "lora", 3, 4, train=("decoder_lora",), lora=lora, **start)
    first = load(run_stage(config)).parts
    assert bits(first["decoder"]) == bits(load(runs / "lm/model"))
    assert first["decoder_lora"].config == lora
    assert all(leaf.any() for leaf in jax.tree.leaves(first["decoder_lora"]))
    again = dataclasses.replace(config, out=tmp_path / "again", decoder=str(tmp_path / "lora/model"), lora=None)
    second = load(run_stage(again)).parts
    assert bits(second["decoder"]) == bits(first["decoder"])
    moved = zip(bits(first["decoder_lora"]), bits(second["decoder_lora"]), strict=True)
    assert all(a != b for a, b in moved)
    with pytest.raises(ValueError, match="decoder has factors already, .*rank=2"):
        run_stage(dataclasses.replace(again, out=tmp_path / "other", lora=LoraConfig(3)))

    cepe = TrainConfig(
        "cepe", data, tmp_path / "cepe", 3, 4, mix={"packed": 1.0}, examples=EXAMPLES["cepe"], micro_batch=2,
        cepe=str(runs / "warmup/model"), train=("cross", "decoder_lora", "encoder_lora"), lora=lora,
    )  # fmt: skip
    start, tuned = load(runs / "warmup/model").parts, load(run_stage(cepe)).parts
    assert [bits(start[name]) == bits(tuned[name]) for name in ("decoder", "encoder", "cross")] == [True, True, False]
    assert {name: sum(x.size for x in jax.tree.leaves(tuned[name])) for name in tuned if name.endswith("_lora")} == {
        "decoder_lora": 2 * 2 * (16 + 16 + 16 + 24),
        "encoder_lora": 1 * 2 * (16 + 16 + 16 + 24),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"loss_chunk": -1}, "loss_chunk is -1: .*0 .*auto"),
        ({"mesh": MeshConfig(context=2)}, "mesh.context is 2: .*plain decoder.* stage cepe .*cepe"),
        ({"stage": "mlm", "cepe": "", "encoder": "e", "mesh": MeshConfig(context=2)}, "mesh.context .*stage mlm .*enc"),
        (
            {
                "stage": "lm",
                "cepe": "",
                "decoder": "d",
                "mesh": MeshConfig(context=3),
                "examples": ExampleConfig(window=8),
            },
            "window 8 .*2 x mesh.context = 6",
        ),
        ({"cepe": ""}, "stage cepe .* cepe or decoder .*encoder; given: none"),
        ({"decoder": "a"}, "stage cepe .* cepe or decoder .*encoder; given: decoder .*cepe"),
        ({"stage": "lm"}, "stage lm .* decoder; given: cepe"),
        ({"steps": 0}, "steps is 0"),
        ({"train": ("head",)}, "train names head: stage cepe may train encoder, cross, decoder, .*decoder_lora"),
        ({"lora": LoraConfig()}, "lora .*add decoder_lora"),
        ({"mix": {"a": 0.0}}, r"mix is \{'a': 0.0\}: .*above 0"),
        ({"mix": {"a": 1.5}, "mix_by": "size"}, r"mix is \{'a': 1.5\} by size: .*whole"),
        ({"mix_by": "size"}, r"mix is \{\} by size"),
        ({"workers": -1}, "workers is -1: .*processes"),
        ({"keep": -1}, "keep is -1: "),
        ({"cross_layers": CrossLayers("last", 2)}, "cross_layers .*stage cepe from cepe"),
        ({"chunk_positions": 2}, "chunk_positions .*stage cepe from cepe"),
        ({"distill": DistillConfig()}, "distill .*stage cepe "),
        ({"stage": "ceped"}, "stage ceped needs distill"),
        (
            {"stage": "ceped", "distill": DistillConfig(), "examples": ExampleConfig(foreign_rate=0.1)},
            "foreign_rate .*stage ceped",
        ),
    ],
)
def test_bad_configurations(changes, message):
    fields = {"stage": "cepe", "data": Path("d"), "out": Path("o"), "steps": 3, "batch_size": 4, "cepe": "c"}
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields | changes)


def test_a_window_that_splash_cannot_share_is_refused():
    """Before anything is loaded: 128 tokens for each device."""
    shared = {"data": Path("d"), "out": Path("o"), "steps": 1, "batch_size": 4, "decoder": "d"}
    config = TrainConfig("lm", **shared, mesh=MeshConfig(context=4), examples=ExampleConfig(window=768))
    settings.check_attention(config, "xla")
    with pytest.raises(ValueError, match="768 .* 4 .*128 .*mesh.context"):
        settings.check_attention(config, "splash")


FITS = (1 << 19, 1), (1 << 20, 4), (268_800, 3), (19_200, 3), (20_736, 6)
TOO_LONG = ((1 << 19) + 12, 1), ((1 << 20) + 4096, 4), (261_888, 2), (266_752, 4)


@pytest.mark.parametrize(("window", "devices"), [*FITS, *TOO_LONG])
def test_the_longest_windows_of_splash(window, devices):
    """Up to where its tables of blocks fit a chip (tests/benchmarks/test_aot.py); a shared window is not filled up."""
    shared = {"data": Path("d"), "out": Path("o"), "steps": 1, "batch_size": 4, "decoder": "d"}
    config = TrainConfig("lm", **shared, mesh=MeshConfig(context=devices), examples=ExampleConfig(window=window))
    if (window, devices) in FITS:
        settings.check_attention(config, "splash")
        return
    with pytest.raises(ValueError, match=f"{window} .* {devices} devices.*mesh.context"):
        settings.check_attention(config, "splash")


def test_a_mesh_of_no_devices_is_refused():
    with pytest.raises(ValueError, match="data=0.*devices"):
        MeshConfig(data=0)
    with pytest.raises(ValueError, match="context=0.*devices"):
        MeshConfig(context=0)


CONFIG = TrainConfig("cepe", Path("d"), Path("o"), 3, 16, cepe="c")


@pytest.mark.parametrize(
    ("changes", "devices", "fsdp", "micro_batches"),
    [
        ({}, 1, 1, 1),
        ({"micro_batch": 1}, 1, 1, 16),
        ({"micro_batch": 1}, 8, 8, 2),
        ({"micro_batch": 2, "mesh": MeshConfig(tensor=2)}, 8, 4, 2),
        ({"micro_batch": 4, "mesh": MeshConfig(data=2, fsdp=2)}, 4, 2, 1),
        ({"mesh": MeshConfig(tensor=4)}, 8, 2, 1),
        ({"stage": "lm", "cepe": "", "decoder": "d", "train": (), "mesh": MeshConfig(context=4)}, 8, 2, 1),
    ],
)
def test_a_batch_falls_into_the_devices_micro_batches(changes, devices, fsdp, micro_batches):
    config = dataclasses.replace(CONFIG, **changes)
    mesh = settings.mesh_of(config, devices)
    assert mesh.fsdp == fsdp
    assert settings.micro_batches(config, mesh.data * mesh.fsdp) == micro_batches


@pytest.mark.parametrize(
    ("changes", "devices"), [({"micro_batch": 3}, 1), ({}, 3), ({"mesh": MeshConfig(data=32)}, 32)]
)
def test_a_batch_that_does_not_divide_is_refused(changes, devices):
    with pytest.raises(ValueError, match=r"batch_size 16 .* = (3|32): "):
        settings.mesh_of(dataclasses.replace(CONFIG, **changes), devices)


@pytest.mark.parametrize(
    ("changes", "platform", "backend"),
    [
        ({}, "tpu", "splash"),
        ({}, "cpu", "xla"),
        ({}, "gpu", "xla"),  # cuDNN computes in 16 bits
        ({"dtype": "bfloat16"}, "gpu", "cudnn"),
        ({"attention": "xla"}, "tpu", "xla"),
    ],
)
def test_attention_is_the_platforms(changes, platform, backend):
    assert settings.compute_of(dataclasses.replace(CONFIG, **changes), platform).attention == backend
