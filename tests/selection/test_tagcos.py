"""TAGCOS from a run of training to a dataset that `mix` names: features by definition, units, budgets, refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import datasets
from support.models import CROSS_LAYERS, DECODER, ENCODER, filled, make_decoder
from support.refusals import one_line
from support.tokenizers import write_chatml

from cepe_jax.config import CepeConfig, LoraConfig
from cepe_jax.data.conversations import ConversationConfig, features_of, prepare_conversations
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import open_mix
from cepe_jax.data.records import Records
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.parts import split
from cepe_jax.selection.projection import BLOCK, signs
from cepe_jax.selection.tagcos import FEATURES, TagcosConfig, read_features, tagcos
from cepe_jax.training.objectives import NextToken
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig, recipe_of
from cepe_jax.weights.source import load, save

pytest.importorskip("sklearn")
DIM, STEPS = 48, (2, 4)
WEIGHTS = np.array([0.25, 0.75])
EXAMPLES = ExampleConfig(window=64)
WORDS = [f"{a}{b}" for a in "abcdefghij" for b in "uvwxyz"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Conversations in three shards, one of them too long for the window; a warm-up of four steps by factors.

    12 CPU-seconds, for all tests here.
    """
    home = tmp_path_factory.mktemp("tagcos")
    write_chatml(home)
    save(make_decoder(dataclasses.replace(DECODER, vocab_size=334)), home / "decoder", assets=home)
    (home / "raw").mkdir()
    with open(home / "raw/chats.jsonl", "w") as file:
        for word in [*WORDS, "long " * 50]:
            turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": turns}) + "\n")
    unit = (home / "raw/chats.jsonl").stat().st_size // 3 + 100
    given = {"tokenizer": str(home / "decoder"), "test_fraction": 0.1, "unit_bytes": unit, "workers": 1}
    prepare_conversations(ConversationConfig(input=home / "raw", out=home / "data/chats", **given))
    run_stage(warm_up(home, home / "run"))
    tagcos(config_of(home, home / "data/coreset"))
    return home


def warm_up(home: Path, out: Path, **settings) -> TrainConfig:
    given = {"decoder": str(home / "decoder"), "examples": EXAMPLES, "save_every": 1, "keep": 3}
    given |= {"train": ("decoder_lora",), "lora": LoraConfig(2, 4.0)}
    return TrainConfig("sft", home / "data/chats", out, 4, 4, **given | settings)


def config_of(home: Path, out: Path, **settings) -> TagcosConfig:
    given = {"run": home / "run", "steps": STEPS, "data": home / "data/chats", "fraction": 0.2, "clusters": 3}
    return TagcosConfig(**given | {"dim": DIM, "weights": (1.0, 3.0), "workers": 1} | settings, out=out)


def features_in(coreset: Path) -> np.ndarray:
    marks = sorted((coreset / FEATURES / "units").glob("0*.json"))
    return read_features(coreset / FEATURES, [json.loads(mark.read_text())["rows"] for mark in marks], DIM)


def fits(home: Path) -> list[int]:
    records = Records(home / "data/chats", "train")
    return [n for n, record in enumerate(records) if len(record["tokens"]) <= EXAMPLES.window + 1]


def test_features_are_their_definition(home):
    """From the stored moments, one example at a time, in fp64, with the signs as one matrix."""
    records, numbers = Records(home / "data/chats", "train"), fits(home)
    model, objective = load(home / "run/model"), NextToken()
    trainable, frozen = split(model, ("decoder_lora",))
    leaves, structure = jax.tree.flatten(trainable)
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(trainable))
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in paths]
    size = sum(leaf.size for leaf in leaves)
    matrix = np.concatenate([np.asarray(signs(0, n, DIM), np.float64) for n in range(-(-size // BLOCK))])[:size]

    @jax.jit
    @jax.grad
    def gradient(trainable, tokens, labels):
        batch = {"tokens": tokens[None], "labels": labels[None]}
        return objective(type(model).from_parts(trainable | frozen), batch, objective.weights(batch))[0]

    def vector(arrays) -> np.ndarray:
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])

    chosen = numbers[:2] + numbers[-1:]
    wanted = np.zeros((len(chosen), DIM))
    for step, weight in zip(STEPS, WEIGHTS, strict=True):
        with ocp.CheckpointManager(home / "run/checkpoints") as manager:
            stored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]

        def named(prefix, stored=stored):
            return [next(x for key, x in stored.items() if key.endswith(f"{prefix}.{name}")) for name in names]

        point, m, v = structure.unflatten(named("trainable")), vector(named("mu")), vector(named("nu"))
        for row, number in enumerate(chosen):
            tokens, targets = (records[number][key].astype(np.int32) for key in ("tokens", "targets"))
            labels = np.where(targets[1:], tokens[1:], -100)
            g = vector(jax.tree.leaves(gradient(point, tokens[:-1], labels)))
            update = (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8) @ matrix
            wanted[row] += weight * update / np.linalg.norm(update)
    features = features_in(home / "data/coreset")
    assert features.shape == (len(numbers), DIM)
    np.testing.assert_allclose(features[[0, 1, -1]], wanted, atol=2e-4)


def test_budget_is_exact_and_the_dataset_says_what_it_selects(home):
    records, numbers = Records(home / "data/coreset", "train"), fits(home)
    selected = [int(record["number"]) for record in records]
    assert len(numbers) == len(Records(home / "data/chats", "train")) - 1
    assert len(selected) == round(0.2 * len(numbers))
    assert selected == sorted(set(selected))
    assert set(selected) <= set(numbers)
    assert {int(record["repeats"]) for record in records} == {1}
    base = Records(home / "data/chats", "train")
    assert records.index["selects"] == {"path": "../chats", "split": "train", "digest": base.digest}
    assert records.facts["tokens"] == sum(len(base[n]["tokens"]) for n in selected)
    report = (home / "data/coreset/report.md").read_text()
    rows = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith(("| 0 ", "| 1 ", "| 2 "))]
    assert sum(int(row[1]) for row in rows) == len(numbers)
    assert sum(int(row[2]) for row in rows) == len(selected)


