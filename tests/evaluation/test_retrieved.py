"""Questions whose contexts are retrieved: what a model reads of them, what is recorded, what is refused."""

import json
from pathlib import Path

import pytest
from support.fakes import Letters, Scripted, whole_text
from support.refusals import one_line
from support.tracing import write_corpus

from cepe_jax.data.retriever import Retriever
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.sweep.grid import SweepConfig, TaskRun
from cepe_jax.evaluation.sweep.run import run_sweep
from cepe_jax.evaluation.tasks import retrieved
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.protocols import Words
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.retrieved import Retrieve
from cepe_jax.settings import decode, parse
from cepe_jax.weights.source import load, save

# The question shares three, one, two and no words with the documents, all of which are about as long.
DOCUMENTS = ["quick brown fox, says Ann", "lazy fox and Bob", "brown fox: it is Cleo", "nothing here at all"]
QUESTION = "quick brown fox"
WORDS = Words(context="[{context}]", question="{question}?")


@pytest.fixture(scope="module")
def here(home, tmp_path_factory) -> Path:
    """A corpus, questions, and the decoder of the tiny CEPE."""
    here = tmp_path_factory.mktemp("retrieved")
    write_corpus(here / "corpus", DOCUMENTS)
    answers = {"a": ["Cleo"], "b": ["Bob", "Zoe"], "c": ["Zoe"]}
    lines = (json.dumps({"id": name, "question": QUESTION, "answers": them}) for name, them in answers.items())
    (here / "questions.jsonl").write_text("\n".join(lines))
    save(load(home).decoder, here / "decoder", home)
    return here


def task(here: Path, **settings) -> Qa:
    retrieve = Retrieve(**{"corpus": here / "corpus/documents", "k": (0, 1, 2, 4)} | settings)
    words = {"template": WORDS, "demonstrations": 0, "max_new_tokens": 5}
    return Qa(data=here / "questions.jsonl", retrieve=retrieve, **words)


def asked(qa: Qa, k: int) -> tuple[list[dict], list]:
    model = Scripted(lambda prompt: "Cleo")
    return sorted(qa.measure(Point("", k), model), key=lambda record: record["id"]), model.asked


def test_chunks_are_contexts_or_in_the_prompt(here):
    """The best is next to the question; a chunk without a common word is none."""
    best = [0, 2, 1]
    for k in (0, 1, 2, 4):
        read = "".join(f"[{DOCUMENTS[n]}]\n\n" for n in best[:k][::-1])
        for into in (None, "encoder", "decoder"):
            records, prompts = asked(task(here, into=into), k)
            assert {whole_text(prompt) for prompt in prompts} == {f"{read}{QUESTION}?"}
            contexts = 0 if into == "decoder" else len(best[:k])
            assert {len(prompt.contexts) for prompt in prompts} == {contexts}
            assert {len(prompt.scores or ()) for prompt in prompts} == {contexts}
            assert all(list(prompt.scores or ()) == sorted(prompt.scores or ()) for prompt in prompts)
            assert {record["read"] for record in records} == {1 + len(read) + len(QUESTION) + 1}


@pytest.mark.parametrize(
    ("order", "numbers"), [("best_first", [0, 2, 1]), ("best_last", [1, 2, 0]), ("document", [0, 2, 1])]
)
def test_the_order_is_a_setting(here, order, numbers):
    """The corpus' order is that of its shards, of which the first has documents 0 and 2."""
    records, prompts = asked(task(here, order=order), 4)
    assert [Letters().decode(ids) for ids in prompts[0].contexts] == [f"[{DOCUMENTS[n]}]\n\n" for n in numbers]
    assert records[0]["sources"] == tuple(f"doc {n}@0" for n in numbers)


def test_recall_is_recorded(here):
    """By question, of the answers Cleo, Bob or Zoe, and Zoe; normalised as a substring match."""
    for k, expected in {0: [0, 0, 0], 1: [0, 0, 0], 2: [1, 0, 0], 4: [1, 1, 0]}.items():
        qa = task(here)
        records, _ = asked(qa, k)
        records = json.loads(json.dumps(records))
        assert [record["recall"] for record in records] == expected
        assert [qa.values(record)["recall"] for record in records] == expected
        assert [qa.values(record)["exact_match"] for record in records] == [1, 0, 0]
        assert all(0 < record["first_seconds"] <= record["seconds"] for record in records)
        assert [len(record["sources"]) for record in records] == [min(k, 3)] * 3


def test_the_corpus_is_indexed_once(here, monkeypatch):
    calls, init = [], Retriever.__init__
    monkeypatch.setattr(Retriever, "__init__", lambda self, *given: calls.append(1) or init(self, *given))
    retrieved.opened_retriever.cache_clear()
    qa, model = task(here), Scripted(lambda prompt: "x")
    for k in (0, 1, 4):
        list(qa.measure(Point("", k), model))
    assert calls == [1]


def test_other_numbers_of_chunks_are_the_same_run(here):
    assert task(here).identity() == task(here, k=(9,)).identity()
    assert task(here).identity() != task(here, chunk=9).identity()
    assert "retrieve" not in {name for name, value in Qa(axis=(0,), data=here).identity().items() if value}


