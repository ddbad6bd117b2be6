"""Pairs of answers: both layouts of lines, where a context goes, and what is refused."""

import json

import numpy as np
import pytest
from support.tokenizers import write_chatml

from cepe_jax.data.examples import IGNORE, ExampleConfig
from cepe_jax.data.loader import open_mix
from cepe_jax.data.preferences import Pairs, PreferenceConfig, pairs_in, prepare_preferences
from cepe_jax.data.recipes import PairsOfAnswers, Windows, blank
from cepe_jax.data.records import Records
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer

CONFIG = ExampleConfig(window=120, num_chunks=2, chunk_length=8)
ROW = {
    "prompt": "Name a fruit.",
    "response_a": "Apple.",
    "response_b": "It is an apple, of course.",
    "criteria_x": "be brief",
    "criteria_y": "be polite",
    "category_x": "length",
    "category_y": "tone",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer with a chat template, RPR's rows, and lines of our own layout."""
    home = tmp_path_factory.mktemp("pairs")
    (home / "model").mkdir()
    write_chatml(home / "model")
    (home / "rpr").mkdir()
    rows = [ROW | {"prompt": f"Name fruit {n}.", "id": n} for n in range(12)]
    (home / "rpr/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "own").mkdir()
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "A fruit?")]
    line = {"messages": [{"role": r, "content": c} for r, c in turns], "chosen": "Pear.", "rejected": "Fig"}
    lines = [line | {"chosen": f"Pear {n}."} for n in range(12)]
    (home / "own/lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def prepared(home, name: str, route: str) -> Records:
    out = home / f"{name}-{route}"
    settings = {"tokenizer": str(home / "model"), "test_fraction": 0.2, "workers": 1, "context": route}
    prepare_preferences(PreferenceConfig(input=home / name, out=out, **settings))
    return Records(out, "train")


def text(home, tokens) -> str:
    return Tokenizer(home / "model")._impl.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def test_a_row_gives_both_pairs(home):
    records = prepared(home, "rpr", "prompt")
    by_name: dict[str, list] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    assert all(len(both) == 2 for both in by_name.values())
    for x, y in by_name.values():
        assert (x["domain"], y["domain"]) == ("length", "tone")
        for record, context in ((x, "be brief"), (y, "be polite")):
            assert context in text(home, record["chosen"])
            assert context in text(home, record["rejected"])
        assert text(home, x["chosen"]).replace("be brief", "") == text(home, y["rejected"]).replace("be polite", "")
        assert text(home, x["chosen"][x["chosen_targets"] > 0]) == "Apple.<|im_end|>"


def test_where_the_context_goes(home):
    template = Template(Tokenizer(home / "model"))
    read, nowhere = prepared(home, "rpr", "encoder"), prepared(home, "rpr", "none")
    for record, plain in zip(read, nowhere, strict=True):
        assert record["chosen"].tolist() == plain["chosen"].tolist()
        assert text(home, record["documents"]) in ("be brief", "be polite")
        assert not len(plain["documents"])
        messages = [{"role": "user", "content": "Name fruit"}]
        assert template.render(messages)[:20] in text(home, plain["chosen"])


def test_only_the_last_answer_is_learnt(home):
    for record in prepared(home, "own", "prompt"):
        learnt = record["chosen"][record["chosen_targets"] > 0]
        assert text(home, learnt).startswith("Pear ")
        assert "Hello." in text(home, record["chosen"])


def test_an_example_has_both_texts(home):
    prepared(home, "rpr", "encoder")
    recipe = PairsOfAnswers(CONFIG, reads_documents=True)
    (pairs,) = open_mix(home / "rpr-encoder", {}, recipe)
    assert len(pairs) == len(pairs.records)
    record = pairs[0]
    example = recipe(record, np.random.default_rng(0), None)
    assert {n: (x.shape, x.dtype) for n, x in example.items()} == {
        n: (x.shape, x.dtype) for n, x in blank(recipe).items()
    }
    for row, answer in enumerate(("chosen", "rejected")):
        tokens, length = record[answer], len(record[answer])
        assert example["tokens"][row, :length].tolist() == tokens.tolist()
        assert example["token_mask"][row].sum() == length
        labels = example["labels"][row]
        assert labels[labels != IGNORE].tolist() == tokens[record[f"{answer}_targets"] > 0].tolist()
    assert example["context"][example["context_mask"]].tolist() == record["documents"].tolist()
    with pytest.raises(ValueError, match="has a context for an encoder"):
        PairsOfAnswers(CONFIG, reads_documents=False)(record, None, None)
    with pytest.raises(ValueError, match="holds preferences, .*train stage reward or dpo"):
        Pairs(home / "rpr-encoder", Windows(CONFIG))
    with pytest.raises(ValueError, match="no pair has texts of 3 tokens"):
        Pairs(home / "rpr-encoder", PairsOfAnswers(ExampleConfig(window=3), reads_documents=True))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the two answers are equal"),
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"chosen": "b", "rejected": "c"}, "one of prompt and messages"),
        ({"prompt": "a", "messages": [], "chosen": "b", "rejected": "c"}, "one of prompt and messages"),
        ({key: value for key, value in ROW.items() if key != "criteria_y"}, "no criteria_y: give both"),
        (ROW | {"response_b": "Apple."}, "the two answers are equal"),
        ({"messages": [], "chosen": "b", "rejected": "c"}, "messages is empty"),
        ([], "expected object"),
    ],
)
def test_lines_that_are_no_pairs(line, said):
    with pytest.raises(ValueError, match=said):
        pairs_in(line)


def test_a_scenario_in_place_of_a_criterion():
    x, y = pairs_in(ROW | {"scenario_x": "a child asks", "scenario_y": "a guest asks"}, "scenario")
    assert (x["context"], y["context"]) == ("a child asks", "a guest asks")
    assert (x["chosen"], y["chosen"]) == (ROW["response_a"], ROW["response_b"])
