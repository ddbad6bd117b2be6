"""The report's numbers against numpy, from records that the test wrote; what is compared with what; the page."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from cepe_jax.directories import write_json
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.sweep import cells as store
from cepe_jax.evaluation.sweep.cells import CellFacts
from cepe_jax.evaluation.sweep.estimates import Estimate, paired
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.evaluation.tasks.document import Document
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.identity import as_json

DOCUMENTS = [
    f"{domain}/{number}" for domain, count in (("book", 5), ("arxiv", 4), ("web", 1)) for number in range(count)
]
FACTS = CellFacts("1 x cpu", "0", "3", {}, None, "2000-01-01", "x", None, None, {}, seconds=1.0, peak_memory=1 << 30)


@pytest.fixture
def config(tmp_path) -> SweepConfig:
    data = Perplexity(data=Path("d"), chunks=(0, 2), window=8, scored=4, chunk_length=16, kinds=("previous", "other"))
    models = {"cepe": ModelConfig(Path("a")), "plain": ModelConfig(Path("b")), "other": ModelConfig(Path("c"))}
    return SweepConfig(out=tmp_path, models=models, perplexity={"text": data})


def nll_of(name: str, documents) -> dict[str, float]:
    """Of two windows of each document, the second of them like the first."""
    rng = np.random.default_rng(sum(map(ord, name)))
    means = rng.normal(3, 1, len(documents))
    return {
        f"{document}:{start}": float(mean + rng.normal(0, 0.1))
        for document, mean in zip(documents, means, strict=True)
        for start in (7, 9)
    }


@pytest.fixture
def nll(config) -> dict[str, dict[str, float]]:
    """Of each cell that is written: all but the last of `plain`; `other` has other tokens."""
    (config.out / "cells").mkdir()
    write_json(config.out / "sweep.json", as_json(config))
    nll = {}
    for number, cell in enumerate(itertools.chain(*config.cells())):
        if cell.name == "plain.text.other.2":
            store.write_failure(config.out, cell, "out of room", "a trace")
            continue
        # One model did not finish a document that the other did.
        documents = DOCUMENTS[1:] if cell.model == "plain" else DOCUMENTS
        nll[cell.name] = nll_of(cell.name, documents)
        records = [
            {
                "id": name,
                "document": name.split(":")[0],
                "domain": name.split("/")[0],
                "nll": value,
                "read": 8 + 16 * cell.point.value + index,
                "seconds": 0.01 * (1 + index % 5),
            }
            for index, (name, value) in enumerate(nll[cell.name].items())
        ]
        tokenizer = "x" if cell.model != "other" else "y"
        facts = dataclasses.replace(FACTS, tokenizer=tokenizer, peak_memory=(number + 1) << 28)
        store.write(config.out, cell, iter(records), lambda facts=facts: facts)
    return nll


@pytest.fixture
def cells(config, nll) -> dict[str, dict]:
    report(ReportConfig(config.out))
    written = json.loads((config.out / "results.json").read_text())
    assert written["schema"] == 2
    return {cell["name"]: cell for cell in written["cells"]}


def error_of(values: dict[str, float]) -> float:
    """By documents of two windows each: of equal sizes, the error of the mean is that of the documents' means."""
    names = sorted(values)
    means = [(values[a] + values[b]) / 2 for a, b in zip(names[::2], names[1::2], strict=True)]
    return float(np.std(means, ddof=1) / np.sqrt(len(means)))