def settings(home: Path, here: Path, **changes) -> dict:
    models = {"cepe": {"path": str(home)}}
    models["plain"] = {"path": str(here / "decoder"), "reads": "decoder"}
    retrieve = {"corpus": str(here / "corpus/documents"), "k": [0, 2], "chunk": 8}
    words = {"question": "{question}", "context": "{context}"}
    common = {"family": "qa", "data": str(here / "questions.jsonl"), "demonstrations": 0, "max_new_tokens": 2}
    return {"models": models, "tasks": {"found": common | {"template": words, "retrieve": retrieve | changes}}}


def test_a_sweep_measures_recall_and_accuracy(home, here, tmp_path):
    """Two models read the same chunks; a larger k later measures that alone.

    15 CPU-seconds: processes of their own, as a user starts them.
    """
    run_sweep(decode(SweepConfig, settings(home, here) | {"out": str(tmp_path)}))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["name"] for cell in results["cells"]] == [
        f"{model}.found.{k}" for model in ("cepe", "plain") for k in (0, 2)
    ]
    records = {
        model: [json.loads(line) for line in (tmp_path / f"cells/{model}.found.2.jsonl").read_text().splitlines()]
        for model in ("cepe", "plain")
    }
    assert [record["sources"] for record in records["cepe"]] == [record["sources"] for record in records["plain"]]
    tokenizer = Tokenizer(here / "corpus")
    for record in records["cepe"]:
        assert len(record["sources"]) == 2
        assert len(tokenizer.encode(QUESTION)) < record["read"] <= 1 + len(tokenizer.encode(QUESTION)) + 2 * (8 + 4)
    for name, cell in zip(("cepe", "plain"), results["cells"][1::2], strict=True):
        assert cell["metrics"]["recall"]["mean"] == sum(record["recall"] for record in records[name]) / 3
    page = (tmp_path / "report.md").read_text()
    assert "retrieved chunks" in page
    assert "**recall**" in page
    assert "**Tokens read, and seconds to the first token**" in page
    assert all(cell["first_seconds"] > 0 for cell in results["cells"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    run_sweep(decode(SweepConfig, settings(home, here, k=[0, 2, 1]) | {"out": str(tmp_path)}))
    after = {path.name: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        f"{model}.found.1.{suffix}" for model in ("cepe", "plain") for suffix in ("json", "jsonl")
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--retrieve.k=5"], "--retrieve.corpus: required"),
        (["--retrieve.corpus=c", "--retrieve.k=-1"], r"retrieve.k is \[-1\]"),
        (["--retrieve.corpus=c", "--retrieve.k=[3, 3]"], r"retrieve.k is \[3, 3\]"),
        (["--retrieve.corpus=c", "--retrieve.chunk=0"], "chunk is 0"),
        (["--retrieve.corpus=c", "--axis=[1]"], r"axis is \[1\], and retrieve.k"),
        (["--retrieve.corpus=c", "--passages=3"], "passages is 3, and retrieve.k"),
        (["--retrieve.corpus=c", "--family=document"], "retrieve is .*document"),
        (["--retrieve.corpus=c", "--retrieve.into=memory"], "retrieve.into is 'memory'.*encoder, decoder"),
        ([], r"axis is \[\]"),
    ],
)
def test_settings_that_are_refused(changes, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(TaskRun, ["--family=qa", "--data=x.jsonl", "--model.path=m", "--out=o", *changes])
    one_line(error)


def refused(places: tuple[Path, Path], out: Path, model: str, **changes) -> str:
    sweep = settings(*places, **changes)
    sweep["models"] = {model: sweep["models"][model]}
    with pytest.raises(ValueError, match=": ") as error:
        run_sweep(decode(SweepConfig, sweep | {"out": str(out)}))
    return one_line(error)


def test_models_and_corpora_that_are_refused(home, here, tmp_path):
    """Before a process starts, but for the number of chunks, which takes the index. 6 CPU-seconds: one process."""
    assert "into is encoder, and model.reads decoder" in refused((home, here), tmp_path / "a", "plain", into="encoder")
    assert "nowhere: no such" in refused((home, here), tmp_path / "b", "cepe", corpus=str(here / "nowhere"))
    said = refused((home, here), tmp_path / "c", "cepe", k=[5000])
    assert "k is 5000, and " in said
    assert "chunks of 8 tokens" in said


def test_commands_set_the_axis():
    given = ["--family=qa", "--data=x.jsonl", "--model.path=m", "--out=o", "--retrieve.corpus=c"]
    (qa,) = parse(TaskRun, given).tasks.values()
    assert (qa.axis, qa.retrieve.k, qa.retrieve.chunk, qa.retrieve.into) == ((5,), (5,), 1200, None)
    (qa,) = parse(TaskRun, [*given, "--retrieve.k=3", "--retrieve.k=7"]).tasks.values()
    assert [point.value for point in qa.points()] == [3, 7]
