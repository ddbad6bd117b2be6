"""Whole documents one after another: nothing lost, exact shares of long ones, and a separator that is no token."""

import dataclasses
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from support.datasets import splits_by_jobs, write_documents
from support.refusals import one_line
from support.tokenizers import LLAMA_3_TOKENS, as_llama_2, byte_level

from cepe_jax.data.concatenation import Stream, separator_ids
from cepe_jax.data.records import Records, read_index
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.tokenizer import Tokenizer

LENGTH = 16
# In tokens, BOS and EOS included: some fit a sequence, and some go on over several.
SHARDS = [
    {"a": [3, 9, 40, 5, 70, 12, 33, 8, 6, 7], "b": [100, 4, 4, 5, 36]},
    {"a": [50, 4, 6, 35], "b": [20]},
    {"b": [64, 3, 34, 9, 90]},
]
SHARES = {0: 0.15, 8: 0.25, 32: 0.6}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "data", SHARDS, ends=True)


@pytest.fixture(scope="module")
def documents(data) -> dict[int, tuple[str, list[int]]]:
    """The domain and the tokens of each document by its first token after BOS, which no other has."""
    return {int(r["tokens"][1]): (r["domain"], r["tokens"].tolist()) for r in Records(data, "train")}


@pytest.fixture
def config(data, tmp_path) -> SampleConfig:
    return SampleConfig(data=data, out=tmp_path / "out", kind="concatenated", length=LENGTH, separator="|#|", workers=1)


def all_of(*values: str) -> str:
    """Return the pattern of a message that holds all of these values."""
    return "".join(f"(?=.*{re.escape(value)})" for value in values)


def separator_of(config: SampleConfig) -> list[int]:
    return Tokenizer(config.data).encode(config.separator)


def bucket_of(length: int) -> int:
    return max(low for low in SHARES if low <= length)


def runs(config: SampleConfig, documents, bucket=lambda length: 0) -> dict[tuple[str, int], list[int]]:
    """Return the tokens of all sequences by domain and bucket, one sequence after another."""
    sample(config)
    by_first = {token: length for first, (_, tokens) in documents.items() for token in tokens[1:-1]
                for length in [len(tokens)]}  # fmt: skip
    joined: dict[tuple[str, int], list[int]] = {}
    for record in Records(config.out, "train"):
        tokens = record["tokens"].tolist()
        assert len(tokens) == LENGTH + 1
        buckets = {bucket(by_first[token]) for token in tokens if token in by_first}
        assert len(buckets) == 1
        joined.setdefault((record["domain"], buckets.pop()), []).extend(tokens)
    return joined


def read(tokens: list[int], documents, separator: list[int]) -> list[int]:
    """Return the first tokens of the documents of which this text consists; the last one may be cut.

    Every document is whole, and after each but the last there is the separator: nothing else stands anywhere.
    """
    firsts, at = [], 0
    while at < len(tokens):
        first = tokens[at]
        body = documents[first][1][1:-1] + separator if separator else documents[first][1]
        assert tokens[at : at + len(body)] == body[: len(tokens) - at]
        firsts.append(first)
        at += len(body)
    return firsts


def test_documents_come_whole_with_separators(config, documents):
    """All tokens of a domain are there, in one order, each document once, but for an end that fills no sequence."""
    separator = separator_of(config)
    assert len(separator) == 3
    joined = runs(config, documents)
    for domain in "ab":
        firsts = read(joined[domain, 0], documents, separator)
        own = {first: len(tokens) + 1 for first, (of, tokens) in documents.items() if of == domain}
        assert len(set(firsts)) == len(firsts)
        assert set(firsts) <= set(own)
        total = sum(own.values())
        assert len(joined[domain, 0]) == total // (LENGTH + 1) * (LENGTH + 1)
        lost = [own[first] for first in set(own) - set(firsts)]
        assert sum(lost) <= total - len(joined[domain, 0]) < LENGTH + 1


