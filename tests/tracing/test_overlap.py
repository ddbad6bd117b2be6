"""Overlap against brute force, and the command with a decoder of random weights."""

import json

import numpy as np
import pytest
from support.datasets import write
from support.models import make_cepe
from support.refusals import one_line
from support.tracing import write_index, write_tokenizer

from cepe_jax.data.corpus import features_of
from cepe_jax.tracing.index import Index
from cepe_jax.tracing.overlap import SHUFFLED, TRUE, OverlapConfig, overlap, shares
from cepe_jax.tracing.words import ngrams, words_of
from cepe_jax.weights.source import save

SEEN = ["the cat sat on the mat and the cat slept on the mat all day", "a dog sat on a log and slept"]
HELD_OUT = ["the cat sat on a log and slept on the mat all day", "the dog slept all day on the log and on the mat", "a"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An index of two texts, three others, and a decoder with random weights."""
    home = tmp_path_factory.mktemp("overlap")
    write_index(home, SEEN)
    tokenizer = write_tokenizer(home)
    records = [
        {"tokens": np.array(tokenizer.encode(text, bos=True, eos=True)), "name": f"doc {n}", "domain": "d"}
        for n, text in enumerate(HELD_OUT)
    ]
    write(home / "others", "documents", features_of(tokenizer), [records], tokenizer)
    save(make_cepe(vocab_size=tokenizer.vocab_size).decoder, home / "model", assets=home)
    return home


def config_of(home, **settings) -> OverlapConfig:
    places = {"model": home / "model", "index": home / "index", "data": home / "others", "out": home / "out"}
    sizes = {"split": "train", "prompt_tokens": 4, "new_tokens": 20, "lengths": (1, 2, 3, 50), "batch_size": 2}
    return OverlapConfig(**places | sizes | settings)


def test_shares_count_every_ngram(home):
    texts = [words_of(text) for text in [*HELD_OUT, "zebra zebra"]]
    found = shares(Index(home / "index"), texts, (1, 2, 4, 50))
    for n in (1, 2, 4):
        known = {ngram for text in SEEN for ngram in ngrams(words_of(text), n)}
        wanted = [ngram in known for words in texts for ngram in ngrams(words, n)]
        assert found[n].mean == pytest.approx(np.mean(wanted))
        assert (found[n].records, 0 < np.mean(wanted) < 1) == (len(wanted), True)
    assert 50 not in found


def test_the_command_compares_continuations_with_controls(home, tmp_path, capsys):
    """Shuffled words keep the share of 1-grams; the short document is left out."""
    overlap(config_of(home, out=tmp_path / "out"))
    result = json.loads((tmp_path / "out/overlap.json").read_text())["shares"]
    assert list(result) == [TRUE, SHUFFLED, "the model, temperature 0", "the model, temperature 1"]
    assert result[TRUE]["1"] == result[SHUFFLED]["1"]
    assert result[TRUE]["1"]["groups"] == 2
    assert result[TRUE]["2"]["mean"] > result[SHUFFLED]["2"]["mean"]
    assert result["the model, temperature 1"]["1"]["mean"] < result[TRUE]["1"]["mean"]
    assert (tmp_path / "out/report.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out/report.png").exists()


def test_counted_splits_and_other_tokenizers_are_refused(home, tmp_path):
    refused = [
        ({"data": home / "documents"}, "index has counted split train"),
        ({"prompt_tokens": 4000}, "4000"),
    ]
    for settings, match in refused:
        with pytest.raises(ValueError, match=match) as error:
            overlap(config_of(home, out=tmp_path / "out", **settings))
        one_line(error)
    for settings, match in (({"documents": 0}, "documents is 0"), ({"lengths": (0,)}, r"\[0\]")):
        with pytest.raises(ValueError, match=match):
            config_of(home, **settings)
