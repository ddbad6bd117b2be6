"""Which windows and contexts a model is asked about, against documents cut again; what becomes of its answers."""

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.datasets import joins, make_tokenizer, write, write_sequences
from support.fakes import Asked

from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.data.retrieval import features_of
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.tasks import perplexity
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.evaluation.tasks.selection import reservoir_by_domain

WORDS = ["def ", "x", "\n", "    ", "``` ", "return ", "🙂"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Texts of 40 to 200 words in two folders, and the dataset of them: about half is its test split."""
    home = tmp_path_factory.mktemp("texts")
    for number in range(24):
        rng = np.random.default_rng(number)
        folder = home / "in" / f"folder{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.txt").write_text("".join(rng.choice(WORDS, rng.integers(40, 200))))
    fractions = {"test_fraction": 0.5, "retrieval_fraction": 0.0}
    prepare(PrepareConfig(input=home / "in", out=home / "documents", vocab_size=290, workers=1, **fractions))
    return home


@pytest.fixture
def config(home) -> Perplexity:
    return Perplexity(
        data=home / "documents",
        chunks=(1, 0, 4),
        window=9,
        scored=4,
        chunk_length=6,
        kinds=("previous", "other"),
    )


@pytest.fixture
def model(home) -> Asked:
    return Asked(Tokenizer(home / "documents"))


def texts_of(home: Path, split: str = "test") -> dict[str, list[int]]:
    """The ids of each text that is long enough for the longest context, 24, and a window of 9."""
    tokenizer = Tokenizer(home / "documents")
    names = sorted(document.name for document in Corpus(home / "documents", split))
    texts = {name: tokenizer.encode((home / "in" / name).read_text()) for name in names}
    return {name: ids for name, ids in texts.items() if len(ids) >= 24 + 9}


def spans(config: Perplexity, kind: str, chunks: int, model: Asked) -> list[tuple[list[int], list[list[int]]]]:
    """The window and its contexts, of each question; what is scored is the window's end."""
    model.asked.clear()
    records = list(config.measure(Point(kind, chunks), model))
    assert len(records) == len(model.asked)
    for _, continuations in model.asked:
        assert [len(row) for row in continuations] == [config.scored]
    return [([*prompt.ids, *rows[0]], [list(c) for c in prompt.contexts]) for prompt, rows in model.asked]


def starts_of(config: Perplexity, length: int) -> list[int]:
    """By trying every place."""
    places = [start for start in range(length) if start >= 24 and start + 9 <= length]
    match config.place:
        case "last":
            return places[-1:]
        case "middle":
            return [min(places, key=lambda start: (abs(2 * start - (length - 9)) > 1, start))]
        case "sliding":
            return places[:: config.stride or config.scored]


@pytest.mark.parametrize("changes", [{}, {"place": "middle"}, {"place": "sliding"}, {"place": "sliding", "stride": 7}])
def test_windows_and_contexts(config, model, home, changes):
    """A window ends what the decoder reads; its contexts end where it starts, or where that of the next document of its
    folder does, after the last the first."""
    config, texts = dataclasses.replace(config, **changes), texts_of(home)
    assert len(texts) > 4
    starts = {name: starts_of(config, len(ids)) for name, ids in texts.items()}
    windows = [ids[start : start + 9] for name, ids in texts.items() for start in starts[name]]
    others = []
    for name, own in starts.items():
        folder = [other for other in texts if other.split("/")[0] == name.split("/")[0]]
        other = folder[(folder.index(name) + 1) % len(folder)]
        others += [(texts[other], starts[other][min(n, len(starts[other]) - 1)]) for n in range(len(own))]
    owns = [(ids, start) for name, ids in texts.items() for start in starts[name]]
    for chunks in 0, 1, 4:
        for kind, ends in ("previous", owns), ("other", others):
            contexts = [[ids[end - 6 * n : end - 6 * n + 6] for n in range(chunks, 0, -1)] for ids, end in ends]
            assert sorted(spans(config, kind, chunks, model)) == sorted(zip(windows, contexts, strict=True))
    assert all(prompt.scores is None for prompt, _ in model.asked)


def test_the_middle_is_the_middle(config, model, home):
    """Where the context leaves it free: half of what is outside of the window stands on each side."""
    config = dataclasses.replace(config, chunks=(1,), place="middle")
    records = list(config.measure(Point("previous", 1), model))
    texts = texts_of(home)
    of_long = [r for r in records if r["document"] in texts]
    assert len(of_long) == len(texts)
    for record in of_long:
        start = int(record["id"].rpartition(":")[2])
        assert abs(len(texts[record["document"]]) - 9 - 2 * start) <= 1


def test_records(config, model, home):
    """Every number that is asked for has the same windows, and the nll is the mean over the scored tokens."""
    by_cell = {}
    for kind, chunks in ("none", 0), ("previous", 1), ("previous", 4), ("other", 4):
        records = list(config.measure(Point(kind, chunks), model))
        by_cell[kind, chunks] = [record["id"] for record in records]
        for record, (prompt, (row,)) in zip(records, model.asked[-len(records) :], strict=True):
            np.testing.assert_allclose(record["nll"], np.mean((1 + np.array(row) % 7) / 4) - 0.125 * chunks, rtol=1e-6)
            assert (record["scored"], record["read"]) == (4, 9 + 6 * chunks)
            assert record["seconds"] > 0
            assert record["domain"] == record["document"].split("/")[0]
            assert record["id"] == f"{record['document']}:{len(texts_of(home)[record['document']]) - 9}"
            assert len(prompt.ids) == 5
    assert len({tuple(ids) for ids in by_cell.values()}) == 1
    assert len(set(by_cell["none", 0])) == len(by_cell["none", 0])


def test_raw_documents_are_those_of_the_dataset(config, model, home, tmp_path):
    """From one file, from lines, packed or not, or from files in folders: the texts, and so the questions, are one."""
    texts = texts_of(home)
    asked = {kind: sorted(spans(config, kind, 4, model)) for kind in ("previous", "other")}
    for name in texts:
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((home / "in" / name).read_text())
    (tmp_path / "files" / "folder0" / "empty.txt").write_text(" \n")
    lines = [json.dumps({"text": (home / "in" / name).read_text()}) for name in texts]
    short = json.dumps({"text": "x"})
    (tmp_path / "[1].jsonl").write_text("\n".join([*lines, short]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([short, *lines]).encode()))
    for data in "files", "[1].jsonl", "b.jsonl.gz":
        raw = dataclasses.replace(config, data=tmp_path / data)
        assert sorted(spans(raw, "previous", 4, model)) == asked["previous"]
    files = dataclasses.replace(config, data=tmp_path / "files")
    assert sorted(spans(files, "other", 4, model)) == asked["other"]
    records = list(files.measure(Point("previous", 1), model))
    assert [record["id"] for record in records] == [
        record["id"] for record in config.measure(Point("previous", 1), model)
    ]
    assert {record["domain"] for record in records} == {"folder0", "folder1"}


@pytest.mark.parametrize("data", ["documents", "in"])
def test_drawn_windows(config, model, home, data):
    """As many of each domain, the same for every number of chunks, others for another seed, and not the first."""
    config = dataclasses.replace(config, data=home / data, split="train", windows=2)
    draws = {seed: ids_of(dataclasses.replace(config, seed=seed), model) for seed in range(12)}
    every = ids_of(dataclasses.replace(config, windows=0), model)
    for seed, ids in draws.items():
        assert sorted(name.split("/")[0] for name in ids) == ["folder0"] * 2 + ["folder1"] * 2
        assert set(ids) <= set(every)
        assert ids == ids_of(dataclasses.replace(config, seed=seed), model, chunks=0)
    assert len({tuple(ids) for ids in draws.values()}) > 8
    assert len({name for ids in draws.values() for name in ids}) > len(every) * 0.6


@pytest.mark.parametrize("data", ["documents", "in"])
def test_drawn_windows_that_slide(config, model, home, data):
    """Of many documents, of each few, which reach from its beginning to its end."""
    config = dataclasses.replace(config, data=home / data, split="train", place="sliding", stride=1, chunks=(1, 0))
    every = [name.rpartition(":")[::2] for name in ids_of(config, model, chunks=1)]
    lasts = {document: int(start) for document, start in every}  # they come in order
    for windows, most in (10, 1), (36, 2):
        ids = ids_of(dataclasses.replace(config, windows=windows), model, chunks=1)
        found = [name.rpartition(":")[::2] for name in ids]
        assert set(found) <= set(every)
        domains = [document.split("/")[0] for document, _ in found]
        documents = Counter(document for document, _ in found)
        room = {d: most * sum(name.startswith(d) for name in lasts) for d in ("folder0", "folder1")}
        assert Counter(domains) == {d: min(windows, room[d]) for d in room}
        assert max(documents.values()) == most
    for document in documents:
        first, second = [int(start) for name, start in found if name == document]
        assert first == 6
        assert abs(second - (6 + lasts[document]) / 2) <= 1


def test_the_other_document(config, model, tmp_path):
    """Of the same domain, also where one window is drawn; where a domain has but one, another domain's."""
    for name, word in ("a/1", "x"), ("b/1", "def "), ("a/2", "x"), ("b/2", "def "), ("c/1", "return "):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(word * 60)
    for windows, count in (0, 5), (1, 3):
        asked = spans(dataclasses.replace(config, data=tmp_path, windows=windows), "other", 1, model)
        alike = [bool({*window} & {*context}) for window, (context,) in asked]
        assert sorted(alike) == [False] + [True] * (count - 1)
    one = dataclasses.replace(config, data=tmp_path / "a", windows=1)
    assert len(spans(one, "other", 1, model)) == 1


def ids_of(config: Perplexity, model: Asked, chunks: int = 4) -> list[str]:
    return [record["id"] for record in config.measure(Point("previous", chunks), model)]


def test_drawn_raw_documents_are_read_once(config, model, home, monkeypatch):
    """And tokenised only where their draw is low enough."""
    config = dataclasses.replace(config, data=home / "in", windows=1, seed=7)
    read, tokenised = [], []
    monkeypatch.setattr(
        perplexity, "read", lambda *given, f=perplexity.read, **more: read.append(given) or f(*given, **more)
    )
    monkeypatch.setattr(
        perplexity, "_tokenised", lambda raw, *rest, f=perplexity._tokenised: tokenised.append(raw) or f(raw, *rest)
    )
    assert ids_of(config, model) == ids_of(config, model, chunks=1)
    assert len(read) == 24
    assert 2 <= len(tokenised) < 18


@pytest.mark.parametrize("seed", range(20))
def test_drawn(seed):
    """Against all items sorted by their draws; what cannot be among the lowest is not read."""
    rng = np.random.default_rng(seed)
    most, count = int(rng.integers(1, 12)), int(rng.integers(1, 60))
    sizes, domains, draws = rng.integers(0, 4, count), rng.choice(list("abc"), count), rng.random(count)
    asked = []
    candidates = [(str(domains[n]), float(draws[n]), n) for n in range(count)]
    found = reservoir_by_domain(iter(candidates), most, lambda n: (asked.append(n) or n, int(sizes[n])))
    wanted = []
    for domain in "abc":
        total = 0
        for n in np.argsort(draws):
            if domains[n] == domain and sizes[n] and total < most:
                wanted.append(int(n))
                total += sizes[n]
    assert found == sorted(wanted, key=lambda n: draws[n])
    assert set(found) <= set(asked)


PASSAGES, LENGTH = 3, 5  # of a sequence, and their tokens


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory) -> tuple[Path, list[np.ndarray], np.ndarray, Tokenizer]:
    """Four sequences of 12 tokens and their three passages, the last one shorter than the others."""
    home = tmp_path_factory.mktemp("retrieved")
    tokenizer, rng = make_tokenizer(home), np.random.default_rng(1)
    sequences = [rng.integers(3, 290, 13) for _ in range(4)]
    base = write_sequences(home / "sequences", sequences, 12, tokenizer)
    passages = rng.integers(3, 290, (4, PASSAGES, LENGTH))
    records = [
        {
            "passages": rows,
            "lengths": np.array([5, 5, 2]),
            "scores": np.array([3.0, 2.5, 0.5]),
            "names": "x@0\ny@0\nz@0",
        }
        for rows in passages
    ]
    facts = {"passage_length": LENGTH, "query_tokens": 4, "joins": joins(base)}
    features = features_of(np.uint16, LENGTH)
    path = write(home / "found", "retrieved", features, [records[:2], records[2:]], tokenizer, **facts)
    return path, sequences, passages, tokenizer