def test_jobs_share_units_and_a_killed_one_goes_on(home, tmp_path):
    """Two jobs, and one that finds a mark missing, write the same bytes as one job that did all.

    7 CPU-seconds: three jobs open the models.
    """
    once, out = features_in(home / "data/coreset"), tmp_path / "coreset"
    tagcos(config_of(home, out, shard="0/2"))
    assert not (out / "dataset.json").exists()
    first = out / FEATURES / "00000.npy"
    written = first.stat().st_mtime_ns
    tagcos(config_of(home, out, shard="1/2"))
    np.testing.assert_array_equal(features_in(out), once)
    assert (out / "dataset.json").exists()
    (out / "dataset_info.json").unlink()
    (out / FEATURES / "units/00001.json").unlink()
    (out / FEATURES / "00001.npy").write_bytes(b"half")
    tagcos(config_of(home, out))
    np.testing.assert_array_equal(features_in(out), once)
    assert first.stat().st_mtime_ns == written
    assert Records(out, "train").digest == Records(home / "data/coreset", "train").digest


def test_coresets_share_features(home, tmp_path):
    """Another fraction, from the features that are there: the function that makes them is not opened again."""
    features = tmp_path / "features"
    shutil.copytree(home / "data/coreset" / FEATURES, features)
    times = {path: path.stat().st_mtime_ns for path in features.glob("*.npy")}
    tagcos(config_of(home, tmp_path / "half", fraction=0.5, features=features))
    assert {path: path.stat().st_mtime_ns for path in features.glob("*.npy")} == times
    assert len(Records(tmp_path / "half", "train")) == round(0.5 * len(fits(home)))
    with pytest.raises(ValueError, match="dim is 48 there and 16 here") as refusal:
        tagcos(config_of(home, tmp_path / "other", dim=16, features=features))
    one_line(refusal)


@pytest.mark.parametrize("place", ["features", "out/features"])
def test_a_refused_choice_leaves_features_for_another(home, tmp_path, place):
    """Features of three kinds alone: of five clusters two are empty, three are made in the same place."""
    features = tmp_path / place
    (tmp_path / "out/units").mkdir(parents=True)
    shutil.copytree(home / "data/coreset" / FEATURES, features)
    for path in features.glob("*.npy"):
        rows = len(np.load(path))
        np.save(path, np.eye(DIM, dtype=np.float32)[np.arange(rows) % 3])
    with pytest.raises(ValueError, match="5.* 2 ") as refusal:
        tagcos(config_of(home, tmp_path / "out", clusters=5, features=features))
    one_line(refusal)
    tagcos(config_of(home, tmp_path / "out", clusters=3, features=features))
    assert len(Records(tmp_path / "out", "train")) == round(0.2 * len(fits(home)))


