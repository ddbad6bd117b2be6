"""Gains over several runs against numpy, from records that the test wrote; a text continued by a tiny model."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from cepe_jax.directories import write_json
from cepe_jax.evaluation.gains import GainsConfig, Runs, _cell, gains, sentences, table
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.sweep import cells as store
from cepe_jax.evaluation.sweep.cells import CellFacts
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.sweep.run import run_sweep
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.identity import as_json
from cepe_jax.inference.text import load

FACTS = CellFacts("1 x cpu", "0", "3", {}, None, "2000-01-01", "t", None, None, {}, seconds=1.0, peak_memory=1)
DATA = Perplexity(data=Path("d"), chunks=(0, 2, 8), window=8, scored=4, chunk_length=16, kinds=("previous", "other"))
WINDOWS = [(document, start) for document, count in (("a", 3), ("b", 1), ("c", 2)) for start in range(count)]


def write_run(out: Path, seed: int, windows=WINDOWS, data: Perplexity = DATA) -> dict[tuple[str, int], np.ndarray]:
    """Records of a run at `out`, and their nll by kind and number of contexts."""
    sweep = SweepConfig(out=out, models={"model": ModelConfig(Path("m"))}, perplexity={"perplexity": data})
    (out / "cells").mkdir(parents=True)
    write_json(out / "sweep.json", as_json(sweep))
    rng, nll = np.random.default_rng(seed), {}
    for cell in itertools.chain(*sweep.cells()):
        nll[cell.point] = rng.normal(3, 1, len(windows))
        records = [
            {"id": f"{document}:{start}", "document": document, "domain": "", "nll": value, "read": 8, "seconds": 0.1}
            for (document, start), value in zip(windows, nll[cell.point].tolist(), strict=True)
        ]
        store.write(out, cell, records, lambda: FACTS)
    return nll


def test_windows_are_averaged_over_runs_and_documents_are_independent(tmp_path):
    runs = [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    written = [write_run(path, seed) for seed, path in enumerate(runs)]
    found = Runs(GainsConfig(tuple(runs), 2, tmp_path / "gains"))
    by_document = np.array([document for document, _ in WINDOWS])
    for kind, number in (("previous", 2), ("previous", 8), ("other", 2), ("other", 8)):
        of_runs = np.stack([nll["none", 0] - nll[kind, number] for nll in written])
        gain, mean = of_runs.mean(axis=0), of_runs.mean()
        sums = np.array([(gain - mean)[by_document == document].sum() for document in "abc"])
        ours = found.gains[kind][number]
        assert ours.estimate.mean == pytest.approx(mean)
        assert ours.estimate.stderr == pytest.approx(np.sqrt(3 / 2 * (sums**2).sum()) / len(WINDOWS))
        assert ours.spread == pytest.approx(of_runs.mean(axis=1).std(ddof=1))
    assert found.nll.mean == pytest.approx(np.mean([nll["none", 0] for nll in written]))
    assert found.nll.groups == 3
    lines = list(sentences(found, 2))
    assert len(lines) == 4
    shown = found.gains["previous"][2], found.gains["previous"][8], found.gains["other"][2]
    for line, value in zip(lines[1:], shown, strict=True):
        assert f"{abs(value.estimate.mean):.3f} ± {value.estimate.stderr:.3f}" in line
        assert ("saves" in line) == (value.estimate.mean > 0)
    assert len(list(table(found))) == 4


def test_one_run_has_no_spread(tmp_path):
    write_run(tmp_path / "0", 0)
    assert Runs(GainsConfig((tmp_path / "0",), 2, tmp_path)).gains["other"][8].spread is None


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "windows", 0, WINDOWS[:-1])
    write_run(tmp_path / "chunks", 0, data=dataclasses.replace(DATA, chunks=(0, 2)))
    write_run(tmp_path / "nothing", 0, data=dataclasses.replace(DATA, chunks=(2, 8)))
    for name in ("windows", "chunks", "nothing"):
        with pytest.raises(ValueError, match=name):
            Runs(GainsConfig((tmp_path / "0", tmp_path / name), 2, tmp_path))
    several = SweepConfig(
        out=tmp_path / "several",
        models={name: ModelConfig(Path("m")) for name in "ab"},
        perplexity={"perplexity": DATA},
    )
    (tmp_path / "several").mkdir()
    write_json(tmp_path / "several" / "sweep.json", as_json(several))
    with pytest.raises(ValueError, match="several is of several models"):
        Runs(GainsConfig((tmp_path / "several",), 2, tmp_path))
    with pytest.raises(ValueError, match="trained is 4"):
        gains(GainsConfig((tmp_path / "0",), 4, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_window_is_continued_with_its_context_and_without(home, tmp_path):
    """7 CPU-seconds: the whole command on a tiny model, which writes what `generate` does."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"{name} fox runs over the lazy dog " * 9)
    sizes = {"chunks": (0, 2), "window": 16, "scored": 8, "chunk_length": 8, "kinds": ("previous", "other")}
    data = {"perplexity": Perplexity(data=texts, **sizes)}
    run_sweep(SweepConfig(out=tmp_path / "run", models={"model": ModelConfig(home)}, perplexity=data))
    page = gains(GainsConfig((tmp_path / "run",), 2, tmp_path / "gains", new_tokens=4))
    assert page == (tmp_path / "gains/gains.md").read_text()
    assert (tmp_path / "gains/gains.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "gains/gains.json").read_text())
    assert f"{numbers['previous']['2']['gain']['mean']:+.4f}" in page
    model = load(home)
    name, start = re.search(r"`(.*)` from token (\d+), the window of the greatest gain", page).groups()
    cut = int(start)
    ids = model.tokenizer.encode((texts / name).read_text())
    prompt = model.tokenizer.decode(ids[cut - 8 : cut])
    context = model.encode([ids[cut - 24 : cut - 16], ids[cut - 16 : cut - 8]], chunk_length=8)
    assert f"| it ends with | {_cell(prompt)} |" in page
    assert f"| the document | {_cell(model.tokenizer.decode(ids[cut : cut + 4]))} |" in page
    assert f"| with its context | {_cell(model.generate(prompt, context, max_new_tokens=4))} |" in page
    assert f"| without | {_cell(model.generate(prompt, max_new_tokens=4))} |" in page