def check(numbers: dict, values: dict[str, float]) -> None:
    np.testing.assert_allclose(numbers["mean"], np.mean(list(values.values())))
    np.testing.assert_allclose(numbers["stderr"], error_of(values))
    assert (numbers["records"], numbers["groups"]) == (len(values), len(values) // 2)


def test_means(cells, nll):
    assert cells.keys() == nll.keys()
    for name, values in nll.items():
        numbers = cells[name]["metrics"]["nll"]
        check(numbers, values)
        assert numbers["perplexity"] == pytest.approx(math.exp(np.mean(list(values.values()))))


def test_gains(cells, nll):
    """Paired by window, on the windows that both have: positive where nll fell, with the error of the differences."""
    for name in nll:
        model, _, kind, chunks = name.split(".")
        numbers = cells[name]["metrics"]["nll"]
        if chunks == "0":
            assert numbers["gain_over_no_context"] is None
        else:
            without = nll[f"{model}.text.none.0"]
            check(
                numbers["gain_over_no_context"], {window: without[window] - nll[name][window] for window in nll[name]}
            )
        if model == "plain":
            first = nll[f"cepe.text.{kind}.{chunks}"]
            check(numbers["gain_over_first_model"], {window: first[window] - nll[name][window] for window in nll[name]})
        else:
            assert numbers["gain_over_first_model"] is None  # of itself, or of another tokenizer


def test_domains(cells, nll):
    """A document alone has no error."""
    for name, values in nll.items():
        domains = cells[name]["metrics"]["nll"]["domains"]
        assert list(domains) == ["arxiv", "book", "web"]
        for domain, numbers in domains.items():
            some = {window: value for window, value in values.items() if window.startswith(domain)}
            if domain == "web":
                assert (numbers["mean"], numbers["stderr"]) == (pytest.approx(np.mean(list(some.values()))), None)
            else:
                check(numbers, some)


def test_cost(cells, nll):
    for number, (name, cell) in enumerate(cells.items()):
        count, chunks = len(nll[name]), int(name[-1])
        read = 8 + 16 * chunks + np.arange(count)
        assert cell["tokens_per_second"] == pytest.approx(np.median((read / (0.01 * (1 + np.arange(count) % 5)))[1:]))
        assert cell["read"] == np.median(read)
        assert cell["peak_memory"] == (number + 1 + (number >= 5)) << 28  # one cell has no result


@pytest.mark.parametrize("name", ["report.md", "text.png", "results.json"])
def test_a_report_that_is_stopped_leaves_the_one_before(config, nll, monkeypatch, name):
    """Whole, and nothing beside it."""
    report(ReportConfig(config.out))
    before = {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()}

    def rename(path: Path, target: Path, real=Path.rename) -> None:
        assert path.stat().st_size > 100
        if target.name == name:
            raise KeyboardInterrupt
        real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        report(ReportConfig(config.out))
    assert {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()} == before


def test_the_speed_of_one_record_is_not_told(config, nll):
    """It waited for compilation."""
    for path in (config.out / "cells").iterdir():
        path.unlink()
    cell = config.cells()[0][0]
    record = {"id": "a:0", "document": "a", "domain": "d", "nll": 2.0, "read": 8, "seconds": 60.0}
    store.write(config.out, cell, iter([record]), lambda: FACTS)
    page = report(ReportConfig(config.out))
    assert rows_of(page, "Tokens a second, and peak memory")[1] == ["cepe", "previous", "-, 1.00 GiB"]
    (found,) = json.loads((config.out / "results.json").read_text())["cells"]
    assert found["tokens_per_second"] is None


def rows_of(page: str, title: str) -> list[list[str]]:
    lines = page.split(f"**{title}**\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_the_page(config, nll):
    page = report(ReportConfig(config.out))
    assert page == (config.out / "report.md").read_text()
    numbers = {name: (np.mean(list(values.values())), error_of(values)) for name, values in nll.items()}

    def shown(name: str) -> str:
        if name not in numbers:
            return "-"
        mean, error = numbers[name]
        return f"{mean:.4f} ± {error:.4f} ({math.exp(mean):.2f})"

    rows = rows_of(page, "nll")
    assert rows[0] == ["model", "contexts", "n", "0", "2"]
    wanted = [
        [model, kind, "18 of 9" if model == "plain" else "20 of 10"]
        + [shown(f"{model}.text.none.0"), shown(f"{model}.text.{kind}.2")]
        for model in ("cepe", "plain", "other")
        for kind in ("previous", "other")
    ]
    assert rows[1:] == wanted
    gains = rows_of(page, "Gain over cepe, nll")[1:]
    of_plain = {window: nll["cepe.text.none.0"][window] - value for window, value in nll["plain.text.none.0"].items()}
    text = f"{np.mean(list(of_plain.values())):+.4f} ± {error_of(of_plain):.4f}"
    assert gains[0] == ["cepe", "previous", "-", "-", "-"]
    assert gains[2][:4] == ["plain", "previous", "18 of 9", text]
    assert gains[3][3:] == [text, "-"]
    assert gains[4][2:] == ["-", "-", "-"]
    by_domain = rows_of(page, "nll by domain")
    assert len(by_domain) == 1 + 3 * 6
    assert by_domain[-1][:4] == ["web", "other", "other", "2 of 1"]
    assert "±" not in "".join(by_domain[-1])
    assert "`plain.text.other.2`: out of room" in page
    assert "- 1 x cpu, jax 0, Python 3, 2000-01-01" in page
    assert (config.out / "text.png").read_bytes().startswith(b"\x89PNG")


def test_a_task(tmp_path):
    """In percent; results of one example under several seeds are dependent; ROUGE's geometric mean has no error."""
    task = Qa(axis=(0, 5), data=Path("d"), seeds=(1, 2), metrics=("exact_match", "rouge1", "rouge2", "rougeL"))
    config = SweepConfig(out=tmp_path, models={"cepe": ModelConfig(Path("a"))}, tasks={"nq": task})
    (tmp_path / "cells").mkdir()
    write_json(tmp_path / "sweep.json", as_json(config))
    answers = ["the red house", "a blue sea", "green"]
    for cell in itertools.chain(*config.cells()):
        records = [
            {
                "id": f"{seed}:{number}",
                "seed": seed,
                "answers": [answer],
                "prediction": answer if number < 2 and (cell.point.value or seed == 1) else "a red sea",
                "read": 7,
                "seconds": 0.5,
                "first_seconds": 9.0 if (seed, number) == (1, 0) else 0.125 * number,  # the first one compiles
            }
            for seed in (1, 2)
            for number, answer in enumerate(answers)
        ]
        store.write(tmp_path, cell, iter(records), lambda: FACTS)
    page = report(ReportConfig(tmp_path))
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    matches = [cell["metrics"]["exact_match"] for cell in cells]
    np.testing.assert_allclose([numbers["mean"] for numbers in matches], [1 / 3, 2 / 3])
    assert (matches[0]["records"], matches[0]["groups"]) == (6, 3)
    np.testing.assert_allclose(matches[1]["stderr"], np.std([1, 1, 0], ddof=1) / np.sqrt(3))
    np.testing.assert_allclose(matches[1]["gain_over_no_context"]["mean"], 1 / 3)
    np.testing.assert_allclose(matches[1]["gain_over_no_context"]["stderr"], np.std([0.5, 0.5, 0], ddof=1) / np.sqrt(3))
    rouge = [np.prod([cell["metrics"][f"rouge{n}"]["mean"] for n in "12L"]) ** (1 / 3) for cell in cells]
    np.testing.assert_allclose([cell["metrics"]["rouge"]["mean"] for cell in cells], rouge)
    assert cells[1]["metrics"]["rouge"]["stderr"] is None
    assert cells[1]["metrics"]["rouge"]["gain_over_no_context"] is None
    shown = [f"{100 * matches[n]['mean']:.1f} ± {100 * matches[n]['stderr']:.1f}" for n in (0, 1)]
    assert rows_of(page, "exact_match") == [["model", "n", "0", "5"], ["cepe", "6 of 3", *shown]]
    assert rows_of(page, "rouge")[1] == ["cepe", "6 of 3", *(f"{100 * mean:.1f}" for mean in rouge)]
    assert rows_of(page, "Tokens a second, and peak memory")[1] == ["cepe", "14, 1.00 GiB", "14, 1.00 GiB"]
    assert rows_of(page, "Tokens read, and seconds to the first token")[1] == ["cepe", "7, 0.125", "7, 0.125"]
    assert [cell["first_seconds"] for cell in cells] == [0.125, 0.125]


def test_no_result_at_all(config):
    (config.out / "cells").mkdir()
    write_json(config.out / "sweep.json", as_json(config))
    page = report(ReportConfig(config.out))
    assert "No cell" in page
    assert page.count("not run yet") == 9
    assert not (config.out / "text.png").exists()
    with pytest.raises(FileNotFoundError, match=r"sweep\.json: no .*--out"):
        report(ReportConfig(config.out / "absent"))


def test_the_report_needs_no_place(config, nll, tmp_path):
    """What a sweep left may be moved."""
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert "cepe" in report(ReportConfig(moved))
    assert not tmp_path.exists()
    moved.rename(tmp_path)


@pytest.mark.parametrize("seed", range(10))
def test_errors_of_groups(seed):
    """Against the sum over all pairs of values of one group; of groups of one it is the usual error."""
    rng = np.random.default_rng(seed)
    values, groups = rng.normal(2, 1, 30), rng.integers(0, 9, 30).astype(str)
    estimate = Estimate.of(values, groups)
    same = groups[:, None] == groups[None]
    count = len(set(groups))
    deviations = values - values.mean()
    variance = (deviations[:, None] * deviations[None])[same].sum() * count / (count - 1) / 30**2
    np.testing.assert_allclose((estimate.mean, estimate.stderr), (values.mean(), np.sqrt(variance)))
    alone = Estimate.of(values, [str(n) for n in range(30)])
    np.testing.assert_allclose(alone.stderr, values.std(ddof=1) / np.sqrt(30))
    assert (alone.records, alone.groups) == (30, 30)


def test_one_group_has_no_error():
    assert Estimate.of([1.0, 3.0], ["a", "a"]) == Estimate(2.0, None, 2, 1)
    assert dataclasses.astuple(Estimate.of([3.0], ["a"])) == (3.0, None, 1, 1)


def test_pairs():
    ours, theirs = {"a": 1.0, "b": 5.0, "c": 2.0}, {"b": 2.0, "c": 1.0, "d": 9.0}
    assert paired(ours, theirs, dict(zip("abcd", "1234", strict=True))) == Estimate(2.0, 1.0, 2, 2)
    assert paired(ours, {"d": 1.0}, {}) is None


def test_averages_over_tasks(tmp_path):
    """Each task counts alike; there is none where a task has no result, and none over several families."""
    same = {"axis": (0, 5), "data": Path("d"), "metrics": ("exact_match", "f1")}
    asked = {"a": Qa(**same), "b": Qa(**same), "c": Document(axis=(5,), data=Path("d"))}
    config = SweepConfig(out=tmp_path, models={"cepe": ModelConfig(Path("a"))}, tasks=asked)
    (tmp_path / "cells").mkdir()
    write_json(tmp_path / "sweep.json", as_json(config))
    right = {"cepe.a.0": [1, 0, 0, 1], "cepe.a.5": [1, 1, 1, 0], "cepe.b.5": [0, 1], "cepe.c.5": [1, 1]}
    for cell in itertools.chain(*config.cells()):
        records = [
            {"id": f"42:{n}", "seed": 42, "answers": ["x"], "prediction": "xy"[1 - hit], "read": 1, "seconds": 1.0}
            for n, hit in enumerate(right.get(cell.name, []))
        ]
        if records:
            store.write(tmp_path, cell, iter(records), lambda: FACTS)
    page = report(ReportConfig(tmp_path))
    averages = json.loads((tmp_path / "results.json").read_text())["averages"]
    error = np.hypot(np.std([1, 1, 1, 0], ddof=1) / 2, np.std([0, 1], ddof=1) / np.sqrt(2)) / 2
    assert [(some["metric"], some["value"], some["records"]) for some in averages] == [
        ("exact_match", 5, 6),
        ("f1", 5, 6),
    ]
    assert (averages[0]["family"], averages[0]["model"], averages[0]["mean"]) == ("qa", "cepe", (3 / 4 + 1 / 2) / 2)
    np.testing.assert_allclose(averages[0]["stderr"], error)
    table = page.split("## All qa tasks: exact_match\n\n")[1].splitlines()
    assert table[:3] == ["| model | n | 5 |", "|---|---|---|", f"| cepe | 6 | 62.5 ± {100 * error:.1f} |"]
    assert "All document tasks" not in page