@pytest.fixture
def found(retrieved) -> Perplexity:
    sizes = {"window": 12, "scored": 8, "chunk_length": LENGTH}
    return Perplexity(data=retrieved[0], chunks=(0, 1, 3), kinds=("retrieved",), split="train", **sizes)


def test_retrieved_passages(found, retrieved):
    """The k best, the best one next to the window, each with its score; a window scores what follows the query."""
    _, sequences, passages, tokenizer = retrieved
    model = Asked(tokenizer)
    for chunks in 0, 1, 3:
        model.asked.clear()
        records = list(found.measure(Point("retrieved", chunks), model))
        assert [record["id"] for record in records] == ["0:0", "1:0", "2:0", "3:0"]
        for (prompt, (row,)), record, tokens, rows in zip(model.asked, records, sequences, passages, strict=True):
            assert [*prompt.ids, *row] == tokens[:12].tolist()
            assert len(row) == 8
            wanted = [rows[0].tolist(), rows[1].tolist(), rows[2, :2].tolist()][:chunks]
            assert list(prompt.contexts) == wanted[::-1]
            assert prompt.scores == ([3.0, 2.5, 0.5][:chunks][::-1] if chunks else None)
            assert record["read"] == 12 + sum(map(len, wanted))


def test_what_retrieval_did_not_give(found, retrieved):
    model = Asked(retrieved[3])
    with pytest.raises(ValueError, match=r"\b3 passages .* 0, and 4 .*--k"):
        next(dataclasses.replace(found, chunks=(4,)).measure(Point("retrieved", 4), model))
    with pytest.raises(ValueError, match=" 4 tokens, .* 3 .*scored"):
        next(dataclasses.replace(found, scored=9).measure(Point("retrieved", 1), model))
    with pytest.raises(ValueError, match="kinds retrieved, .*previous"):
        next(found.measure(Point("previous", 1), model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunks": (0, -1)}, r"chunks is \[0, -1\]: .*different"),
        ({"chunks": (2, 2)}, r"chunks is \[2, 2\]"),
        ({"chunks": ()}, r"chunks is \[\]"),
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"scored": 0}, "scored is 0: .*window's 9"),
        ({"scored": 9}, "scored is 9"),
        ({"kinds": ()}, r"kinds is \[\]"),
        ({"kinds": ("other", "other")}, "kinds is"),
        ({"kinds": ("retrieved", "other")}, "kinds is .*: .*previous, other .*retrieved alone"),
        ({"stride": 3}, "stride is 3: .*sliding"),
        ({"stride": -3, "place": "sliding"}, "stride is -3"),
        ({"windows": -1}, "windows is -1"),
    ],
)
def test_bad_configs(config, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **changes)


def test_data_that_has_no_window(config, model, home, tmp_path):
    def first(**changes):
        return next(dataclasses.replace(config, **changes).measure(Point("previous", 1), model))

    with pytest.raises(ValueError, match=" 609 tokens .*lower"):
        first(chunks=(100,))
    with pytest.raises(FileNotFoundError, match="absent: no .*file"):
        first(data=tmp_path / "absent")
    (tmp_path / "one.txt").write_text("return " * 60)
    with pytest.raises(ValueError, match=r"only one\.txt .*other .*two"):
        first(data=tmp_path / "one.txt")
    assert first(data=tmp_path / "one.txt", kinds=("previous",))["read"] == 15
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: no text.* mend"):
        first(data=tmp_path / "bad.jsonl")
    model.tokenizer = make_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="other tokens .*model"):
        first()


def test_probabilities_that_are_no_numbers(config, model):
    model.gain = float("nan")
    with pytest.raises(ValueError, match=r"nll of folder\d/\d\d.txt:\d+ is nan"):
        next(config.measure(Point("previous", 1), model))
