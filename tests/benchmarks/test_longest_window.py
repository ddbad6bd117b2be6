"""The search for the longest window that fits, and its report."""

import json
from types import SimpleNamespace

import pytest

from cepe_jax.benchmarks import memory
from cepe_jax.benchmarks.memory import FORMS, LongestConfig, longest_window, search_and_print


@pytest.mark.parametrize("first", [1024, 8192, 65536])
@pytest.mark.parametrize("longest", [0, 1024, 5120, 60_416])
def test_the_longest_window_that_fits_is_found(first, longest):
    """With bytes that jump as a compiler's do, and few windows tried."""

    def needed(window: int) -> int:
        return 500 + window // 2 + window // 4096 * 100

    most, tried = longest_window(needed, needed(longest), first, 1024)
    assert most == longest
    assert tried == {window: needed(window) for window in tried}
    assert needed(longest + 1024) > needed(longest)
    assert len(tried) < 12


def test_each_form_is_searched_and_reported(tmp_path, monkeypatch, capsys):
    """By a compiler that counts: of a token 8, 2 and 1 units are kept, or half of one if the host has its inputs."""
    seen = []

    def compiled(step, make):
        seen.append(step)
        units = 8 if step.remat.decoder == "none" else 0.5 if step.remat.decoder == "offload" else 2
        units -= step.loss_chunk == "auto" and step.mlp_chunk == "auto" and step.remat.decoder == "full"
        return {"memory": {"peak": int(units * step.examples.window)}}

    monkeypatch.setattr(memory, "compile_step", compiled)
    chips = SimpleNamespace(devices=[None] * 4, chip=SimpleNamespace(hbm=8 * 10_240))
    monkeypatch.setattr(memory, "topology_of", lambda name: chips)
    settings = {"stage": "lm", "decoder": "tiny", "steps": 1, "batch_size": 64, "topology": "v5e:2x2", "out": tmp_path}
    search_and_print(LongestConfig(**settings))
    report = json.loads((tmp_path / "longest.json").read_text())
    assert [(form["form"], form["longest"]) for form in report["forms"]] == list(
        zip(FORMS, (10_240, 40_960, 81_920, 163_840), strict=True)
    )
    assert {(step.batch, step.micro_batch) for step in seen} == {(4, 1)}  # one sequence a chip
    lines = capsys.readouterr().out.splitlines()
    assert "| 163,840 | 16.0 | 0.00 |" in lines[-1]
    assert (tmp_path / "longest.png").stat().st_size > 1000
