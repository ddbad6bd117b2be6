"""lm-evaluation-harness: tasks of its own and local ones, answered behind the seam."""

import dataclasses
import functools
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import yaml
from support.fakes import BOS, Letters, Scripted, whole_text
from support.tokenizers import LLAMA_2, WINDOW, as_llama_2

import cepe_jax
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation import harness
from cepe_jax.evaluation.harness import HarnessConfig, run_harness
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.inference.text import TextModel

pytest.importorskip("lm_eval")

import lm_eval.tasks  # noqa: E402 (an extra)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from cepe_jax.evaluation.adapters import Adapter, Splitter  # noqa: E402

QUESTIONS = [
    {"question": "The sky is blue.\n\nThe grass is green.\n\nQ: sky?", "choices": [" blue", " green"], "label": 0},
    {"question": "The sun is red.\n\nThe sea is dark.\n\nQ: sea?", "choices": [" red", " dark", " light"], "label": 1},
    {"question": "Q: one?", "choices": [" two", " one"], "label": 1},
]


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]


def texts_of(prompt) -> list[str]:
    """The contexts' texts, then the prompt's."""
    return [Letters().decode(ids) for ids in (*prompt.contexts, prompt.ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task of choices and one of answers, from files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    common = files | {"test_split": "test", "doc_to_text": "{{question}}"}
    choices = {
        "task": "local_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answers = {
        "task": "local_answers",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label].strip()}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choices, answers):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def local(offline, monkeypatch):
    """The harness' own tasks are not looked through: there are thousands."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def test_choices_of_a_question_are_scored_together():
    """The whole text is given, its last part to the decoder, and each choice's log probability comes back."""
    model = Scripted(log_prob=lambda prompt, text: -len(text) - len(prompt.contexts) / 8)
    requests = asked("loglikelihood", *((q["question"], choice) for q in QUESTIONS for choice in q["choices"]))
    found = Adapter(model, Splitter(window=32, chunk_length=8)).loglikelihood(requests)
    assert [whole_text(prompt) for prompt in model.asked] == [question["question"] for question in QUESTIONS]
    lengths = [[len(ids) for ids in (*prompt.contexts, prompt.ids)] for prompt in model.asked]
    assert lengths == [[5, 8, 8, 26], [1, 8, 8, 26], [8]]  # 32 = BOS, 25 and the longest choice
    assert all(prompt.ids[0] == BOS for prompt in model.asked)
    wanted = [
        -len(choice) - chunks / 8 for q, chunks in zip(QUESTIONS, (3, 3, 0), strict=True) for choice in q["choices"]
    ]
    assert found == [(value, False) for value in wanted]


def test_passages_stay_whole():
    model = Scripted(log_prob=lambda *_: 0.0)
    requests = asked("loglikelihood", (QUESTIONS[0]["question"], " blue"))
    Adapter(model, Splitter(window=36, overflow="passages")).loglikelihood(requests)
    assert texts_of(model.asked[0]) == ["The sky is blue.\n\n", "The grass is green.\n\nQ: sky?"]


def test_rolling_predicts_every_token_once():
    """In the harness' windows, the last one full; the encoder reads what stands before the window."""
    model = Scripted(log_prob=lambda prompt, text: -len(text))
    adapter = Adapter(model, Splitter(window=4, chunk_length=3))
    assert adapter.loglikelihood_rolling(asked("loglikelihood_rolling", ("0123456789",))) == [-10]
    assert [texts_of(prompt) for prompt in model.asked] == [[""], ["012", "3"], ["01", "234", "567"]]
    assert model.asked[0].ids == [BOS]
    assert adapter.loglikelihood_rolling(asked("loglikelihood_rolling", ("01",), ("",))) == [-2, 0]


