"""Results as an earlier version stored them, when every task had the settings of all families, are finished cells."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cepe_jax.directories import write_json, write_text
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.sweep import run
from cepe_jax.evaluation.sweep.grid import SweepConfig
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.synthetic import Synthetic

STORED = json.loads((Path(__file__).parent / "data" / "stored.json").read_text())


@pytest.fixture
def config(tmp_path) -> SweepConfig:
    """The sweep that stored the results, at whose place they are."""
    for name, content in STORED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (write_text if isinstance(content, str) else write_json)(tmp_path / name, content)
    text = Perplexity(data=Path("texts"), window=16, scored=8, chunk_length=8, chunks=(0, 1))
    nq = Qa(data=Path("nq.jsonl"), axis=(0,), demonstrations=1, passages=1, max_new_tokens=4)
    needle = Synthetic(axis=(120,), samples=1, window=100, chunk_length=32, max_new_tokens=4)
    models, tasks = {"cepe": ModelConfig(Path("model"))}, {"nq": nq, "needle": needle}
    return SweepConfig(out=tmp_path, models=models, perplexity={"text": text}, tasks=tasks)


def test_stored_cells_are_not_run_again(config, monkeypatch):
    monkeypatch.setattr(run, "_in_process", None)  # no process can start
    run.run_sweep(config)
    cells = {cell["name"]: cell for cell in json.loads((config.out / "results.json").read_text())["cells"]}
    assert cells.keys() == {"cepe.text.none.0", "cepe.text.previous.1", "cepe.nq.0", "cepe.needle.120"}
    lines = STORED["cells/cepe.text.previous.1.jsonl"].splitlines()
    nll = np.mean([json.loads(line)["nll"] for line in lines])
    assert cells["cepe.text.previous.1"]["metrics"]["nll"]["mean"] == pytest.approx(nll)
    assert cells["cepe.nq.0"]["metrics"].keys() == {"exact_match", "substring_match", "f1"}
    assert cells["cepe.needle.120"]["identity"]["data.passages"] == 10  # as it was stored


def test_stored_settings_are_reported(config):
    assert "Without a result" not in report(ReportConfig(config.out))


def test_other_settings_than_stored_are_refused(config):
    nq = dataclasses.replace(config.tasks["nq"], passages=2)
    with pytest.raises(ValueError, match=r"cepe\.nq\.0\.json: .*data\.passages .* 1 .* 2 "):
        run.run_sweep(dataclasses.replace(config, tasks=config.tasks | {"nq": nq}))
