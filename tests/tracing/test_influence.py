"""Influence: the products of gradients against torch, which documents are compared, and the command."""

import dataclasses
import json

import numpy as np
import pytest
from support.models import DECODER, make_decoder, make_encoder
from support.refusals import one_line
from support.tracing import HASHED, write_index, write_task, write_tokenizer

from cepe_jax.tracing import influence as module
from cepe_jax.tracing.index import Index
from cepe_jax.tracing.influence import InfluenceConfig, Row, batch_of, cases, find, influence, influence_of
from cepe_jax.tracing.table import Table, TableConfig, make_table
from cepe_jax.weights.source import load, save

TEXTS = [
    "Green paint is cheap. The sky is deep blue today and the sea is deep blue too.",
    "A deep blue sea is a sea for ships. It was long ago.",
    "They say that the sky is grey and that a deep blue whale swims.",
    "Nobody wears deep blue at a feast, for white is the rule.",
    "A text of </s> and of a deep blue.",
    "The sky is high.",
]
ROWS = [("Say what the sky is:", "deep blue"), ("Say what a feast is:", "white is the rule")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus with its index, a table and two checkpoints of a decoder."""
    home = tmp_path_factory.mktemp("influence")
    write_index(home, TEXTS)
    examples = write_task(home / "task.jsonl", ROWS)
    places = {"examples": examples, "index": home / "index", "out": home / "table"}
    make_table(TableConfig(**places, encoder=HASHED, gamma=-0.1, n=2))
    size = write_tokenizer(home).vocab_size
    decoder = make_decoder(dataclasses.replace(DECODER, vocab_size=size))
    save(decoder, home / "late", assets=home)
    save(make_decoder(dataclasses.replace(DECODER, vocab_size=size, norm_eps=0.1)), home / "early", assets=home)
    return home


def config_of(home, **settings) -> InfluenceConfig:
    places = {"data": home / "documents", "index": home / "index", "table": home / "table", "out": home / "out"}
    return InfluenceConfig(**places | {"models": (home / "early", home / "late"), "batch_size": 2} | settings)


def drawn(home, **settings) -> list[module.Case]:
    return list(cases(config_of(home, **settings), Index(home / "index"), Table(home / "table")))


def text(home, row: Row) -> str:
    return write_tokenizer(home.parent / "tokenizer").decode(row.ids)


def test_find_gives_all_places():
    assert find(["a", "b", "a", "b", "a"], ("a", "b")) == [0, 2]
    assert find(["a", "b"], ("b", "b")) == []


def test_documents_are_paired_or_hold_the_ngram_alone(home):
    """A text with a special token's name is left out; the n-gram that follows a paired one is the one that is read."""
    (case,) = [case for case in drawn(home) if case.target.y == ("deep", "blue")]
    paired = sorted(text(home, row) for row in case.paired)
    assert paired == sorted(["Green paint is cheap. The sky is deep blue", TEXTS[2].split(" whale")[0]])
    single = sorted(text(home, row) for row in case.single)
    assert single == sorted(["A deep blue", "Nobody wears deep blue"])
    assert text(home, case.query) == "Say what the sky is: deep blue"
    for row in [case.query, *case.paired, *case.single]:
        assert text(home, dataclasses.replace(row, ids=row.ids[-row.count :])).strip() == "deep blue"
    (short,) = [case for case in drawn(home, window=6) if case.target.y == ("deep", "blue")]
    assert all(len(row.ids) <= 6 for row in [short.query, *short.paired])
    assert short.query.ids == case.query.ids[-6:]
    assert len(drawn(home, targets=1)) == 1
    assert [len(case.paired) for case in drawn(home, documents=1)] == [1] * len(drawn(home))


def test_only_targets_with_both_kinds_are_drawn(home):
    targets = {case.target.y for case in drawn(home)}
    assert ("deep", "blue") in targets
    assert ("the", "rule") not in targets  # no document has it without a pair


def torch_gradient(oracle, row: Row, names: str = ""):
    import torch

    oracle.zero_grad()
    log_probs = torch.log_softmax(oracle(torch.tensor([row.ids]))[0].double(), -1)
    end = len(row.ids)
    loss = -sum(log_probs[t - 1, row.ids[t]] for t in range(end - row.count, end))
    loss.backward()
    weights = [weight for name, weight in oracle.named_parameters() if names in name]
    return [weight.grad.double().clone() for weight in weights if weight.grad is not None]  # None: the encoder's


@pytest.mark.parametrize(("parameters", "names"), [((), ""), (("layers.mlp",), "mlp")])
def test_influence_is_torchs(home, parameters, names):
    """The mean over documents of the products of per-sample gradients, one document at a time in torch."""
    pytest.importorskip("torch")
    from support.tracing import in_torch

    model = load(home / "late")
    oracle = in_torch(model)
    for _, weight in oracle.named_parameters():
        weight.requires_grad_(True)
    case = next(case for case in drawn(home) if len(case.paired) > 1)
    query = torch_gradient(oracle, case.query, names)
    wanted = []
    for rows in (case.paired, case.single):
        products = [
            sum(float((a * b).sum()) for a, b in zip(query, torch_gradient(oracle, row, names), strict=True))
            for row in rows
        ]
        wanted.append(np.mean(products))
    found = influence_of(model, case, config_of(home, parameters=parameters))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted[0] - wanted[1]) > 1e-3 * abs(wanted[0])
    assert len(query) == {"": 3 + 9 * 3, "mlp": 3 * 3}[names]  # of three layers