def test_devices_share_the_examples(home, tmp_path):
    """Four devices, in a process of its own. 13 CPU-seconds: the only run over a mesh, and of the command."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).parents[2] / "scripts/prepare_data.py"
    settings = {"run": home / "run", "steps": "[2, 4]", "data": home / "data/chats", "out": tmp_path / "coreset"}
    settings |= {"fraction": 0.2, "clusters": 3, "dim": DIM, "weights": "[1, 3]", "workers": 1}
    words = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, script, "tagcos", *words], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2 checkpoints, 2,448 parameters train" in done.stderr
    assert f"{2 * 2448 * DIM * 2 * len(fits(home)):.3e} for projections" in done.stderr
    np.testing.assert_allclose(features_in(tmp_path / "coreset"), features_in(home / "data/coreset"), atol=1e-4)


def test_mix_trains_on_the_selected_alone(home, tmp_path):
    config = dataclasses.replace(
        warm_up(home, tmp_path / "out"), data=home / "data", mix={"coreset": 1.0}, steps=2, save_every=2
    )
    (source,) = open_mix(config.data, config.mix, recipe_of(config))
    names = {name for n in range(len(source)) for name in source[n]["name"].splitlines()}
    base = Records(home / "data/chats", "train")
    selected = {int(record["number"]) for record in Records(home / "data/coreset", "train")}
    assert names == {base[n]["name"] for n in selected}
    (whole,) = open_mix(home / "data/chats", {}, recipe_of(config))
    assert source.digest != whole.digest
    assert source.path.name == "coreset"
    assert run_stage(config).name == "model"


def test_weights_become_repeats(home, tmp_path):
    config = config_of(
        home, tmp_path / "data/weighted", use_weights=True, repeats=3, features=home / "data/coreset" / FEATURES
    )
    tagcos(config)
    records = list(Records(config.out, "train"))
    repeats, weights = (np.array([float(record[key]) for record in records]) for key in ("repeats", "weight"))
    assert repeats.sum() == 3 * len(records)
    assert np.abs(repeats - 3 * len(records) * weights / weights.sum()).max() < 1
    assert len(set(repeats)) > 1
    shutil.copytree(home / "data/chats", tmp_path / "data/chats")
    index = json.loads((config.out / "dataset.json").read_text())
    assert index["selects"]["path"].endswith("data/chats")
    (source,) = open_mix(config.out, {}, recipe_of(warm_up(home, tmp_path / "out")))
    lines = [name for n in range(len(source)) for name in source[n]["name"].splitlines()]
    base = Records(home / "data/chats", "train")
    for record in records:
        assert lines.count(base[int(record["number"])]["name"]) == int(record["repeats"])


def test_parts_of_a_cepe_and_sequences(home, tmp_path):
    """Its encoder and cross-attention; the masks of contexts are a record's own, whatever batch it is in.

    15 CPU-seconds: the other kind of records, and of what trains.
    """
    encoder = dataclasses.replace(ENCODER, vocab_size=335, mlm_head=False)
    sizes = CepeConfig(dataclasses.replace(DECODER, vocab_size=334), encoder, CROSS_LAYERS)
    save(filled(lambda: Cepe.create(sizes, key=jax.random.key(0)), seed=3), tmp_path / "cepe", assets=home)
    tokenizer = Records(home / "data/chats", "train").tokenizer
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, 300, 17) for _ in range(12)]
    data = datasets.write_sequences(tmp_path / "sequences", sequences, 16, tokenizer)
    examples = ExampleConfig(window=8, num_chunks=2, chunk_length=4, chunk_mask_rate=0.7)
    start = {"cepe": str(tmp_path / "cepe"), "optimizer": OptimizerConfig(warmup_fraction=0.5)}
    config = TrainConfig("cepe", data, tmp_path / "run", 4, 4, examples=examples, save_every=2, **start)
    run_stage(config)
    settings = {"run": tmp_path / "run", "data": data, "fraction": 0.25, "clusters": 2, "weights": ()}
    for name, batch_size in (("coreset", 8), ("again", 5)):
        tagcos(config_of(home, tmp_path / name, batch_size=batch_size, **settings))
    features = features_in(tmp_path / "coreset")
    assert features.shape == (12, DIM)
    np.testing.assert_allclose(features_in(tmp_path / "again"), features, atol=1e-4)
    (source,) = open_mix(tmp_path / "coreset", {}, recipe_of(config))
    assert len(source) == 3
    for n in range(3):
        np.testing.assert_array_equal(source[n]["tokens"], sequences[int(source[n]["name"].split("@")[0])])


def changed(home: Path, tmp_path: Path, name: str) -> Path:
    """Return a copy of a part of the home, to be changed."""
    shutil.copytree(home / name, tmp_path / name)
    return tmp_path / name


def absent_run(home, tmp_path):
    return {"run": tmp_path / "none"}, FileNotFoundError, r"none/config\.json"


def absent_step(home, tmp_path):
    return {"steps": (2, 7)}, ValueError, r"step 7.*\(2, 3, 4\)"


def muon(home, tmp_path):
    place = changed(home, tmp_path, "run") / "config.json"
    settings = json.loads(place.read_text())
    settings["optimizer"]["kind"] = "muon"
    place.write_text(json.dumps(settings))
    return {"run": tmp_path / "run"}, ValueError, "optimizer.kind is muon"


def another_model(home, tmp_path):
    """The decoder that the run names has other weights by now."""
    place = changed(home, tmp_path, "run") / "config.json"
    decoder = make_decoder(dataclasses.replace(DECODER, vocab_size=334))
    other = jax.tree.map(lambda x: x * 1.5, decoder)
    save(other, tmp_path / "decoder", assets=home)
    settings = json.loads(place.read_text()) | {"decoder": str(tmp_path / "decoder")}
    place.write_text(json.dumps(settings))
    return {"run": tmp_path / "run"}, ValueError, "checkpoints/2 .*decoder"


def checkpoints_of_another_run(home, tmp_path):
    place = changed(home, tmp_path, "run") / "config.json"
    settings = json.loads(place.read_text()) | {"seed": 9}
    place.write_text(json.dumps(settings))
    return {"run": tmp_path / "run"}, ValueError, "checkpoints/2.*seed is 0 there and 9 here"


def settings_without_data(home, tmp_path):
    place = changed(home, tmp_path, "run") / "config.json"
    settings = json.loads(place.read_text())
    del settings["dataset"]
    place.write_text(json.dumps(settings))
    return {"run": tmp_path / "run"}, ValueError, r"config\.json: dataset"


def another_tokenizer(home, tmp_path):
    tokenizer = datasets.make_tokenizer(tmp_path)
    record = {"tokens": np.arange(5), "targets": np.ones(5), "name": "x", "domain": "d"}
    record |= {"documents": np.zeros(0), "document_lengths": np.zeros(0)}
    data = datasets.write(
        tmp_path / "data", "conversations", features_of(tokenizer), [[record] * 9], tokenizer, length=5
    )
    return {"data": data}, ValueError, "tokenizer.*run"


def another_kind(home, tmp_path):
    return {"data": home / "data/coreset" / FEATURES}, FileNotFoundError, "features"


def several_examples(home, tmp_path):
    tokenizer = Records(home / "data/chats", "train").tokenizer
    data = datasets.write_sequences(tmp_path / "long", [np.ones(193)] * 4, 192, tokenizer)
    return {"data": data}, ValueError, "3 examples each.*--length=64"


def too_many_clusters(home, tmp_path):
    return {"clusters": 1000}, ValueError, f"1000.*{len(fits(home))}"


def too_small_a_fraction(home, tmp_path):
    return {"fraction": 0.001}, ValueError, f"0.001.*{len(fits(home))}"


def damaged_features(home, tmp_path):
    features = tmp_path / "features"
    shutil.copytree(home / "data/coreset" / FEATURES, features)
    np.save(features / "00001.npy", np.zeros((2, 3)))
    return {"features": features}, ValueError, r"00001\.npy.*\[2, 3\]"


@pytest.mark.parametrize(
    "case",
    [
        absent_run,
        absent_step,
        muon,
        another_model,
        checkpoints_of_another_run,
        settings_without_data,
        another_tokenizer,
        another_kind,
        several_examples,
        too_many_clusters,
        too_small_a_fraction,
        damaged_features,
    ],
    ids=lambda case: case.__name__,
)
def test_bad_input_is_one_line(home, tmp_path, case):
    settings, kind, words = case(home, tmp_path)
    with pytest.raises(kind, match=words) as refusal:
        tagcos(config_of(home, tmp_path / "coreset", **settings))
    one_line(refusal)
    assert not (tmp_path / "coreset/dataset.json").exists()


def test_a_changed_base_is_refused(home, tmp_path):
    shutil.copytree(home / "data/coreset", tmp_path / "coreset")
    with pytest.raises(FileNotFoundError):
        open_mix(tmp_path / "coreset", {}, recipe_of(warm_up(home, tmp_path / "out")))
    tokenizer = Records(home / "data/chats", "train").tokenizer
    base = Records(home / "data/chats", "train")
    datasets.write(
        tmp_path / "chats", "conversations", features_of(tokenizer), [[base[0], base[1]]], tokenizer, length=9
    )
    with pytest.raises(ValueError, match="coreset .*chats") as refusal:
        open_mix(tmp_path / "coreset", {}, recipe_of(warm_up(home, tmp_path / "out")))
    one_line(refusal)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": ()}, r"steps is \[\]"),
        ({"steps": (4, 2)}, r"steps is \[4, 2\]"),
        ({"steps": (0, 2)}, r"steps is \[0, 2\]"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"weights": (1.0,)}, r"weights is \[1.0\].* 2 "),
        ({"weights": (0.0, 0.0)}, r"weights is \[0.0, 0.0\]"),
        ({"weights": (1.0, -1.0)}, r"weights is \[1.0, -1.0\]"),
        ({"dim": 0}, "dim is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"features": Path("coreset"), "out": Path("coreset")}, "coreset"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words) as refusal:
        config_of(tmp_path, **{"out": tmp_path / "out"} | settings)
    one_line(refusal)
