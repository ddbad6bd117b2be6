"""The benchmark's arithmetic, and its table on a few documents."""

import json

import pytest
import sentencepiece
from support import datasets

from cepe_jax.benchmarks.data import DataBenchmarkConfig, bare_loops, benchmark, demanded
from cepe_jax.data.examples import ExampleConfig


def test_what_a_pod_asks_for():
    """256 x 197 TFLOP/s x 40% / 191 TFLOP x 8,192 tokens, over 64 hosts."""
    asked = demanded()
    assert asked["tokens"] == pytest.approx(256 * 1.97e14 * 0.4 / 191e12 * 8192, rel=0.003)
    assert asked["host"] == asked["tokens"] / 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return datasets.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_bare_loops_do_the_same_work(tokenizer):
    """Both libraries give the ids that the dataset has, so that their times compare."""
    text = "abcdefghij klmnop\nqrstuv  wxyz" * 20
    loops = bare_loops(tokenizer)
    assert loops.keys() == {"sentencepiece", "tokenizers"}
    ids = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(text)
    assert all(encode(text) == ids for encode in loops.values())


def test_the_table(tokenizer, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("abcdefghij klmnop\n" * (10 + number))
    config = DataBenchmarkConfig(
        input=tmp_path,
        tokenizer=str(tokenizer.path),
        out=tmp_path / "out",
        repeats=1,
        batch_size=2,
        examples=ExampleConfig(window=8, num_chunks=2, chunk_length=4),
        workers=1,
    )
    benchmark(config)
    report = json.loads((tmp_path / "out" / "data.json").read_text())
    assert report["documents"] == 40
    encoded = [tokenizer.encode("abcdefghij klmnop\n" * (10 + n), bos=True, eos=True) for n in range(40)]
    assert report["tokens"] == sum(map(len, encoded))
    names = [row["what"] for row in report["rows"]]
    assert {"bare sentencepiece loop", "prepare", "load, 2 threads", "load, 1 processes"} <= set(names)
    page = (tmp_path / "out" / "data.md").read_text()
    assert all(f"| {name} |" in page for name in names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data.json", "data.md"}