def test_without_a_separator_documents_keep_their_ends(config, documents):
    config = dataclasses.replace(config, separator="")
    sample(config)
    tokenizer = Tokenizer(config.data)
    by_second = {tokens[1]: tokens for _, tokens in documents.values()}
    text = [int(t) for r in Records(config.out, "train") if r["domain"] == "b" for t in r["tokens"]]
    at, seen = 0, 0
    while at < len(text) - 1:
        body = by_second[text[at + 1]]
        assert (body[0], body[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert text[at : at + len(body)] == body[: len(text) - at]
        at, seen = at + len(body), seen + 1
    assert seen >= 10


def largest_remainder(total: int, shares: dict[int, float]) -> dict[int, int]:
    exact = {low: total * Fraction(str(share)) for low, share in shares.items()}
    counts = {low: int(value) for low, value in exact.items()}
    for low in sorted(exact, key=lambda low: (-(exact[low] - counts[low]), low))[: total - sum(counts.values())]:
        counts[low] += 1
    return counts


@pytest.mark.parametrize("budget", [{}, {"a": 40 * LENGTH, "b": 333 * LENGTH}])
def test_shares_are_exact_to_the_sequence(config, documents, budget):
    """In each domain, whose number is the budget's; documents of a bucket come equally often, up to one."""
    config = dataclasses.replace(config, shares=SHARES, budget=budget)
    separator = separator_of(config)
    joined = runs(config, documents, bucket_of)
    for domain in "ab":
        own = {first: len(tokens) for first, (of, tokens) in documents.items() if of == domain}
        supply = sum(length + 1 for length in own.values()) // (LENGTH + 1)
        wanted = budget.get(domain, supply * LENGTH) // LENGTH
        expected = largest_remainder(wanted, SHARES)
        assert {low: len(joined[domain, low]) // (LENGTH + 1) for low in SHARES} == expected
        assert {low: len(joined[domain, low]) % (LENGTH + 1) for low in SHARES} == dict.fromkeys(SHARES, 0)
        for low in SHARES:
            times = Counter(read(joined[domain, low], documents, separator))
            every = [times[first] for first, length in own.items() if bucket_of(length) == low]
            assert max(every) - min(every) <= 1
            assert not budget or max(every) > 1


def test_shorter_documents_than_all_shares_stay_out(config, documents):
    config = dataclasses.replace(config, shares={8: 1.0})
    assert {low for _, low in runs(config, documents, lambda length: 8 * (length >= 8))} == {8}


def test_any_part_of_a_stream_is_read_alone(data):
    """What is read from one place to another is that part of the whole, over passes and shards."""
    records, added = Records(data, "train"), 1
    sizes = tuple(sum(n + added for n in shard.get("b", ()) if 4 <= n < 64) for shard in SHARDS)
    stream = Stream("b", 4, 64, (7, 1), added, sizes)

    def tokens(start: int, end: int) -> list[tuple[int, int]]:
        return [(place, at) for place, first, last in stream.pieces(records, start, end) for at in range(first, last)]

    whole = tokens(0, 3 * stream.size)
    passes = [whole[n * stream.size : (n + 1) * stream.size] for n in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]
    assert len(set(passes[0])) == stream.size
    rng = np.random.default_rng(0)
    for start, end in rng.integers(0, 3 * stream.size, (50, 2)).tolist():
        assert tokens(start, end) == whole[start:end]


def test_the_same_whoever_works(config, tmp_path):
    config = dataclasses.replace(config, shares=SHARES, budget={"a": 50 * LENGTH, "b": 60 * LENGTH})
    sample(config)
    index = read_index(config.out)["splits"]

    def again(name: str, *shards: str, **changes) -> dict:
        return splits_by_jobs(dataclasses.replace(config, out=tmp_path / name, **changes), *shards)

    assert (
        again("order", "0/1", budget=dict(reversed(config.budget.items())), shares=dict(reversed(SHARES.items())))
        == index
    )
    assert again("backward", "2/3", "1/3", "0/3") == index
    assert again("processes", "0/1", workers=2) == index
    other = again("other", "0/1", seed=1)
    assert other["train"]["tokens"] == index["train"]["tokens"]
    assert other != index


@pytest.fixture(scope="module", params=["llama 2", "llama 3"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Of one "<s>" is the token that begins texts, of the other it is text."""
    home = tmp_path_factory.mktemp("tokenizer")
    if request.param == "llama 2":
        return Tokenizer(as_llama_2(home / "tokenizer.model"))
    path = byte_level(home / "tokenizer.json", LLAMA_3_TOKENS)
    settings = {"bos_token": LLAMA_3_TOKENS[0], "eos_token": LLAMA_3_TOKENS[-1]}
    (home / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(path)


def test_a_separator_is_characters(tokenizer):
    """The paper's "<s>" and every special token's name; refused without the word that its characters are meant."""
    special = set(tokenizer.special.values())
    assert len(special) >= 2
    for separator in ("<s>", *tokenizer.special, f"a{next(iter(tokenizer.special))} \ue000"):
        if named := [name for name in tokenizer.special if name in separator]:
            values = named[0], str(tokenizer.special[named[0]]), "--separator_as_text"
            with pytest.raises(ValueError, match=all_of(*values)) as error:
                separator_ids(tokenizer, separator, as_text=False)
            one_line(error)
        else:
            assert separator_ids(tokenizer, separator, as_text=False) == tokenizer.encode(separator)
        ids = separator_ids(tokenizer, separator, as_text=True)
        assert not special & set(ids)
        assert tokenizer.decode(ids).lstrip() == separator


def test_a_separator_of_no_token_is_refused(tmp_path):
    """Of a tokenizer that takes spaces away: documents would have nothing between them."""
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words"] * 9),
            model_writer=file,
            vocab_size=16,
            model_type="bpe",
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="separator is '  '") as error:
        separator_ids(Tokenizer(tmp_path), "  ", as_text=False)
    one_line(error)


def test_sequences_hold_the_characters_of_a_special_token(config, documents):
    """As Llama 2's "<s>": refused as it is, and with the setting its id 1 is in no sequence."""
    config = dataclasses.replace(config, separator="<s>")
    with pytest.raises(ValueError, match="<s>.* 1: .*separator_as_text") as error:
        sample(config)
    one_line(error)
    assert not config.out.exists()
    config = dataclasses.replace(config, separator_as_text=True)
    separator = separator_of(config)
    assert Tokenizer(config.data).bos_id not in separator
    joined = runs(config, documents)
    assert len(read(joined["b", 0], documents, separator)) >= 10


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"shares": {0: 0.5, 128: 0.5}}, ("128", "a", "shares")),
        ({"shares": {0: 0.5, 80: 0.5}, "budget": {"a": 32}}, ("80", "a", "shares")),
        ({"budget": {"a": 10_000}}, ("10,000", "a")),
        ({"budget": {"c": 64}}, ("c", "a, b")),
        ({"length": 5000}, ("5000", "--length")),
    ],
)
def test_refusals_name_the_values(config, changes, values):
    with pytest.raises(ValueError, match=all_of(*values)) as error:
        sample(dataclasses.replace(config, **changes))
    one_line(error)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("wrong", "values"),
    [
        ({"shares": {0: 0.5, 8: 0.4}}, ("0.9", "1")),
        ({"shares": {0: 0.0, 8: 1.0}}, ("0: 0.0",)),
        ({"shares": {-1: 1.0}}, ("-1",)),
        ({"shares": {0: float("nan")}}, ("nan",)),
        ({"shares": {0: 1.0}, "kind": "packed", "separator": ""}, ("shares", "packed")),
        ({"kind": "filtered"}, ("separator", "filtered")),
        ({"separator": "", "separator_as_text": True}, ("separator_as_text", "no separator")),
        ({"stride": 4}, ("stride", "4")),
    ],
)
def test_wrong_settings(config, wrong, values):
    with pytest.raises(ValueError, match=all_of(*values)) as error:
        dataclasses.replace(config, **wrong)
    one_line(error)


def test_documents_without_ends_are_refused(config, tmp_path):
    data = write_documents(tmp_path / "data", [{"a": [30, 40]}])
    with pytest.raises(ValueError, match="a/0@[01].txt.*BOS and EOS") as error:
        sample(dataclasses.replace(config, data=data))
    one_line(error)
