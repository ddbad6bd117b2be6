"""Sequences from documents: what each is made of, and exact budgets, whoever does the work."""

import dataclasses
import itertools
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.datasets import splits_by_jobs, write_documents
from support.refusals import one_line

from cepe_jax.data.records import Records, read_index
from cepe_jax.data.sampling import SampleConfig, apportion, packs, quotas, sample, supply, windows

# Of each shard, the documents' lengths by domain. 8 and 9 tokens: at and above the length of most tests.
SHARDS = [
    {"a": [8, 3, 30, 9, 1], "b": [5, 5, 5, 17]},
    {"a": [2, 41, 16], "b": []},
    {"a": [], "b": [64], "c": [7]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "data", SHARDS)


@pytest.fixture(scope="module")
def documents(data) -> dict[str, tuple[str, list[int]]]:
    return {r["name"]: (r["domain"], r["tokens"].tolist()) for r in Records(data, "train")}


@pytest.fixture
def config(data, tmp_path) -> SampleConfig:
    return SampleConfig(data=data, out=tmp_path / "out", kind="filtered", length=8, workers=1)


def sampled(config: SampleConfig) -> list[tuple[str, list[str], list[int]]]:
    """(domain, pieces, tokens) of each sequence."""
    sample(config)
    return [(r["domain"], r["name"].split("\n"), r["tokens"].tolist()) for r in Records(config.out, "train")]


def every_window(documents, length: int, stride: int) -> list[tuple]:
    """Written out once more: a document has a window at each multiple of the stride at which one fits."""
    found = []
    for name, (domain, tokens) in documents.items():
        for start in range(0, len(tokens), stride):
            if start + length <= len(tokens):
                found.append((domain, [f"{name}@{start}"], tokens[start : start + length + 1]))
    return found


@pytest.mark.parametrize("stride", [0, 8, 3, 11, 100])
def test_filtered_sequences_are_windows_of_documents(config, documents, stride):
    found = sampled(dataclasses.replace(config, stride=stride))
    assert sorted(found) == sorted(every_window(documents, 8, stride or 8))
    assert Counter(len(tokens) for _, _, tokens in found).keys() == {8, 9}
    assert [tokens for _, pieces, tokens in found if documents[pieces[0].rpartition("@")[0]][1] == tokens] == [
        tokens for _, tokens in documents.values() if len(tokens) in (8, 9)
    ]


def piece_lengths(pieces: list[str], tokens: list[int], documents) -> list[int]:
    """How many tokens each piece has: to where the next begins, by that one's first token."""
    firsts = [documents[name][1][int(start)] for name, _, start in (piece.rpartition("@") for piece in pieces)]
    places = [tokens.index(first) for first in firsts]
    return [end - start for start, end in itertools.pairwise([*places, len(tokens)])]


def check_packed(found, documents, length: int) -> Counter:
    """Of what sequences consist; gives the tokens."""
    used = Counter()
    for domain, pieces, tokens in found:
        assert len(tokens) == length + 1
        expected, lengths = [], piece_lengths(pieces, tokens, documents)
        for number, piece in enumerate(pieces):
            name, _, start = piece.rpartition("@")
            of, document = documents[name]
            assert of == domain
            end = int(start) + lengths[number]
            expected += document[int(start) : end]
            stretch = length + 1
            assert 0 < lengths[number] <= stretch
            whole = end == len(document) or end % stretch == 0  # it goes on to the end of its document or stretch
            assert whole or number == len(pieces) - 1
        assert expected == tokens
        used.update(tokens)
    return used


@pytest.mark.parametrize("length", [3, 8, 20])
def test_packed_sequences_use_every_token_once(config, documents, length):
    found = sampled(dataclasses.replace(config, kind="packed", length=length))
    used = check_packed(found, documents, length)
    assert set(used.values()) == {1}
    expected = {"a": 0, "b": 0, "c": 0}
    for shard in SHARDS:
        for domain, lengths in shard.items():
            expected[domain] += sum(lengths) // (length + 1)
    counts = Counter(domain for domain, _, _ in found)
    assert counts == Counter(expected)
    by_domain = {d: {t for domain, _, tokens in found if domain == d for t in tokens} for d in expected}
    for domain, count in expected.items():
        assert len(by_domain[domain]) == count * (length + 1)
    assert max(len(pieces) for _, pieces, _ in found) >= 3


def test_the_pieces_of_a_long_document_are_spread(config, documents):
    """Pieces of one document are far apart in random order, not one after another."""
    found = sampled(dataclasses.replace(config, kind="packed", length=3, budget={"b": 0}))
    starts = [
        int(start)
        for _, pieces, _ in found
        for name, _, start in (piece.rpartition("@") for piece in pieces)
        if len(documents[name][1]) == 64
    ]
    assert starts != sorted(starts)
    assert set(starts) <= set(range(64))


def test_packs_by_hand():
    """Three documents of 5, 4 and 3 tokens, sequences of 4 + 1: two, with 2 tokens left over."""

    class Ordered:
        def permutation(self, count):
            return np.arange(count)

    config = SampleConfig(data=Path("d"), out=Path("o"), kind="packed", length=4)
    found = list(packs(np.array([5, 4, 3]), config, Ordered()))
    assert found == [[(0, 0, 5)], [(1, 0, 4), (2, 0, 1)]]
    config = dataclasses.replace(config, length=3)
    # Pieces: 0 [0,4), 0 [4,5), 1 [0,4), 2 [0,3). What is cut off 1 comes again at the end.
    assert list(packs(np.array([5, 4, 3]), config, Ordered())) == [
        [(0, 0, 4)],
        [(0, 4, 5), (1, 0, 3)],
        [(2, 0, 3), (1, 3, 4)],
    ]


@pytest.mark.parametrize("kind", ["filtered", "packed"])
def test_supply_is_what_there_is(kind):
    rng = np.random.default_rng(0)
    for length, stride in itertools.product((1, 2, 5, 9), (0, 1, 4, 7)):
        stride = stride if kind == "filtered" else 0
        config = SampleConfig(data=Path("d"), out=Path("o"), kind=kind, length=length, stride=stride)
        for lengths in (np.zeros(0, int), np.array([1]), rng.integers(1, 30, 12), np.arange(1, 12)):
            made = windows(lengths, config) if kind == "filtered" else packs(lengths, config, rng)
            assert supply(lengths, config) == len(list(made))


@pytest.mark.parametrize("kind", ["filtered", "packed"])
def test_budgets_are_exact_to_the_sequence(config, documents, kind, tmp_path):
    everything = Counter(d for d, _, _ in sampled(dataclasses.replace(config, kind=kind, out=tmp_path / "all")))
    for number, budget in enumerate(({"a": 8, "b": 0}, {"a": 47, "b": 48}, {"b": 24, "a": 8 * everything["a"]})):
        given = dataclasses.replace(config, kind=kind, budget=budget, out=tmp_path / str(number))
        found = sampled(given)
        counts = {domain: tokens // 8 or everything[domain] for domain, tokens in budget.items()}
        assert Counter(domain for domain, _, _ in found) == counts
        facts = read_index(given.out)["splits"]["train"]
        assert {d: (c["records"], c["tokens"]) for d, c in facts["domains"].items()} == {
            d: (count, 8 * count) for d, count in counts.items()
        }
        if kind == "packed":
            assert set(check_packed(found, documents, 8).values()) == {1}
        else:
            assert len({name for _, (name,), _ in found}) == len(found)
            assert all(sequence in every_window(documents, 8, 8) for sequence in found)


def test_counts_of_pieces(config, documents):
    """The histogram is of the pieces' lengths, the tokens are those that a sequence trains on."""
    packed = dataclasses.replace(config, kind="packed", budget={"b": 0})
    found = sampled(packed)
    counts = read_index(packed.out)["splits"]["train"]["domains"]["b"]
    lengths = [n for _, pieces, tokens in found for n in piece_lengths(pieces, tokens, documents)]
    assert counts["histogram"] == [0, *(sum(2 ** (b - 1) <= n < 2**b for n in lengths) for b in range(1, 5))]
    assert counts["tokens"] == 8 * len(found)


def test_every_shard_gives_its_share(config, data):
    """As its supply is to the others', so that what is taken is a sample of the whole."""
    records = Records(data, "train")
    supplies = {"a": [1 + 3 + 1, 5 + 2, 0], "b": [2, 0, 8]}
    assert quotas(records, dataclasses.replace(config, budget={"a": 0, "b": 0})) == [
        {"a": 5, "b": 2},
        {"a": 7, "b": 0},
        {"a": 0, "b": 8},
    ]
    given = dataclasses.replace(config, budget={"a": 8 * 6, "b": 8 * 5})
    for domain, budget in given.budget.items():
        shares = apportion(budget // 8, supplies[domain])
        assert [shard[domain] for shard in quotas(records, given)] == shares
    assert quotas(records, given) == [{"a": 3, "b": 1}, {"a": 3, "b": 0}, {"a": 0, "b": 4}]  # 2.5 : 3.5, 1 : 4
    assert "c" not in quotas(records, config)[2]  # its document is too short for any


def test_apportion_is_by_largest_remainder():
    rng = np.random.default_rng(0)
    cases = [(0, [0]), (0, [3, 4]), (7, [3, 4]), (1, [1, 1, 1]), (2, [1, 1, 1]), (10**15, [10**15, 3, 10**15])]
    for _ in range(300):
        supplies = rng.integers(0, 9, rng.integers(1, 7)).tolist()
        cases.append((int(rng.integers(0, sum(supplies) + 1)), supplies))
    for total, supplies in cases:
        if not sum(supplies):
            continue
        shares = apportion(total, supplies)
        exact = [Fraction(total * one, sum(supplies)) for one in supplies]
        assert sum(shares) == total
        assert all(0 <= share <= one for share, one in zip(shares, supplies, strict=True))
        assert all(share - whole in (0, 1) for share, whole in zip(shares, map(int, exact), strict=True))
        up = [e - int(e) for e, share in zip(exact, shares, strict=True) if share > int(e)]
        down = [e - int(e) for e, share in zip(exact, shares, strict=True) if share == int(e)]
        assert not up or not down or min(up) >= max(down)


@pytest.mark.parametrize("kind", ["filtered", "packed"])
def test_the_same_whoever_works(config, kind, tmp_path):
    """One job, jobs in any order, with the domains in another order: the same bytes. Another seed differs."""
    budget = {"a": 48, "b": 40}
    config = dataclasses.replace(config, kind=kind, budget=budget)
    sample(config)
    index = read_index(config.out)["splits"]

    def again(name: str, *shards: str, **changes) -> dict:
        return splits_by_jobs(dataclasses.replace(config, out=tmp_path / name, **changes), *shards)

    assert again("again", "0/1") == index
    assert again("order", "0/1", budget=dict(reversed(budget.items()))) == index
    assert again("forward", "0/2", "1/2") == index
    assert again("backward", "2/3", "1/3", "0/3") == index
    other = again("other", "0/1", seed=1)
    assert other["train"]["tokens"] == index["train"]["tokens"]
    assert other != index


def test_shards_are_sampled_independently(config, tmp_path):
    """Two of the same lengths do not give the same windows."""
    data = write_documents(tmp_path / "data", [{"a": [400]}] * 2)
    starts = {"a/0@0.txt": set(), "a/1@0.txt": set()}
    for _, (piece,), _ in sampled(dataclasses.replace(config, data=data, budget={"a": 8 * 50})):
        name, _, start = piece.rpartition("@")
        starts[name].add(int(start))
    first, second = starts.values()
    assert len(first) == len(second) == 25
    assert first != second


def test_processes_give_the_same(config, tmp_path):
    config = dataclasses.replace(config, kind="packed")
    sample(config)
    sample(dataclasses.replace(config, out=tmp_path / "two", workers=2))
    assert read_index(tmp_path / "two") == read_index(config.out)


def test_tfds_reads_sequences(config, data):
    found = sampled(dataclasses.replace(config, kind="packed"))
    source = tfds.builder_from_directory(config.out).as_data_source("train")
    assert [source[n]["tokens"].tolist() for n in range(len(source))] == [tokens for _, _, tokens in found]
    assert source[0]["tokens"].dtype == np.uint16
    records = Records(config.out, "train")
    assert (records.name, records.index["length"]) == ("packed", 8)
    assert records.tokenizer.fingerprint() == Records(data, "train").tokenizer.fingerprint()


def test_a_finished_dataset_is_left_alone(config, caplog):
    sample(config)
    times = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    sample(config)
    assert re.match(f"{config.out} is finished", caplog.messages[-1])
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == times


@pytest.mark.parametrize(
    "change", [{"length": 9}, {"seed": 1}, {"budget": {"a": 8}}, {"stride": 2}, {"kind": "packed"}]
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(config, change, finished):
    sample(config if finished else dataclasses.replace(config, shard="0/2"))
    (name,) = change
    with pytest.raises(ValueError, match=f"another run, {name} "):
        sample(dataclasses.replace(config, **change))


def test_other_documents_are_refused(config, tmp_path):
    sample(dataclasses.replace(config, shard="0/2"))
    other = write_documents(tmp_path / "other", [SHARDS[0], SHARDS[2], SHARDS[1]])
    with pytest.raises(ValueError, match="another run, data "):
        sample(dataclasses.replace(config, data=other))


REFUSED = {
    r"budget .*\bd: .*data are a, b, c$": {"budget": {"d": 80}},
    "budget of a .* 104 .* filtered .* 96: ": {"budget": {"a": 104}},
    "budget of a .* 113 .* packed .* 88: ": {"budget": {"a": 113}, "kind": "packed"},
    "budget of c .* 8 .* filtered .* 0: ": {"budget": {"c": 8}},
    "filtered .* 65 tokens.*--length": {"length": 65},
    "packed .* 112 tokens.*--length": {"length": 112, "kind": "packed"},
    "no filtered .* 8 tokens": {"budget": {"c": 0}},
    "split test: .*train": {"split": "test"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_sampled(config, said):
    with pytest.raises(ValueError, match=said) as error:
        sample(dataclasses.replace(config, **REFUSED[said]))
    one_line(error)
    assert not config.out.exists()


def test_sequences_are_not_sampled_from_sequences(config, tmp_path):
    sample(config)
    with pytest.raises(ValueError, match="holds filtered .*documents"):
        sample(dataclasses.replace(config, data=config.out, out=tmp_path / "more"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"length": 0}, "length is 0"),
        ({"stride": -1}, "stride is -1"),
        ({"stride": 2, "kind": "packed"}, "stride is 2: .*filtered"),
        ({"budget": {"a": 7}}, "budget of a is 7: .* 8 tokens"),
        ({"budget": {"a": -8}}, "budget of a is -8"),
    ],
)
def test_wrong_settings(config, wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **wrong)