def test_batches_point_at_what_predicts():
    batch = batch_of([Row([7, 8, 9, 5], 2), Row([3, 4], 1)], 3)
    assert batch["tokens"].shape == (3, 32)
    assert batch["tokens"][:2, :4].tolist() == [[7, 8, 9, 0], [3, 0, 0, 0]]
    assert batch["at"].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert batch["labels"].tolist() == [[9, 5], [4, -100], [-100, -100]]


def test_the_command_sums_checkpoints(home, tmp_path, capsys):
    """Both together are the sum of each alone."""
    found = {}
    for name, models in (("both", ("early", "late")), ("early", ("early",)), ("late", ("late",))):
        paths = tuple(home / model for model in models)
        influence(config_of(home, models=paths, out=tmp_path / name))
        found[name] = json.loads((tmp_path / name / "influence.json").read_text())
    for both, *parts in zip(*(found[name]["cases"] for name in ("both", "early", "late")), strict=True):
        for kind in ("paired", "single"):
            assert both[kind] == pytest.approx(sum(part[kind] for part in parts), rel=1e-4)
    differences = [case["paired"] - case["single"] for case in found["both"]["cases"]]
    assert found["both"]["means"]["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert found["both"]["larger"] == np.mean(np.array(differences) > 0)
    assert (tmp_path / "both/report.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "both/report.png").stat().st_size > 5_000


def test_models_of_another_kind_or_vocabulary_are_refused(home, tmp_path):
    save(make_encoder(), tmp_path / "encoder")
    save(make_decoder(), tmp_path / "small")
    refused = ("encoder", "encoder"), ("small", r"small knows 64 ids.*documents has \d+")
    for name, match in refused:
        with pytest.raises(ValueError, match=match) as error:
            influence(config_of(home, models=(tmp_path / name,), out=tmp_path / "out"))
        one_line(error)
    other = write_index(tmp_path / "other", ["deep blue", "the sky"])
    with pytest.raises(ValueError, match="table.*other/index") as error:
        influence(config_of(home, index=other.path, out=tmp_path / "out"))
    one_line(error)
    with pytest.raises(ValueError, match="index is the index of another corpus") as error:
        influence(config_of(home, data=other.path.parent / "documents", out=tmp_path / "out"))
    one_line(error)
    with pytest.raises(ValueError, match=r"no parameter is layers.mpl.*layers\.mlp") as error:
        influence(config_of(home, parameters=("layers.mpl",), out=tmp_path / "out"))


@pytest.mark.parametrize(("settings", "match"), [({"documents": 0}, "documents is 0"), ({"window": 1}, "1"),
                                                 ({"models": ()}, "models")])  # fmt: skip
def test_settings_out_of_range_are_refused(home, settings, match):
    with pytest.raises(ValueError, match=match):
        config_of(home, **settings)
