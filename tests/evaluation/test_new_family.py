"""A family of tasks is added in one file, this one: nothing else knows of it."""

import json
from dataclasses import dataclass

import pytest

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.readers.language_model import Prompt
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.sweep.run import run_sweep
from cepe_jax.evaluation.tasks.protocols import Protocol, Template
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.task import Generative, register
from cepe_jax.settings import decode


@register
@dataclass(frozen=True, kw_only=True)
class Echo(Generative):
    """The model is to repeat a word. The axis counts the contexts that say it."""

    family: str = "echo"
    words: tuple[str, ...]  # words to repeat

    usual = Protocol(Template(question="Say {question}:"), ("match_part",), max_new_tokens=3)
    axis_name = "contexts that say it"

    def questions(self, value: int, tokenizer: Tokenizer) -> list[tuple[int, Question]]:
        return [(seed, Question(word, word, (word,))) for seed in self.seeds for word in self.words]

    def prompt(self, value: int, question: Question, tokenizer: Tokenizer) -> tuple[Prompt, list[list[int]]]:
        _, ids, after = self.split(self.protocol.template.asked(question.question), (), tokenizer)
        return Prompt(ids, [tokenizer.encode(question.question)] * value), after


def test_a_new_family_is_swept_and_reported(home, tmp_path):
    """6 CPU-seconds: a process of its own finds the family too."""
    task = {"family": "echo", "axis": [2, 0], "words": ["dog", "lazy fox"], "seeds": [1, 2]}
    settings = {"out": str(tmp_path), "models": {"tiny": {"path": str(home)}}, "tasks": {"says": task}}
    run_sweep(decode(SweepConfig, settings))
    tokenizer, results = Tokenizer(home), json.loads((tmp_path / "results.json").read_text())
    assert [cell["name"] for cell in results["cells"]] == ["tiny.says.0", "tiny.says.2"]
    records = [json.loads(line) for line in (tmp_path / "cells" / "tiny.says.2.jsonl").read_text().splitlines()]
    for record, word in zip(records, ["dog", "lazy fox"] * 2, strict=True):
        assert record["read"] == 1 + len(tokenizer.encode(f"Say {word}:")) + 2 * len(tokenizer.encode(word))
    hits = [record["answers"][0] in record["prediction"].lower() for record in records]
    metric = results["cells"][1]["metrics"]["match_part"]
    assert (metric["mean"], metric["records"], metric["groups"]) == (sum(hits) / 4, 4, 2)
    page = (tmp_path / "report.md").read_text()
    assert "contexts that say it" in page
    assert "| model | n | 0 | 2 |\n|---|---|---|---|\n| tiny | 4 of 2 | " in page
    assert (tmp_path / "says.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="passages is 3, and the echo family"):
        decode(SweepConfig, settings | {"tasks": {"says": task | {"passages": 3}}})
