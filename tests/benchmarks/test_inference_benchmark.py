"""The benchmark of inference on sizes of seconds: every way writes the same, and what it says adds up."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cepe_jax.benchmarks import beside, caches
from cepe_jax.benchmarks import inference as benchmark
from cepe_jax.benchmarks.inference import WAYS, InferenceBenchmarkConfig, _Clock, _LeftOut, benchmark_inference
from cepe_jax.benchmarks.training import torch_oracle
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.weights.source import load

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = {"decoder": "tiny", "encoder": "tiny", "chunk_length": 32, "prompt": 9, "new_tokens": 3}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, str]:
    """At 96 and 2,000 tokens of context, the second of which no way but one has room for."""
    out = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "free_bytes", lambda: 4 * 192 * 4 * 2 * 1500)  # fp32 keys and values of 1,500 tokens
        benchmark_inference(InferenceBenchmarkConfig(contexts=(96, 2000), out=out, **SMALL))
    assert (out / "inference.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "inference.json").read_text()), (out / "inference.md").read_text()


def test_every_way_reads_the_same_context(measured):
    """10 CPU-seconds, with the fixture: the whole benchmark, each way at two lengths."""
    rows = {(row["way"], row["context"]): row for row in measured[0]["rows"]}
    assert set(rows) == {(way, length) for way in WAYS for length in (96, 2000)}
    written = [rows[way, 96]["tokens"] for way in ("absorbed", "stored", "recomputed")]
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == SMALL["new_tokens"] + 1
    assert rows["absorbed", 2000]["tokens"] == rows["recomputed", 2000]["tokens"]


def test_what_has_no_room_is_left_out_and_said(measured):
    report, page = measured
    left_out = {(row["way"], row["context"]) for row in report["rows"] if "left_out" in row}
    assert left_out == {("stored", 2000), ("full", 2000)}
    assert page.count("left out: keys") == 2


def test_what_a_way_holds(measured):
    """Keys and values of every layer where they are stored; absorbed, the memory alone."""
    rows = {(row["way"], row["context"]): row for row in measured[0]["rows"]}
    arguments = {way: rows[way, 96]["memory"]["decode"]["arguments"] for way in WAYS}
    padded = 128  # tokens, that a memory of 96 takes
    assert arguments["recomputed"] == arguments["absorbed"]
    cross = 4 * 2 * 192 * 192 * 4  # W_k and W_v, which nothing reads where their products are stored
    assert arguments["stored"] - arguments["absorbed"] == 4 * 2 * padded * 192 * 4 - padded * 192 * 4 - cross
    grown = rows["absorbed", 2000]["memory"]["decode"]["arguments"] - arguments["absorbed"]
    assert grown == (2048 - 128) * (192 * 4 + 1)


def test_the_oracle_beside_us_writes_the_same(tmp_path):
    pytest.importorskip("torch")
    sizes = InferenceBenchmarkConfig(beside="torch", contexts=(96,), out=tmp_path, **SMALL)
    benchmark_inference(sizes)
    rows = json.loads((tmp_path / "beside.json").read_text())["rows"]
    kept = "torch, keys and values kept"
    assert [(row["what"], row["beside"]) for row in rows] == [
        ("encode", "torch"), ("first token", "torch"), ("a token", "torch"), ("a token", kept)
    ]  # fmt: skip
    assert all(0 < min(row["ours"], row["theirs"]) < 100 for row in rows)
    assert (tmp_path / "beside.md").read_text().count("| 96 |") == 4
    model, rng = load(GOLDEN / "tiny_mha"), np.random.default_rng(0)
    context_BCL, prompt_BT = (rng.integers(0, 131, shape, np.int32) for shape in ((1, 3, 7), (1, 5)))
    ours = beside.Reader(model, context_BCL, prompt_BT, 16)
    theirs = torch_oracle("float32").Reader(model, context_BCL, prompt_BT)
    for call in ("first_token", "next_token", "next_token", "first_token"):
        assert int(getattr(ours, call)()[0, 0]) == int(getattr(theirs, call)()[0, 0])


@pytest.mark.parametrize("kind", ["reattention", "razor"])
def test_caches_beside_each_other(tmp_path, monkeypatch, kind):
    """7 CPU-seconds: two programs of each cache. Bytes are those of the arrays, and of the formulas."""
    monkeypatch.setattr(caches, "PIECE", 32)
    monkeypatch.setattr(caches, "TOKENS", 2)
    given = {"reattention": {"selected": 2, "span": 4, "piece": 16}, "razor": {"compression": 8}}[kind]
    config = CacheConfig(kind, sinks=2, recent=16, **given)
    benchmark_inference(InferenceBenchmarkConfig(cache=config, contexts=(256,), out=tmp_path, **SMALL))
    rows = {row["cache"]: row for row in json.loads((tmp_path / "caches.json").read_text())["rows"]}
    assert list(rows) == ["full", "rolling", kind]
    number, heads, slots = 2 * 4 * 32, 4 * 6, 256 + 4 * 32  # bytes of a key and a value; heads; tokens that have room
    # Tokens that a head reads on average, and bytes that are held. In a Razor of 24 heads 3 keep all of them.
    read = {"reattention": 26 + (256 - 18) / 2, "razor": (3 * 256 + 21 * (2 + 32 + 1)) / 24}[kind]
    tokens = {"reattention": heads * (slots + 16), "razor": 3 * slots + 21 * (2 + slots // 8 + 2)}[kind]
    assert rows["full"]["cache_bytes"] == heads * slots * number + slots + 4
    assert rows["rolling"]["cache_bytes"] == heads * int(read) * number + 4
    assert rows[kind]["cache_bytes"] == tokens * number + 4
    assert rows["full"]["token_bytes"] - rows[kind]["token_bytes"] == pytest.approx((256 - read) * heads * number)
    assert rows["full"]["token_flops"] > rows[kind]["token_flops"]
    assert all(row["memory_bytes"] > row["cache_bytes"] for row in rows.values())
    assert (tmp_path / "caches.md").read_text().count("| 256 |") == 3


def test_speeds_are_of_the_seconds(measured):
    for row in measured[0]["rows"]:
        if "left_out" not in row:
            assert row["tokens_per_second"] == pytest.approx(1 / row["token_seconds"])
            assert 0 < row["prefill_seconds"] < 100


def test_what_would_take_too_long_is_foreseen():
    clock = _Clock(limit=1.0)
    _, seconds = clock("reading", 100.0, lambda: None)
    assert seconds < 1
    speed = clock.speeds["reading"]
    assert speed == 100.0 / seconds
    with pytest.raises(_LeftOut, match="reading .* 2 s"):
        clock("reading", 2 * speed, lambda: pytest.fail("it is not run"))
    assert clock("other", math.inf, lambda: 7)[0] == 7


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"contexts": (8, 4)}, r"contexts is \[8, 4\]: .*rising"),
        ({"contexts": ()}, r"contexts is \[\]: .*rising"),
        ({"new_tokens": 1}, "new_tokens is 1: .* 2 "),
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"cache": CacheConfig("rolling")}, "cache.kind is rolling, which is measured anyway"),
        ({"cache": CacheConfig("razor"), "beside": "torch"}, "give beside or cache"),
    ],
)
def test_bad_settings(setting, said):
    with pytest.raises(ValueError, match=said):
        InferenceBenchmarkConfig(**setting)