def test_answers_end_as_the_task_says():
    """Alike requests are written together, as many as `batch`; until is a text or several."""
    model = Scripted(says=lambda prompt: whole_text(prompt).upper() + ".\nmore")
    how = {"until": ["\n"], "max_gen_toks": 12}
    requests = asked(
        "generate_until",
        ("abc", how),
        ("defg", how),
        ("h", how),
        ("ij", {"until": ["", "J"], "max_new_tokens": 3, "temperature": 0.7, "do_sample": False}),
    )
    found = Adapter(model, Splitter(window=16, chunk_length=2), batch=2).generate_until(requests)
    assert found == ["ABC.", "DEFG.", "H.", "I"]
    assert [texts_of(prompt) for prompt in model.asked] == [["abc"], ["d", "efg"], ["h"], ["ij"]]


def test_samples_are_refused():
    for how in ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="samples"):
            Adapter(Scripted(), Splitter(window=16)).generate_until(asked("generate_until", ("abc", how)))


def test_answers_longer_than_the_window_are_cut():
    """They get what the prompt leaves, at least half the window; what fits stays as it is. None asked for is none."""
    noted, model = [], Scripted(says=lambda prompt: "x" * 99)
    adapter = Adapter(model, Splitter(window=16, chunk_length=8), batch=2, note=lambda *cut: noted.append(cut))
    requests = asked(
        "generate_until",
        *((text, {"until": [], "max_gen_toks": 15}) for text in ("abc", "0123456789abcdefgh", "")),
        ("0123456789abcdefgh", {"until": [], "max_gen_toks": 14}),
        ("abc", {"until": [], "max_gen_toks": 0}),
    )
    assert [len(text) for text in adapter.generate_until(requests)] == [12, 7, 14, 14, 0]
    assert [texts_of(prompt) for prompt in model.asked] == [
        ["abc"],
        ["01", "23456789", "abcdefgh"],
        [""],
        ["0", "12345678", "9abcdefg", "h"],
    ]
    assert [(request, "15" in why) for request, why in noted] == [(request, True) for request in requests[:3]]


def test_continuations_longer_than_the_window_are_cut():
    """Their last tokens are predicted, after one token of theirs; the rest is read before. Others are as they were."""
    noted, model = [], Scripted(log_prob=lambda prompt, text: -len(text))
    adapter = Adapter(model, Splitter(window=8, chunk_length=4), note=lambda *cut: noted.append(cut))
    requests = asked("loglikelihood", ("abcd", "ef"), ("abcd", "0123456"), ("abcd", "012345"), ("", "0123456789"))
    assert adapter.loglikelihood(requests) == [(-2, False), (-6, False), (-6, False), (-6, False)]
    assert [texts_of(prompt) for prompt in model.asked] == [["abcd"], ["abcd", "0"], ["abc", "d"], ["012", "3"]]
    assert all(prompt.ids[0] == BOS for prompt in model.asked)
    assert [request for request, _ in noted] == [requests[1], requests[3]]


def test_passages_longer_than_the_window_are_cut():
    noted, model = [], Scripted(says=lambda _: "", log_prob=lambda *_: 0.0)
    splitter = Splitter(window=8, overflow="passages", chunk_length=4)
    adapter = Adapter(model, splitter, note=lambda *cut: noted.append(cut))
    adapter.generate_until(asked("generate_until", ("a\n\n0123456", {"until": [], "max_gen_toks": 3})))
    adapter.loglikelihood(asked("loglikelihood", ("a\n\n0123456", "xyz")))
    assert [texts_of(prompt) for prompt in model.asked] == [["a\n", "\n012", "3456"]] * 2
    assert len(noted) == 2


