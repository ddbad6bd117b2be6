"""Planted corpora: what is frequent, what is not, and what the tasks ask for."""

import json
from collections import Counter

import pytest
from support.refusals import one_line

from cepe_jax.tracing.planted import LISTS, RULE_DOCUMENTS, PlantConfig, plant, syllables, zipf


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    home = tmp_path_factory.mktemp("planted")
    config = PlantConfig(out=home / "corpus", examples=30, most=20, filler=3000, seed=1)
    plant(config)
    lines = {path.name: path.read_text().splitlines() for path in home.rglob("*.jsonl")}
    return config, {name: [json.loads(line) for line in of_name] for name, of_name in lines.items()}


def test_facts_follow_zipf_and_subjects_are_as_frequent(planted):
    config, files = planted
    documents = [line["text"] for line in files["planted.jsonl"]]
    counts = zipf(config)
    assert counts[0] == 20 > counts[9] > counts[-1] >= 1
    for example, count in zip(files["facts.jsonl"], counts, strict=True):
        subject = " ".join(example["prompt"].split()[3:5])
        assert sum(text == f"{example['prompt']} {example['answer']}" for text in documents) == count
        assert sum(f"of {subject} is" in text for text in documents) == config.most
        assert sum(example["answer"] in text.split("is ")[-1] for text in documents) == count + LISTS


def test_questions_of_the_rule_stand_in_no_document(planted):
    config, files = planted
    documents = [line["text"] for line in files["planted.jsonl"]]
    ruled = [text.split() for text in documents if text.startswith("turn")]
    assert len(ruled) == RULE_DOCUMENTS
    assert all(text[1:3] == text[:3:-1] for text in ruled)
    questions = Counter(text[: text.index("gives") + 5] for text in documents if text.startswith("turn"))
    lists = [text for text in documents if text.startswith("seen")]
    for example, count in zip(files["rule.jsonl"], zipf(config), strict=True):
        first, second = example["prompt"].split()[1:3]
        assert example["answer"] == f"{second} {first}"
        assert example["prompt"] not in questions
        assert sum(f"{first} {second}" in text and f"{second} {first}" in text for text in lists) >= count


def test_words_of_syllables_differ():
    assert len({syllables(number, 2) for number in range(65**2)}) == 65**2


def test_filler_has_its_words_and_copies(planted):
    texts = [line["text"].split() for line in planted[1]["filler.jsonl"]]
    assert [len(words) for words in texts] == [1000] * 3


def test_settings_out_of_range_are_refused(tmp_path):
    for settings, match in (({"examples": 391}, "391.*390"), ({"most": 0}, "most is 0"), ({"exponent": 0.0}, "0.0")):
        with pytest.raises(ValueError, match=match) as error:
            PlantConfig(out=tmp_path, **settings)
        one_line(error)
