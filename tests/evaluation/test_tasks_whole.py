"""Every family of tasks with the tiny CEPE: what it says is what the text API says of prompts written by hand."""

import dataclasses
import json

import numpy as np
import pytest

import cepe_jax
from cepe_jax.evaluation.readers.models import ModelConfig, load_model
from cepe_jax.evaluation.tasks import synthetic
from cepe_jax.evaluation.tasks.document import Document
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.icl import Icl
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.synthetic import Synthetic

WINDOW = 256  # tokens: more than the tiny model's own, for whole questions


@pytest.fixture(scope="module")
def model(home):
    return dataclasses.replace(load_model(ModelConfig(home)), window=WINDOW)


@pytest.fixture(scope="module")
def text(home):
    return dataclasses.replace(cepe_jax.load(home), window=WINDOW - 1)  # positions: the last new token takes none


@pytest.fixture
def data(tmp_path):
    shown = [{"question": f"{n}?", "answer": ("yes", "no")[n % 2], "contexts": [f"p{n}"]} for n in range(4)]
    record = {
        "question": "what is it?",
        "answers": ["It is a test"],
        "contexts": ["fox jumps", "lazy dog", "def f(x)"],
        "scores": [3, 2, 1],
        "demonstrations": shown,
    }
    bare = [{name: one[name] for name in ("question", "answer")} for one in shown]
    choice = {"question": "a dog", "answers": ["yes"], "choices": ["yes", "no", "maybe"], "demonstrations": bare}
    (tmp_path / "qa.jsonl").write_text(json.dumps(record))
    (tmp_path / "icl.jsonl").write_text(json.dumps(choice))
    return tmp_path


def ask(config, model, axis) -> dict:
    (result,) = (json.loads(json.dumps(result)) for result in config.measure(Point("", axis), model))
    assert all(0 <= value <= 1 for value in config.values(result).values())
    assert result["seconds"] > 0
    return result


def test_qa(data, model, text):
    config = Qa(axis=(0, 2), data=data / "qa.jsonl", passages=1, demonstrations=1, max_new_tokens=8)
    prompt = "Passage: p0\n\nQuestion: 0?\nAnswer: yes\n\nPassage: fox jumps\n\nQuestion: what is it?\nAnswer:"
    contexts = ["Passage: def f(x)\n\n", "Passage: lazy dog\n\n"]
    options = {"max_new_tokens": 8, "stop": ["\n"]}
    for axis, beside in (0, None), (2, text.encode(contexts)):
        result = ask(config, model, axis)
        assert result["prediction"] == text.generate(prompt, beside, **options)
        read = [prompt, *contexts[:axis]]
        assert result["read"] == 1 + sum(len(text.tokenizer.encode(part)) for part in read)
    assert text.generate(prompt, **options) != text.generate(prompt, text.encode(contexts), **options)


def test_icl(data, model, text):
    config = Icl(axis=(0, 2), data=data / "icl.jsonl", demonstrations=2)
    first = "Input: 0?\nLabel: yes\n\nInput: 1?\nLabel: no\n\n"
    prompt, choices = first + "Input: a dog\nLabel:", [" yes", " no", " maybe"]
    contexts = ["Input: 2?\nLabel: yes\n\n", "Input: 3?\nLabel: no\n\n"]
    for axis, beside in (0, None), (2, text.encode(contexts)):
        result = ask(config, model, axis)
        wanted = [score.total for score in text.score(prompt, choices, beside)]
        np.testing.assert_allclose(result["log_probs"], wanted, atol=1e-4)
        wanted = [score.total for score in text.score("Input: \nLabel:", choices)]
        np.testing.assert_allclose(result["domain_log_probs"], wanted, atol=1e-4)


@pytest.mark.parametrize("overflow", ["truncate_left", "passages"])
def test_document(data, model, text, overflow):
    passages = [f"def f(x):\n    return x + {n}\n\n" for n in range(24)]
    record = {"question": "what is f?", "answers": ["It is a test"], "contexts": ["".join(passages).rstrip()]}
    (data / "document.jsonl").write_text(json.dumps(record))
    config = Document(
        axis=(0, 10000),
        data=data / "document.jsonl",
        window=WINDOW,
        overflow=overflow,
        chunk_length=16,
        max_new_tokens=6,
        metrics=("f1", "rougeL"),
    )
    prompt = "".join(passages) + config.protocol.template.instruction + "\n\nQuestion: what is f?\nAnswer:"
    result = ask(config, model, 10000)
    given = {"max_new_tokens": 6, "stop": ["\n"], "overflow": overflow, "chunk_length": 16}
    assert result["prediction"] == text.generate(prompt, **given)
    whole = 1 + len(text.tokenizer.encode(prompt))
    assert abs(result["read"] - whole) <= (0 if overflow == "truncate_left" else 12)  # a passage more or less a token
    assert whole > WINDOW + 100
    assert set(config.values(result)) == {"f1", "rougeL"}
    assert ask(config, model, 0)["read"] <= WINDOW - 6


def test_synthetic(home, model):
    """A decoder that reads all of it is asked the same."""
    config = Synthetic(axis=(400,), samples=1, window=200, chunk_length=64, max_new_tokens=4)
    ours = ask(config, model, 400)
    plain = dataclasses.replace(load_model(ModelConfig(home, reads="decoder")), window=400)
    theirs = ask(config, plain, 400)
    assert (ours["id"], ours["read"], ours["answers"]) == (theirs["id"], theirs["read"], theirs["answers"])
    assert 400 - 40 < ours["read"] + 4 <= 400
    (record,) = synthetic.texts("single", 400, 1, 42, (), lambda record: 3 * len(record.contexts[0]) // 4)
    assert record.answers == tuple(ours["answers"])  # another length has the same needles
    assert config.values(ours) == {"match_all": 0, "match_part": 0}  # it was never trained