def test_a_chat_template_is_read_with_its_tokens(home):
    """An answer that the task has begun stands after the template's beginning of one."""
    tokenizer = Tokenizer(home)
    template, model = Template(tokenizer), Scripted(says=lambda _: "")
    model.tokenizer = tokenizer
    adapter = Adapter(model, Splitter(window=256), template)
    said = [{"role": "user", "content": "Hello there!"}]
    asks, goes_on = (
        adapter.apply_chat_template(said),
        adapter.apply_chat_template([*said, {"role": "assistant", "content": "It is"}], add_generation_prompt=False),
    )
    assert asks == template.render(said)
    assert goes_on == asks + "It is"
    adapter.generate_until(asked("generate_until", (asks, {"max_gen_toks": 4})))
    assert model.asked[0].ids == tokenizer.encode_special(asks)
    assert model.asked[0].ids != tokenizer.encode(asks)
    with pytest.raises(ValueError, match="adapter"):
        Adapter(model, Splitter(window=256)).apply_chat_template(said)


def test_a_template_that_writes_bos(tmp_path):
    """BOS stays before what the decoder reads, also where the beginning of the text goes to the encoder."""
    tokenizer = Tokenizer(as_llama_2(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA_2}))
    template, model = Template(tokenizer), Scripted(says=lambda _: "")
    model.tokenizer = tokenizer
    adapter = Adapter(model, Splitter(window=24, chunk_length=8), template)
    text = adapter.apply_chat_template([{"role": "user", "content": "The quick brown fox jumps. " * 4}])
    adapter.generate_until(asked("generate_until", (text, {"max_gen_toks": 4})))
    (prompt,) = model.asked
    whole = tokenizer.encode_special(text)
    assert whole[0] == prompt.ids[0] == tokenizer.bos_id
    assert [i for ids in (*prompt.contexts, prompt.ids[1:]) for i in ids] == whole[1:]
    assert len(prompt.ids) == 20


