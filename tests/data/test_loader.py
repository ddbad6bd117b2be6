"""Batches: pure in (seed, n) for any hosts and workers, each piece once per epoch, and what each stage shows."""

import dataclasses
import multiprocessing
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from support import datasets

from cepe_jax.data.builder import array
from cepe_jax.data.examples import IGNORE, ExampleConfig
from cepe_jax.data.loader import Sequences, batches, examples, names_in, open_mix
from cepe_jax.data.recipes import DuplicatedWindows, MaskedWindows, TaughtWindows, Windows, WindowsInContext

FAR = 4_000  # token = FAR * (its sequence + 1) + its place
LENGTH = 50
CONFIG = ExampleConfig(window=12, num_chunks=3, chunk_length=4)
RECIPES = {
    "lm": Windows,
    "mlm": MaskedWindows,
    "warmup": DuplicatedWindows,
    "cepe": WindowsInContext,
    "ceped": TaughtWindows,
}
STAGES = ["lm", "mlm", "warmup", "cepe"]
COUNTS = {"a": 10, "b": 5}


def sequence(number: int, length: int = LENGTH + 1) -> np.ndarray:
    return FAR * (number + 1) + np.arange(length)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return datasets.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def home(tokenizer, tmp_path_factory):
    """Two datasets, `a` of sequences 0 ... 9 and `b` of 10 ... 14; the last of `b` ends with its document."""
    home = tmp_path_factory.mktemp("data")
    datasets.write_sequences(home / "a", [sequence(i) for i in range(10)], LENGTH, tokenizer)
    last = [sequence(i) for i in range(10, 14)] + [sequence(14, LENGTH)]
    datasets.write_sequences(home / "b", last, LENGTH, tokenizer, shards=3)
    return home


def mixture(home, stage: str, seed: int = 0, mix=None, **changes):
    mix = {"a": 2.0, "b": 1.0} if mix is None else mix
    recipe = RECIPES[stage](dataclasses.replace(CONFIG, **changes))
    return examples(open_mix(home, mix, recipe), list(mix.values()) or [1.0], recipe, seed)


def take(data, count: int, batch: int = 4, **options) -> list[dict]:
    return list(islice(batches(data, batch, **options), count))


def rows(data, count: int) -> list[dict]:
    return [data[i] for i in range(count)]


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_is_a_function_of_seed_and_number(home, stage):
    whole = take(mixture(home, stage), 20)
    assert same(whole, take(mixture(home, stage), 20))
    rebuilt = rows(mixture(home, stage), 80)
    assert same(
        whole, [{name: np.stack([r[name] for r in rebuilt[i : i + 4]]) for name in rebuilt[0]} for i in range(0, 80, 4)]
    )
    other = take(mixture(home, stage, seed=1), 20)
    assert not any(same([x], [y]) for x, y in zip(whole, other, strict=True))


