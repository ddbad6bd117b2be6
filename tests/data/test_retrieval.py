"""Passages against documents cut again, and searches against BM25 and dot products written out."""

import collections
import dataclasses
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from support.refusals import one_line
from support.searches import COMMON, bm25_scores, dot_scores

from cepe_jax.data import retrieval
from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare
from cepe_jax.data.passages import Passages
from cepe_jax.data.records import Records
from cepe_jax.data.retrieval import RetrieveConfig, choose, retrieve
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.search import BATCH, BM25, Dense, best, load_encoder, nearest

LENGTH = 16
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re", "so") for b in ("b", "dd", "fff", "g1", "é", "ss")] + COMMON


def make(home: Path) -> None:
    """Sixty documents in several units, and what is sampled of them; with another tokenizer; and split otherwise."""
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = home / "in" / f"folder{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        text = " ".join(rng.choice(WORDS, size=rng.integers(20, 90)))
        (folder / f"{number:02}@x.txt").write_text(text.replace("so", "\n", 1))
    config = PrepareConfig(
        input=home / "in", out=home / "documents", vocab_size=320, test_fraction=0.1, retrieval_fraction=0.4, workers=1
    )
    config = dataclasses.replace(config, unit_bytes=2500)
    prepare(config)
    prepare(dataclasses.replace(config, out=home / "other", vocab_size=300, test_fraction=0.5, retrieval_fraction=0))
    prepare(dataclasses.replace(config, out=home / "otherwise", tokenizer=str(config.out), seed=1))
    for kind in ("filtered", "packed"):
        sample(SampleConfig(data=config.out, out=home / kind, kind=kind, length=50, workers=1))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("retrieval")
    make(home)
    return home


@pytest.fixture
def config(home, tmp_path) -> RetrieveConfig:
    """The passages of the very documents that the sequences are of, so that a sequence could find itself."""
    return RetrieveConfig(
        data=home / "filtered",
        passages=home / "documents",
        out=tmp_path / "out",
        k=5,
        passage_split="train",
        passage_length=LENGTH,
        query_tokens=12,
        workers=1,
    )


def cut(corpus: Corpus, length: int = LENGTH) -> dict[tuple[str, int], np.ndarray]:
    """(document, first token) -> the tokens of each passage, in the order of the passages' numbers."""
    return {
        (document.name, start): document.tokens[start : start + length]
        for document in corpus
        for start in range(0, len(document.tokens), length)
    }


def pieces(name: bytes) -> list[tuple[str, int]]:
    return [(line.rpartition("@")[0], int(line.rpartition("@")[2])) for line in name.split("\n") if line]


def bag(texts: list[str]) -> np.ndarray:
    """How often each word, by its hash, is in a text: products are small integers, and many are equal."""
    rows = np.zeros((len(texts), 7), int)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row[zlib.crc32(word.encode()) % 7] += 1
    return rows


def fractions(texts: list[str]) -> np.ndarray:
    """As `bag`, in directions that are no integers."""
    return bag(texts) @ np.random.default_rng(1).standard_normal((7, 5))


@pytest.mark.parametrize(
    ("encoder", "data"), [(None, "filtered"), (None, "packed"), (bag, "filtered"), (fractions, "packed")]
)
def test_each_sequence_gets_its_best_passages(config, home, encoder, data):
    """Record i: for the first tokens of sequence i the highest scores of all but its own documents' passages."""
    name = f"{__name__}:{encoder.__name__}" if encoder else ""
    config = dataclasses.replace(config, encoder=name, data=home / data)
    retrieve(config)
    base, result = Records(home / data, "train"), Records(config.out, "train")
    corpus = Corpus(config.passages, "train")
    assert len(result) == len(base) > 20
    assert len([shard for shard in base.facts["shards"] if shard["records"]]) > 1
    passages = cut(corpus)
    places = list(passages)
    texts = [corpus.tokenizer.decode(tokens) for tokens in passages.values()]
    excluded, longest = 0, 0
    for sequence, record in zip(base, result, strict=True):
        query = corpus.tokenizer.decode(sequence["tokens"][:12])
        scores = dot_scores(encoder, query, texts) if encoder else bm25_scores(query, texts)
        own = {document for document, _ in pieces(sequence["name"])}
        longest = max(longest, len(own))
        free = np.array([document not in own for document, _ in places])
        excluded += scores[~free].max() > np.sort(scores[free])[-5]  # it would have been found
        expected = [n for n in np.argsort(-scores, kind="stable") if free[n]][:5]
        numbers = [places.index(place) for place in pieces(record["names"])]
        np.testing.assert_allclose(record["scores"], scores[expected], rtol=1e-5)
        np.testing.assert_allclose(record["scores"], scores[numbers], rtol=1e-5)
        assert len(set(numbers)) == 5
        assert free[numbers].all()
        if encoder is bag:  # exact, so equals are in order
            assert numbers == expected
    assert excluded > 5
    assert (longest > 1) == (data == "packed")