def test_needles_of_ruler(home, offline, tmp_path, monkeypatch):
    """RULER's own task and score, solved by a model that looks into all that it is given: no text is lost.

    20 CPU-seconds of lm-eval's own task loading: its prompts, not copies of them.
    """
    for extra in ("transformers", "wonderwords", "nltk"):
        pytest.importorskip(extra)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)  # looked for, and not needed by this task
    looks = r"One of the special magic numbers for {key} is: (\d+)"

    def says(prompt) -> str:
        (key,) = re.findall("special magic number for (\\S+) mentioned in the provided text is$", whole_text(prompt))
        assert len(prompt.ids) <= 1024 - 128
        return " ".join(re.findall(looks.format(key=key), whole_text(prompt)))

    config = HarnessConfig(
        ModelConfig(home), ("niah_single_1",), tmp_path / "out", window=1024, limit=3, lengths=(4096,)
    )
    monkeypatch.setattr(harness, "load_model", lambda _: Scripted(says))
    monkeypatch.setattr(harness, "check_model", lambda _: types.SimpleNamespace(window=None))
    run_harness(config)
    results = json.loads((config.out / "results.json").read_text())["results"]["niah_single_1"]
    assert results["4096,none"] == 1.0
    lines = (config.out / "samples_niah_single_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["4096"] for line in lines] == [1.0] * 3


def test_a_run_from_files(home, folder, local, tmp_path, capsys, monkeypatch):
    """A tiny CEPE's answers are those that it gives without the harness. A second run asks nothing again.

    8 CPU-seconds: lm-eval's evaluator from a task file to results.
    """
    text_model: TextModel = cepe_jax.load(home, window=31)  # positions: the answer's last token takes none
    names = "local_choices", "local_answers"
    config = HarnessConfig(
        ModelConfig(home), names, tmp_path / "out", window=32, chunk_length=8, task_folder=folder, batch=2
    )
    run_harness(config)
    results = json.loads((config.out / "results.json").read_text())["results"]
    totals = [
        [
            score.total
            for score in text_model.score(q["question"], q["choices"], overflow="truncate_left", chunk_length=8)
        ]
        for q in QUESTIONS
    ]
    right = [int(np.argmax(of_question)) == q["label"] for of_question, q in zip(totals, QUESTIONS, strict=True)]
    assert results["local_choices"]["acc,none"] == pytest.approx(np.mean(right))
    lines = [json.loads(line) for line in (config.out / "samples_local_choices.jsonl").read_text().splitlines()]
    found = [[float(answer[0][0]) for answer in line["resps"]] for line in lines]
    assert found == [pytest.approx(of_question, rel=1e-4) for of_question in totals]
    assert "local_answers" in capsys.readouterr().out

    monkeypatch.setattr(harness, "load_model", lambda _: types.SimpleNamespace(tokenizer=text_model.tokenizer))
    moved = dataclasses.replace(config, out=config.out.rename(tmp_path / "moved"), batch=1)
    (moved.out / "results.json").unlink()
    run_harness(moved)
    assert json.loads((moved.out / "results.json").read_text())["results"] == results
    config = moved
    with pytest.raises(ValueError, match=r"window is 32 there and 40 here"):
        run_harness(dataclasses.replace(config, window=40))
    other = shutil.copytree(home, tmp_path / "other")
    (other / "hash.json").write_text(json.dumps(json.loads((other / "hash.json").read_text()) | {"all": "of others"}))
    config = dataclasses.replace(config, model=ModelConfig(other))
    claimed = json.loads((config.out / "config.json").read_text())
    claimed["model"]["path"] = str(other)
    (config.out / "config.json").write_text(json.dumps(claimed))
    with pytest.raises(ValueError, match='weights is ".*" there and "of others" here'):
        run_harness(config)


def test_cut_requests_are_counted(home, folder, local, tmp_path, capsys, monkeypatch):
    """In the results and in the end, those too that an earlier run was stopped after."""
    steps = iter([0, 1])

    def says(prompt) -> str:
        if next(steps, None) == 1:
            raise KeyboardInterrupt
        return "one"

    config = HarnessConfig(ModelConfig(home), ("local_answers",), tmp_path / "out", window=9, task_folder=folder)
    monkeypatch.setattr(harness, "load_model", lambda _: Scripted(says))
    with pytest.raises(KeyboardInterrupt):
        run_harness(config)
    run_harness(config)
    found = json.loads((config.out / "results.json").read_text())
    assert found["cepe_jax"]["cut"] == {"local_answers": 3}
    assert found["results"]["local_answers"]["exact_match,none"] == pytest.approx(1 / 3)
    assert "local_answers: 3 requests were cut to the window of 9" in capsys.readouterr().out
    lines = [json.loads(line) for line in (config.out / "cut.jsonl").read_text().splitlines()]
    assert [line["document"] for line in lines] == [0, 1, 1, 2]


def test_what_the_model_cannot_read_is_said_at_once(home, tmp_path):
    """Before the harness looks for its tasks."""
    usual = {"model": ModelConfig(home), "tasks": ("sciq",), "out": tmp_path / "out", "window": 32}
    for changes, said in [
        ({"window": WINDOW + 1}, f"window is {WINDOW + 1} .* {WINDOW}"),
        ({"task_folder": tmp_path / "absent"}, "absent: no such directory"),
        ({"model": ModelConfig(tmp_path)}, "no config.json in"),
    ]:
        with pytest.raises((ValueError, NotADirectoryError), match=said):
            run_harness(HarnessConfig(**usual | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"limit": 0}, "limit is 0"),
        ({"model": ModelConfig("x", reads="replug")}, "a harness' texts bring none"),
        ({"chat": True, "overflow": "passages"}, "has none"),
    ],
)
def test_settings_are_checked(home, tmp_path, settings, message):
    given = {"model": ModelConfig(home), "tasks": ("sciq",), "out": tmp_path, "window": 32}
    with pytest.raises(ValueError, match=message):
        HarnessConfig(**given | settings)


def test_an_unknown_task_is_named(home, local, tmp_path, monkeypatch):
    config = HarnessConfig(ModelConfig(home), ("no_such_task",), tmp_path / "out", window=32)
    with pytest.raises(ValueError, match="no_such_task"):
        run_harness(config)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[harness\]'"):
        run_harness(config)