def test_the_sequences_of_a_batch_have_names(home):
    """Dataset and name of each row of batch n; a token says which sequence it is of."""
    mix = {"a": 2.0, "b": 1.0}
    sources = open_mix(home, mix, Windows(CONFIG))
    batch = take(mixture(home, "lm"), 6)[5]
    owners = [int(row[0]) // FAR - 1 for row in batch["tokens"]]
    names = [f"a/{owner}@0" if owner < 10 else f"b/{owner - 10}@0" for owner in owners]
    assert names_in(sources, list(mix.values()), seed=0, batch_size=4, number=5) == names
    assert len({name[0] for name in names}) == 2


def test_a_mixture_by_size_is_exact_in_each_pass(home):
    """Each of the 50 + 25 windows as often as its part's weight says, pass for pass, in another order; names agree."""
    mix, recipe, each = {"a": 1.0, "b": 2.0}, Windows(CONFIG), LENGTH // CONFIG.window
    windows = {(n, part * CONFIG.window) for n in range(15) for part in range(each)}
    sources, weights = open_mix(home, mix, recipe), list(mix.values())
    data, size = examples(sources, weights, recipe, 0, by_size=True), each * (10 + 2 * 5)
    orders = [[place(data[i]) for i in range(first, first + size)] for first in (0, size, 2 * size)]
    for order in orders:
        assert Counter(order) == {window: 1 if window[0] < 10 else 2 for window in windows}
    assert orders[0] != orders[1] != orders[2]
    assert len({n < 10 for n, _ in orders[0][: size // 2]}) == 2  # one after the other they would be apart
    batch = take(data, 6)[5]
    owners = [int(row[0]) // FAR - 1 for row in batch["tokens"]]
    names = [f"a/{owner}@0" if owner < 10 else f"b/{owner - 10}@0" for owner in owners]
    assert names_in(sources, weights, seed=0, batch_size=4, number=5, by_size=True) == names
    assert same(take(data, 9)[4:], take(data, 5, first=4))


@pytest.mark.parametrize("stage", ["lm", "cepe"])
def test_hosts_share_the_global_batch(home, stage):
    """Hosts with any rows of the global batches see those rows of them, from any batch on, and nothing else."""
    data = mixture(home, stage)
    whole = take(data, 6, batch=8)
    for held in ([0, 1, 2, 3], [4, 5, 6, 7], [6, 7], [7], [0, 1, 4, 5], [2, 3, 6, 7], [1, 4, 6]):
        wanted = [{name: batch[name][held] for name in batch} for batch in whole]
        assert same(wanted, take(data, 6, batch=8, rows=held))
        assert same(wanted[2:], take(data, 4, batch=8, rows=held, first=2))


def test_a_batch_of_one(home):
    """Also of a single dataset, which then has as many batches as an integer of Grain's can count."""
    data = mixture(home, "cepe", mix={"a": 1.0})
    (pair,) = take(data, 1, batch=2)
    wanted = [{name: array[[row]] for name, array in pair.items()} for row in range(2)]
    assert same(wanted, take(data, 2, batch=1))


@pytest.mark.parametrize("first", range(9))
def test_resuming_repeats_and_skips_nothing(home, first):
    data = mixture(home, "cepe")
    assert same(take(data, 9)[first:], take(data, 9 - first, first=first))
    assert same(take(data, 9, rows=[1, 3])[first:], take(data, 9 - first, first=first, rows=[1, 3]))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(home, workers):
    """Whole batches, from any step on, in their order; a loader that is closed leaves no process behind.

    6 CPU-seconds for real processes of Grain.
    """
    data = mixture(home, "cepe")
    loading = batches(data, 4, first=2, workers=workers, rows=[1, 3])
    found = list(islice(loading, 7))
    assert len(multiprocessing.active_children()) >= workers
    loading.close()
    assert not multiprocessing.active_children()
    assert same(found, take(data, 7, first=2, rows=[1, 3]))


def place(example: dict) -> tuple[int, int]:
    """(sequence, first place) that an example's window has."""
    return int(example["tokens"][0]) // FAR - 1, int(example["tokens"][0]) % FAR


def drawn(home, stage: str, epochs: int = 3, **changes) -> dict[str, list[tuple[int, int]]]:
    """The places drawn from each dataset, for so many of `a`'s epochs at weights 2 : 1."""
    per = {"lm": 4, "mlm": 4, "warmup": 4, "cepe": 2}[stage]
    places = [place(e) for e in rows(mixture(home, stage, mlm_rate=0.0, **changes), 15 * per * epochs)]
    return {"a": [p for p in places if p[0] < 10], "b": [p for p in places if p[0] >= 10]}


@pytest.mark.parametrize("stage", STAGES)
def test_each_piece_comes_once_before_any_comes_again(home, stage):
    size = 24 if stage == "cepe" else 12
    start = 12 if stage == "cepe" else 0  # the window stands after the context
    for name, places in drawn(home, stage).items():
        first = 10 * (name == "b")
        pieces = [
            (i, j) for i in range(first, first + COUNTS[name]) for j in range(start, LENGTH - size + start + 1, size)
        ]
        epochs = [places[n : n + len(pieces)] for n in range(0, len(places), len(pieces))]
        assert len(epochs) == 3
        for epoch in epochs:
            assert Counter(epoch) == Counter(pieces)
        assert pieces != epochs[0] != epochs[1] != epochs[2]


def test_the_weights_are_the_shares(home):
    """2 : 1 and 1 : 4, all along, whatever the sizes; one dataset by itself needs no weight."""
    for mix, share in (({"a": 2, "b": 1}, 2 / 3), ({"a": 1, "b": 4}, 1 / 5)):
        from_a = np.cumsum([place(e)[0] < 10 for e in rows(mixture(home, "cepe", mix=mix), 300)])
        assert np.abs(from_a - share * np.arange(1, 301)).max() <= 1
    assert {place(e)[0] for e in rows(mixture(home / "b", "lm", mix={}), 20)} == set(range(10, 15))


def test_lm(home):
    for example in rows(mixture(home, "lm"), 60):
        number, start = place(example)
        assert example["tokens"].tolist() == sequence(number)[start : start + 12].tolist()
        assert example["labels"].tolist() == sequence(number)[start + 1 : start + 13].tolist()
        assert example.keys() == {"tokens", "labels"}


def test_mlm(home, tokenizer):
    for example in rows(mixture(home, "mlm"), 60):
        masked = example["tokens"] == tokenizer.mask_id
        np.testing.assert_array_equal(masked, example["labels"] != IGNORE)
        read = np.where(masked, example["labels"], example["tokens"])
        assert (np.diff(read) == 1).all()


def test_warmup(home):
    """The encoder reads what the decoder reads, unmasked."""
    for example in rows(mixture(home, "warmup"), 60):
        np.testing.assert_array_equal(example["context"].ravel(), example["tokens"])
        assert example["context_mask"].all()


def test_cepe_reads_what_stands_before_the_window(home):
    ends = 0
    for example in rows(mixture(home, "cepe", chunk_mask_rate=0.0), 60):
        number, start = place(example)
        assert example["context"].ravel().tolist() == sequence(number)[start - 12 : start].tolist()
        assert example["context_mask"].all()
        assert example["tokens"].tolist() == sequence(number)[start : start + 12].tolist()
        following = sequence(number)[start + 1 : start + 13].tolist()
        assert example["labels"].tolist() == following
        ends += start == 36
    assert ends


def test_a_document_that_ends_with_its_sequence_has_no_last_label(home):
    config = {"num_chunks": 1, "chunk_length": 38}
    labels = [e["labels"] for e in rows(mixture(home, "cepe", mix={"b": 1}, **config), 5) if place(e)[0] == 14]
    assert [row[-1] for row in labels] == [IGNORE]
    assert (labels[0][:-1] == sequence(14)[39:50]).all()


def test_foreign_contexts(home):
    """A share of the windows read what stands before another window, of any dataset; the window is the same."""

    def contexts(rate: float) -> list[tuple[tuple[int, int], int, list[int]]]:
        drawn = rows(mixture(home, "cepe", foreign_rate=rate, chunk_mask_rate=0.0), 400)
        return [(place(e), int(e["context"][0, 0]) // FAR - 1, e["context"].ravel().tolist()) for e in drawn]

    for (number, start), of, context in contexts(0.0):
        assert (of, context) == (number, sequence(number)[start - 12 : start].tolist())
    mixed = contexts(0.8)
    assert [window for window, *_ in mixed] == [window for window, *_ in contexts(0.0)]
    own = np.mean([of == number for (number, _), of, _ in mixed])
    assert abs(own - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / 400)  # a foreign context is never of the window's document
    assert {of for _, of, _ in mixed} == set(range(15))
    starts = {i * FAR + FAR + j for i in range(15) for j in (0, 24)}
    assert all(context[0] in starts and (np.diff(context) == 1).all() for *_, context in mixed)


def test_cepe_masks_chunks(home):
    """6 CPU-seconds: as many examples as tell the rates from their neighbours."""

    def touched(**changes) -> float:
        return np.mean([~e["context_mask"].all(axis=1) for e in rows(mixture(home, "cepe", **changes), 800)])

    assert touched(chunk_mask_rate=0.0) == 0
    assert touched(chunk_mask_rate=1.0) == 1
    assert abs(touched() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 2400)


# What is joined to sequences


RETRIEVED = {
    "passages": array(np.uint16, None, 4),
    "lengths": array(np.int32, None),
    "scores": array(np.float32, None),
}
TAUGHT = {"teacher_index": array(np.uint16, None, 2), "teacher_prob": array(np.float16, None, 3)}


def passages_of(number: int) -> dict:
    """Two passages, whose tokens say for which sequence they were retrieved; the second one is short."""
    tokens = 1000 * (number + 1) + np.arange(8).reshape(2, 4)
    return {"passages": tokens, "lengths": np.array([4, 3]), "scores": np.array([2.0, 1.0], np.float32)}


def teacher_of(number: int) -> dict:
    index = np.full((12, 2), number) + np.arange(2)
    return {"teacher_index": index, "teacher_prob": np.full((12, 3), [0.5, 0.25, 0.25], np.float16)}


@pytest.fixture(scope="module")
def joined(home, tokenizer):
    facts = {"joins": datasets.joins(home / "a"), "query_tokens": 5, "passage_length": 4}
    shards = [[passages_of(i) for i in range(7)], [passages_of(i) for i in range(7, 10)]]
    datasets.write(home / "retrieved", "retrieved", RETRIEVED, shards, tokenizer, **facts)
    taught = [[teacher_of(i) for i in range(10)]]
    facts = {"joins": datasets.joins(home / "a"), "window": 12, "context": 12}
    datasets.write(home / "teacher", "teacher", TAUGHT, taught, tokenizer, **facts)
    return home


def test_passages_are_joined_by_index(joined):
    seen = set()
    for example in rows(mixture(joined, "cepe", mix={"retrieved": 1}, chunk_mask_rate=0.0), 10):
        number, start = place(example)
        assert start == 0
        assert example["context"][0].tolist() == passages_of(number)["passages"][0].tolist()
        assert example["labels"].tolist() == [IGNORE] * 4 + sequence(number)[5:13].tolist()
        seen.add(number)
    assert seen == set(range(10))


def test_passages_that_leave_nothing_to_learn_or_do_not_fit(joined):
    """Every label would be inside the query; a passage would be longer than a chunk."""
    with pytest.raises(ValueError, match=" 5 tokens.*window has 4: .*--query_tokens"):
        mixture(joined, "cepe", mix={"retrieved": 1}, window=4)
    with pytest.raises(ValueError, match=" 4 tokens, chunk_length is 3"):
        mixture(joined, "cepe", mix={"retrieved": 1}, chunk_length=3)


@pytest.mark.parametrize(
    ("stage", "dataset"),
    [("lm", "retrieved"), ("mlm", "teacher"), ("warmup", "teacher"), ("cepe", "teacher"), ("ceped", "retrieved")],
)
def test_a_stage_refuses_data_that_it_would_not_read(joined, stage, dataset):
    with pytest.raises(ValueError, match=f"/{dataset} holds {dataset} .*/a"):
        mixture(joined, stage, mix={dataset: 1})


def test_a_warm_up_reads_what_its_window_holds():
    with pytest.raises(ValueError, match=" 12 .* 3 chunks x 5"):
        DuplicatedWindows(dataclasses.replace(CONFIG, chunk_length=5))


def test_joined_records_go_through_processes(joined):
    data = mixture(joined, "cepe", mix={"retrieved": 1, "b": 1})
    assert same(take(data, 3, workers=1), take(data, 3))


def test_a_foreign_context_needs_another_document(home, tokenizer, tmp_path):
    datasets.write_sequences(tmp_path / "one", [sequence(0)], LENGTH, tokenizer, shards=1)
    with pytest.raises(ValueError, match="foreign_rate .*several documents"):
        rows(mixture(tmp_path, "cepe", mix={"one": 1}, foreign_rate=1.0), 1)


def test_passages_mix_with_what_stands_before(joined):
    """The examples of all datasets have the same fields."""
    for batch in take(mixture(joined, "cepe", mix={"a": 1, "retrieved": 1}), 5):
        assert batch.keys() == {"tokens", "labels", "context", "context_mask"}
        assert batch["context"].shape == (4, 3, 4)


def test_distillation_sees_the_main_stages_examples(home):
    assert same(rows(mixture(home, "ceped"), 20), rows(mixture(home, "cepe"), 20))


def test_a_teacher_is_joined_by_index(joined):
    for example in rows(mixture(joined, "ceped", mix={"teacher": 1}), 10):
        number, start = place(example)
        assert start == 12
        np.testing.assert_array_equal(example["teacher_index"], teacher_of(number)["teacher_index"])
        assert example["teacher_prob"].dtype == np.float16


def test_datasets_that_do_not_join(joined, tokenizer, tmp_path):
    """The base has other records, or more of them; or the teacher's are not of the window's length."""
    for name, others in (("other", range(5, 15)), ("more", range(11))):
        datasets.write_sequences(tmp_path / name, [sequence(i) for i in others], LENGTH, tokenizer)
        facts = {"joins": datasets.joins(joined / "a") | {"path": f"../{name}"}}
        path = datasets.write(
            tmp_path / f"teacher_of_{name}", "teacher", TAUGHT, [[teacher_of(0)] * 10], tokenizer, **facts
        )
        with pytest.raises(ValueError, match=f"teacher_of_{name} .*join .*/{name}: .* 10 records .* {len(others)} "):
            Sequences(path, TaughtWindows(CONFIG))
    with pytest.raises(ValueError, match="teacher's window has 12 .* 10: "):
        mixture(joined, "ceped", mix={"teacher": 1}, window=10)
    with pytest.raises(ValueError, match="teacher's context has 12 .* 8: "):
        mixture(joined, "ceped", mix={"teacher": 1}, num_chunks=2)


def test_what_cannot_be_read(home, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="a: .* 50 tokens.* 54: "):
        mixture(home, "cepe", window=42)
    assert len(Sequences(home / "a", WindowsInContext(dataclasses.replace(CONFIG, window=38)))) == 10
    record = {"tokens": sequence(0), "name": "0", "domain": "d"}
    documents = datasets.write(tmp_path / "docs", "documents", datasets.SEQUENCE, [[record]], tokenizer)
    with pytest.raises(ValueError, match="docs holds documents.*sequences"):
        Sequences(documents, Windows(CONFIG))
    (tmp_path / "other").mkdir()
    other = datasets.train(["abcdefgh " * 9, "hgfedcba " * 9], 290, tmp_path / "other" / "tokenizer.model")
    datasets.write_sequences(tmp_path / "b", [sequence(0)], LENGTH, other, shards=1)
    (tmp_path / "a").symlink_to(home / "a")
    with pytest.raises(ValueError, match="a, b .*different tokenizers"):
        open_mix(tmp_path, {"a": 1, "b": 1}, Windows(CONFIG))


@pytest.mark.parametrize(
    ("below", "mix", "path", "mend"),
    [
        ("a", {"packed": 1}, "a/packed", r"a is a dataset itself, which --mix=\{\} reads"),
        ("", {"a": 1, "packed": 1}, "packed", r"\(a, b.*\).*prepare_data.py"),
        ("nowhere", {"packed": 1}, "nowhere/packed", "mix names packed .*prepare_data.py"),
        ("", {}, "", r"\(a, b.*\).*mix"),
        ("nowhere", {}, "nowhere", "no dataset: .*prepare_data.py"),
    ],
)
def test_missing_datasets_name_mix_and_mend(home, below, mix, path, mend):
    with pytest.raises(FileNotFoundError, match=mend) as refused:
        open_mix(home / below, mix, Windows(CONFIG))
    assert str(refused.value).startswith(f"{home / path}: ")
