"""The report's numbers against numpy, its files against what is promised of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.evaluation import report
from cepe_jax.evaluation.perplexity import choose_windows
from cepe_jax.evaluation.report import EvaluateConfig, evaluate

KINDS = ("previous", "other")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
    for number in range(24):
        words = np.random.default_rng(number).choice(["def ", "x", "\n", "    ", "``` ", "return ", "🙂"], 150)
        (home / f"{number}.txt").write_text("".join(words))
    fractions = {"test_fraction": 0.5, "retrieval_fraction": 0.0}
    prepare(PrepareConfig(input=home, out=home / "out", vocab_size=290, workers=1, **fractions))
    return home / "out"


@pytest.fixture
def config(data, tmp_path) -> EvaluateConfig:
    (tmp_path / "seconds.txt").write_text("data 3\ncepe 10\ncepe 5\n")
    out, seconds = tmp_path / "out", tmp_path / "seconds.txt"
    return EvaluateConfig(Path("model"), data, out, 8, 5, 4, 2, (1, 2, 8), sample_tokens=6, seconds=seconds)


@pytest.fixture
def measured(config, cepe, monkeypatch):
    """(nll by kind and chunks, the calls of generate) of an evaluation whose model is not asked."""
    rng, calls = np.random.default_rng(0), []
    windows = choose_windows(Corpus(config.data, "test"), 8, 32)
    none = rng.normal(3, 1, len(windows))
    nll = {("none", 0): none}
    for kind in KINDS:
        nll |= {(kind, n): none - 0.1 * n * (kind == "previous") + rng.normal(0, 0.05, len(none)) for n in (1, 2, 8)}

    def generate(model, prompts, *context, **limits):
        calls.append((prompts, context, limits))
        return [[5, 6, 7 + len(context)]]

    monkeypatch.setattr(report, "load", lambda path: cepe)
    monkeypatch.setattr(report, "context_nll", lambda *args: nll)
    monkeypatch.setattr(report, "encode_chunks", lambda model, context, mask: context.reshape(1, -1))
    monkeypatch.setattr(report, "generate", generate)
    evaluate(config)
    return nll, calls


def test_numbers(config, measured):
    """Gains are paired by document: their error is that of the differences, far below the nll's own."""
    nll, _ = measured
    written = json.loads((config.out / "report.json").read_text())
    assert {"rows", "gain", "windows", "seconds"} <= written.keys()
    assert [(row["context"], row["chunks"]) for row in written["rows"]] == list(nll)
    count = len(nll["none", 0])
    for row in written["rows"]:
        values = nll[row["context"], row["chunks"]]
        gains = nll["none", 0] - values
        assert row["documents"] == count
        np.testing.assert_allclose(row["nll"], values.mean())
        np.testing.assert_allclose(row["nll_stderr"], np.sqrt(values.var(ddof=1) / count))
        np.testing.assert_allclose(row["gain"], gains.mean(), atol=1e-12)
        np.testing.assert_allclose(row["gain_stderr"], np.sqrt(gains.var(ddof=1) / count), atol=1e-12)
    assert written["gain"].keys() == set(KINDS)
    for kind in KINDS:
        gains = nll["none", 0] - nll[kind, config.trained_chunks]
        np.testing.assert_allclose(written["gain"][kind]["mean"], gains.mean())
        np.testing.assert_allclose(written["gain"][kind]["stderr"], np.sqrt(gains.var(ddof=1) / count))
        assert written["gain"][kind]["stderr"] < written["rows"][0]["nll_stderr"] / 5


def test_windows_and_seconds(config, measured):
    written = json.loads((config.out / "report.json").read_text())
    windows = choose_windows(Corpus(config.data, "test"), 8, 32)
    assert [place["file"] for place in written["windows"]] == [window.document.name for window in windows]
    for place, window in zip(written["windows"], windows, strict=True):
        assert (place["start"], place["end"]) == (window.start, window.start + 8)
        assert place["previous"] == {str(n): [window.start - 4 * n, window.start] for n in (1, 2, 8)}
        spans = {str(n): [window.other_end - 4 * n, window.other_end] for n in (1, 2, 8)}
        assert place["other"] == {"file": window.other.name} | spans
    seconds = written["seconds"]
    assert (seconds["data"], seconds["cepe"]) == (3, 15)
    assert seconds["evaluate"] >= 0
    assert written["config"] == json.loads(json.dumps(dataclasses.asdict(config), default=str))


def test_files(config, measured):
    assert {path.name for path in config.out.iterdir()} == {"report.json", "report.md", "perplexity.png"}
    assert (config.out / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_holds_every_row(config, measured):
    written = json.loads((config.out / "report.json").read_text())
    page = (config.out / "report.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    rows = [cells for cells in table if len(cells) == 4][1:]
    assert len(rows) == len(written["rows"])
    for cells, row in zip(rows, written["rows"], strict=True):
        assert cells[0].split()[0] == str(row["chunks"])
        assert ("more than in training" in cells[0]) == (row["chunks"] > config.trained_chunks)
        assert cells[1:3] == [row["context"], f"{row['nll']:.4f}"]
        assert cells[3] == (f"{row['gain']:+.4f} ± {row['gain_stderr']:.4f}" if row["chunks"] else "")
    assert ["data", "3"] in table
    assert ["cepe", "15"] in table
    assert page.count("```") % 2 == 0


def test_the_sample(config, measured):
    """Half a window as the prompt, with and without what stands right before it; beside it how the file goes on."""
    _, calls = measured
    corpus = Corpus(config.data, "test")
    window = choose_windows(corpus, 8, 32)[0]
    tokens, start = window.document.tokens, window.start
    assert [len(context) for _, context, _ in calls] == [0, 2]
    for prompts, context, limits in calls:
        assert [list(prompt) for prompt in prompts] == [tokens[start : start + 4].tolist()]
        assert limits == {"max_new_tokens": 6, "stop_ids": [corpus.tokenizer.eos_id]}
        if context:
            assert context[0].ravel().tolist() == tokens[start - 8 : start].tolist()
            assert context[1].all()
    sample = json.loads((config.out / "report.json").read_text())["sample"]
    decode = corpus.tokenizer.decode
    assert sample["document"] == decode(tokens[start + 4 : start + 10])
    assert (sample["without context"], sample["with context"]) == (decode([5, 6, 7]), decode([5, 6, 9]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trained_chunks": 3}, r"trained_chunks 3 is not among chunks \[1, 2, 8\]: add it"),
        ({"scored": 9}, "scored is 9: give 1 to the window's 8 tokens"),
        ({"scored": 0}, "scored is 0"),
        ({"chunks": (0, 2)}, r"chunks is \[0, 2\]: give different numbers above 0"),
        ({"chunks": (2, 2)}, r"chunks is \[2, 2\]"),
        ({"chunks": ()}, r"chunks is \[\]"),
        ({"chunk_length": 0}, "chunk_length is 0"),
    ],
)
def test_bad_configs(config, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **changes)


def test_bad_input(config, decoder, cepe, monkeypatch):
    """Nothing is written."""
    monkeypatch.setattr(report, "load", lambda path: decoder)
    with pytest.raises(ValueError, match="model: is no CEPE model: give one that was warmed up or trained"):
        evaluate(config)
    monkeypatch.setattr(report, "load", lambda path: cepe)
    with pytest.raises(ValueError, match="0 documents are longer than the 40008 tokens asked for"):
        evaluate(dataclasses.replace(config, chunk_length=5000))
    with pytest.raises(FileNotFoundError, match="no dataset: datasets are made with"):
        evaluate(dataclasses.replace(config, data=config.out))
    assert not config.out.exists()