def test_the_record(config):
    """Each passage is its document's tokens, padded; sizes and types."""
    retrieve(config)
    corpus, result = Corpus(config.passages, "train"), Records(config.out, "train")
    passages = cut(corpus)
    seen = set()
    for record in result:
        assert record["passages"].shape == (5, LENGTH)
        assert record["lengths"].shape == record["scores"].shape == (5,)
        assert record["passages"].dtype == np.uint16
        assert record["lengths"].dtype == np.int32
        assert record["scores"].dtype == np.float32
        for row, (length, place) in enumerate(zip(record["lengths"], pieces(record["names"]), strict=True)):
            assert record["passages"][row].tolist() == [*passages[place], *[0] * (LENGTH - length)]
            assert length == len(passages[place])
            seen.add(int(length))
    assert max(seen) == LENGTH > min(seen)


def test_the_index_of_the_dataset(config, home):
    retrieve(config)
    base, result = Records(home / "filtered", "train"), Records(config.out, "train")
    joins = result.index["joins"]
    assert (config.out / joins["path"]).resolve() == base.path.resolve()
    assert not Path(joins["path"]).is_absolute()
    assert joins | {"path": ""} == {"path": "", "split": "train", "digest": base.digest}
    facts = {name: result.index[name] for name in ("name", "passage_length", "query_tokens", "tokenizer")}
    fingerprint = base.tokenizer.fingerprint()
    assert result.tokenizer.fingerprint() == fingerprint
    assert facts == {
        "name": "retrieved",
        "passage_length": LENGTH,
        "query_tokens": 12,
        "tokenizer": fingerprint,
    }
    assert [s["records"] for s in result.facts["shards"]] == [s["records"] for s in base.facts["shards"]]
    domains = collections.Counter()
    for sequence, record in zip(base, result, strict=True):
        domains[sequence["domain"]] += int(record["lengths"].sum())
    assert {name: counts["tokens"] for name, counts in result.facts["domains"].items()} == domains


@pytest.mark.parametrize("length", [1, 7, LENGTH, 10_000])
def test_passages_hold_every_token_once(config, home, length):
    config = dataclasses.replace(config, passage_length=length)
    config.out.mkdir()
    corpus = Corpus(config.passages, "train")
    retrieval.build_index(config, corpus, lambda texts, width: np.ones((len(texts), 1)))
    passages = Passages.load(config.out / "index", length)
    expected = cut(corpus, length)
    assert len(passages) == len(expected)
    for number, ((name, start), tokens) in enumerate(expected.items()):
        assert (passages.names[passages.document[number]], passages.start[number]) == (name, start)
        np.testing.assert_array_equal(passages[number], tokens)
    everything = np.concatenate([passages[number] for number in range(len(passages))])
    np.testing.assert_array_equal(everything, np.concatenate([document.tokens for document in corpus]))
    names = [corpus[3].name, "elsewhere", corpus[0].name]
    assert [list(expected)[n] for n in passages.numbers_of(names)] == [
        place for name in names for place in expected if place[0] == name
    ]
    assert passages.numbers_of([]).tolist() == passages.numbers_of(["elsewhere"]).tolist() == []


def test_documents_are_drawn_until_there_are_enough_tokens(home):
    corpus = Corpus(home / "documents", "train")
    lengths = np.array([len(document.tokens) for document in corpus])
    firsts = set()
    for seed in range(20):
        before: set[int] = set()
        tokens = 0
        while tokens < lengths.sum():
            numbers = choose(corpus, tokens + 1, seed)
            assert (np.diff(numbers) > 0).all()
            assert before < set(numbers)
            assert len(numbers) == len(before) + 1
            before, tokens = set(numbers), int(lengths[numbers].sum())
            assert set(choose(corpus, tokens, seed)) == before
        assert len(choose(corpus, tokens + 1, seed)) == len(corpus)
        firsts |= set(choose(corpus, 1, seed))
    assert len(firsts) > 8


def test_draws_of_one_bin_are_in_order(home, monkeypatch):
    """As draws of many bins: the numbers that are chosen do not depend on how many there are."""
    corpus = Corpus(home / "documents", "retrieval")
    chosen = [choose(corpus, tokens, 0).tolist() for tokens in (1, 100, 500)]
    for bins in (1, 3):
        monkeypatch.setattr(retrieval, "BINS", bins)
        assert [choose(corpus, tokens, 0).tolist() for tokens in (1, 100, 500)] == chosen


@pytest.mark.parametrize("encoder", ["", f"{__name__}:fractions"])
def test_fewer_than_k(config, home, encoder):
    """Of two documents one may be the sequence's own; what is left is found, and nothing else."""
    lengths = [len(document.tokens) for document in Corpus(config.passages, "train")]
    config = dataclasses.replace(config, k=1000, encoder=encoder, passage_tokens=sum(sorted(lengths)[-2:]) // 2)
    retrieve(config)
    passages = Passages.load(config.out / "index", LENGTH)
    left = collections.Counter()
    for sequence, record in zip(Records(home / "filtered", "train"), Records(config.out, "train"), strict=True):
        own = {document for document, _ in pieces(sequence["name"])}
        others = [n for n in range(len(passages)) if passages.names[passages.document[n]] not in own]
        found = [f"{passages.names[passages.document[n]]}@{passages.start[n]}" for n in others]
        assert sorted(record["names"].split("\n")) == sorted(found or [""])
        assert len(record["scores"]) == len(record["passages"]) == len(others)
        assert np.isfinite(record["scores"]).all()
        assert (np.diff(record["scores"]) <= 0).all()
        left[len(others)] += 1
    assert len(left) > 1


def test_nothing_is_left(config, home):
    """A sequence of the only document that is searched finds no passage."""
    config = dataclasses.replace(config, passage_tokens=1)
    retrieve(config)
    (name,) = Passages.load(config.out / "index", LENGTH).names
    shapes = set()
    for sequence, record in zip(Records(home / "filtered", "train"), Records(config.out, "train"), strict=True):
        if pieces(sequence["name"])[0][0] == name:
            assert record["names"] == ""
            shapes.add((record["passages"].shape, record["lengths"].shape))
    assert shapes == {((0, LENGTH), (0,))}


def test_the_best_places():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.choice([-np.inf, -1, 0, 0.5, 2], size=rng.integers(1, 12)).astype(np.float32)
        for k in range(1, 14):
            expected = sorted((-score, place) for place, score in enumerate(scores) if score > -np.inf)[:k]
            assert best(scores, k).tolist() == [place for _, place in expected]


def test_many_queries_are_searched_as_one_is(config, home, monkeypatch):
    """More queries than a batch, and not a multiple of it; a query without a word."""
    monkeypatch.setattr(retrieval, "BATCH", 4)
    config.out.mkdir()
    corpus = Corpus(config.passages, "train")
    encode = load_encoder(f"{__name__}:bag")
    queries = ["kab", "lodd mifff", "", "the of", "x", *WORDS[:6]]
    excluded = [np.arange(n % 3) for n in range(len(queries))]
    for use, kind in ((encode, Dense), (None, BM25)):
        out = config.out / kind.__name__
        out.mkdir()
        retrieval.build_index(dataclasses.replace(config, out=out), corpus, use)
        searcher = kind.load(out / "index", encode) if use else kind.load(out / "index")
        numbers, scores = searcher.search(queries, excluded, 5)
        assert numbers.shape == scores.shape == (11, 5)
        assert scores.dtype == np.float32
        for row, (query, own) in enumerate(zip(queries, excluded, strict=True)):
            one, its_scores = searcher.search([query], [own], 5)
            assert one.tolist() == numbers[row : row + 1].tolist()
            assert its_scores.tolist() == scores[row : row + 1].tolist()
            assert not set(numbers[row]) & set(own)
        assert numbers[2].tolist() == [2, 3, 4, 5, 6]  # all are equal
        assert not scores[2].any()


def test_products_are_exact_on_any_accelerator():
    arrays = np.ones((3, 2), np.float32), np.ones((1, 2), np.float32), np.zeros((1, 3), bool)
    with jax.default_matmul_precision("bfloat16"):
        assert "Precision.HIGHEST" in str(jax.make_jaxpr(nearest, static_argnums=3)(*arrays, 2))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_jobs_and_workers_change_nothing(config, tmp_path):
    """One job, two of which one is killed and goes on, two processes: the same bytes, and no unit is done twice."""
    retrieve(config)
    parts = dataclasses.replace(config, out=tmp_path / "parts", shard="0/2")
    retrieve(parts)
    with pytest.raises(FileNotFoundError, match="not finished"):
        Records(parts.out, "train")
    kept = {path: path.stat().st_mtime_ns for path in parts.out.rglob("*") if path.is_file()}
    (parts.out / ".index.killed").mkdir()
    (parts.out / ".index.killed" / "tokens.npy").touch()
    retrieve(dataclasses.replace(parts, shard="1/2"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    processes = dataclasses.replace(config, out=tmp_path / "processes", workers=2)
    retrieve(processes)
    for out in (parts.out, processes.out):
        assert contents(out) == contents(config.out)
    before = contents(config.out)
    retrieve(dataclasses.replace(config, shard="0/1", workers=2))
    assert contents(config.out) == before


def test_another_job_builds_the_index_first(config, home, monkeypatch):
    config.out.mkdir()
    corpus = Corpus(config.passages, "train")
    retrieval.build_index(config, corpus, None)
    first = contents(config.out)
    (config.out / "index").rename(config.out / "theirs")
    save = BM25.save

    def late(searcher, index):
        save(searcher, index)
        (config.out / "theirs").rename(config.out / "index")

    monkeypatch.setattr(BM25, "save", late)
    retrieval.build_index(config, corpus, None)
    assert contents(config.out) == first
    assert [path.name for path in config.out.iterdir()] == ["index"]


def flat(texts):
    return np.zeros(len(texts))


def too_many(texts):
    return np.zeros((len(texts) + 1, 3))


def infinite(texts):
    return np.full((len(texts), 3), np.inf)


def narrow(texts):
    return np.ones((len(texts), 3 if len(texts) == BATCH else 1))


def refused(config, **changes) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        retrieve(dataclasses.replace(config, **changes))
    return one_line(error)


def test_errors(config, home):
    documents = home / "documents"
    assert f"{documents} holds documents" in refused(config, data=documents)
    filtered = home / "filtered"
    assert f"{filtered} holds filtered" in refused(config, passages=filtered)
    assert "different tokenizers" in refused(config, passages=home / "other")
    assert "retrieval split" in refused(config, passages=home / "other", passage_split="retrieval")
    assert "no split dev" in refused(config, passage_split="dev")
    for name in ("k", "passage_length", "query_tokens", "passage_tokens"):
        assert f"{name} is 0" in refused(config, **{name: 0})
    for name in ("encode", ":encode", "module:"):
        assert f"encoder is {name}: give module:function" in refused(config, encoder=name)
    assert "named 'nowhere'" in refused(config, encoder="nowhere:encode")
    assert f"{__name__} has no encode" in refused(config, encoder=f"{__name__}:encode")
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (flat, r"returned \(64,\) for 64 texts: return \(64, width\)"),
        (too_many, r"returned \(65, 3\) for 64 texts: return \(64, width\)"),
        (narrow, r"returned \(\d+, 1\) for (\d+) texts: return \(\1, 3\)"),
        (infinite, "returned .*not finite"),
    ],
)
def test_bad_encoders(config, encode, message):
    """Nothing is left of the index, and another encoder may begin where this one failed."""
    name = f"{__name__}:{encode.__name__}"
    assert re.search(f"encoder {name} {message}", refused(config, encoder=name))
    assert not list(config.out.glob("*index*"))
    retrieve(dataclasses.replace(config, encoder=f"{__name__}:bag"))
    assert Records(config.out, "train")


def test_a_changed_dataset_is_another_run(config, home):
    retrieve(dataclasses.replace(config, shard="0/2"))
    assert "another run, data " in refused(config, data=home / "packed")
    assert "another run, passages " in refused(config, passages=home / "otherwise")
    assert "another run, passage_split " in refused(config, passage_split="retrieval")
    assert re.search("another run, k .* 5 .* 6 ", refused(config, k=6))


def test_passages_without_words(config):
    config = dataclasses.replace(config, passage_length=1)
    corpus = Corpus(config.passages, "train")
    with pytest.raises(ValueError, match="no passage .*BM25"):
        BM25.of(corpus.tokenizer.decode([i]) for i in (1, 2, 5))


def test_it_is_light():
    """Without a search no bm25s and no TFDS; BM25 does not start JAX."""
    program = (
        "import sys; import cepe_jax.data.retrieval, cepe_jax.data.search as r;"
        "print(*sorted({n.split('.')[0] for n in sys.modules} & {'bm25s', 'tensorflow_datasets', 'jax'}));"
        "r.import_bm25s(); print('bm25s' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "True False", ""]
