"""Task-gram tables, probabilities against torch and brute force, correlations by their definitions, the command."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats
from support.models import make_cepe
from support.refusals import one_line
from support.tokenizers import as_llama_2
from support.tracing import HASHED, hashed, write_index, write_task, write_tokenizer

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.text import load
from cepe_jax.tracing.correlate import CorrelateConfig, Values, correlate, exposure_curve, infinity_units, units_of
from cepe_jax.tracing.correlations import adjusted, correlate_ranks
from cepe_jax.tracing.probabilities import HoldsSpecial, Read, Scored, infinity_gram, score_targets
from cepe_jax.tracing.table import Table, TableConfig, Target, make_table, read_examples
from cepe_jax.tracing.words import ngrams, placed_words, words_of
from cepe_jax.weights.source import save

TEXTS = [
    "The capital of France is Paris, and the river is the Seine.",
    "Paris is large. The capital of Italy is Rome; the river of Rome is the Tiber.",
    "Rome and Paris are cities. The capital of France is old.",
    "The river is wide and the capital of France is Paris.",
    "Madrid is the capital city of Spain.",
]
ROWS = [
    ("Question: what is the capital of France?", "The capital is Paris."),
    ("What is the capital of Italy?", " Rome, the capital is Rome, as the capital is"),
    ("Which river is in Paris?", "the river is the Seine"),
    ("Is Madrid large?", "Madrid"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus with its index, tables of its task, and a decoder with random weights."""
    home = tmp_path_factory.mktemp("tracing")
    write_index(home, TEXTS)
    examples = write_task(home / "task.jsonl", ROWS)
    for n in (1, 2):
        make_table(
            TableConfig(examples=examples, index=home / "index", out=home / f"n{n}", encoder=HASHED, gamma=-0.1, n=n)
        )
    save(make_cepe(vocab_size=write_tokenizer(home).vocab_size).decoder, home / "model", assets=home)
    return home


def table(home, **settings) -> Table:
    places = {"examples": home / "task.jsonl", "index": home / "index", "out": home / "table"}
    make_table(TableConfig(**places | {"encoder": HASHED, "n": 2, "gamma": 0.3} | settings))
    return Table(settings.get("out", home / "table"))


@pytest.mark.parametrize(("n", "gamma", "whole"), [(1, -0.01, False), (2, 0.3, False), (2, 0.05, True)])
def test_pairs_are_those_above_gamma_with_counts(home, tmp_path, n, gamma, whole):
    found = table(home, out=tmp_path / "table", n=n, gamma=gamma, whole_answer=whole)
    documents = [ngrams(words_of(text), length) for text in TEXTS for length in [n]]
    wanted = {}
    for prompt, answer in ROWS:
        words = words_of(answer)
        ys = [tuple(words)] if whole else ngrams(words, n)
        for x, y in itertools.product(ngrams(words_of(prompt), n), ys):
            a, b = hashed([" ".join(x), " ".join(y)])
            size = math.sqrt((a @ a) * (b @ b))
            cosine = a @ b / size if size else 0.0
            if cosine > gamma and x != y:
                held = [ngrams(words_of(text), len(y)) for text in TEXTS]
                both = sum(x in own and y in others for own, others in zip(documents, held, strict=True))
                wanted[" ".join(x), " ".join(y)] = (cosine, both, sum(own.count(x) for own in documents))
    assert {(pair["x"], pair["y"]) for pair in found.pairs} == set(wanted)
    for pair in found.pairs:
        cosine, *counts = wanted[pair["x"], pair["y"]]
        assert pair["cosine"] == pytest.approx(cosine)
        assert [pair["documents"], pair["count"]] == counts
    assert len(wanted) > 3
    assert any(pair["count"] > pair["documents"] > 0 for pair in found.pairs) or whole


def test_targets_stand_where_they_first_occur(home):
    for target in Table(home / "n2").targets():
        answer = ROWS[target.example][1]
        assert words_of(answer[target.start : target.end]) == list(target.y)
        assert ngrams(words_of(answer), 2).index(target.y) == target.word
        assert target.pairs
    examples = [target.example for target in Table(home / "n2").targets()]
    assert 3 not in examples  # an answer of one word has no 2-gram


def test_log_probabilities_are_torchs(home):
    """The product over the tokens of an n-gram alone, one pass of the whole text in torch."""
    torch = pytest.importorskip("torch")
    from support.tracing import in_torch

    model = load(home / "model")
    oracle = in_torch(model.model)
    data = Table(home / "n2")
    targets = list(data.targets())
    scores, logs = score_targets(model, data.examples, targets)
    _, tails = score_targets(model, data.examples, targets, compat=True)
    longer = 0
    for number, (prompt, answer) in enumerate(ROWS):
        text = prompt + answer if answer.startswith(" ") else f"{prompt} {answer}"
        begin = text.rindex(answer)
        ids = model.tokenizer.encode(text, bos=True)
        with torch.no_grad():
            log_probs = torch.log_softmax(oracle(torch.tensor([ids]))[0].double(), -1)
        each = [float(log_probs[t - 1, ids[t]]) for t in range(1, len(ids))]
        ends = [len(model.tokenizer.decode(ids[1 : n + 2])) for n in range(len(each))]  # characters after each token
        starts = [0, *ends[:-1]]
        for n, target in enumerate(targets):
            if target.example != number:
                continue
            a, b = begin + target.start, begin + target.end
            own = [log for log, start, end in zip(each, starts, ends, strict=True) if end > a and start < b]
            tail = [log for log, end in zip(each, ends, strict=True) if end > a]
            assert logs[n] == pytest.approx(sum(own), rel=1e-4)
            assert tails[n] == pytest.approx(sum(tail), rel=1e-4)
            longer += tails[n] < logs[n] - 0.1
        of_answer = [log for log, end in zip(each, ends, strict=True) if end > begin]
        assert scores[number].total == pytest.approx(sum(of_answer), rel=1e-4)
        assert scores[number].tokens == len(of_answer)
    assert longer > len(targets) // 2  # the authors' fault shows


def test_a_cepe_without_contexts_scores_as_its_decoder(home, tmp_path):
    data, model = Table(home / "n1"), load(home / "model")
    save(make_cepe(vocab_size=model.tokenizer.vocab_size), tmp_path / "cepe", assets=home)
    targets = list(data.targets())[:4]
    found, wanted = (score_targets(one, data.examples, targets)[1] for one in (load(tmp_path / "cepe"), model))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("make", [write_tokenizer, lambda home: Tokenizer(as_llama_2(home / "tokenizer.model"))])
def test_tokens_of_a_word_are_those_with_its_letters(make, tmp_path):
    """Also of words in several tokens a letter; without its first or last token a word is not whole."""
    tokenizer = make(tmp_path)
    text = "So: the cat sat, naïvely, in 東京 — and (then) slept."
    read = Read.of(text, tokenizer)
    for word in placed_words(text)[1:]:  # before the first one Llama 2 puts a space
        span, written = read.tokens(word.start, word.end), text[word.start : word.end]
        ids = read.ids[span]
        assert written in tokenizer.decode(ids)
        assert len(tokenizer.decode(ids).strip(" :,.()—")) == len(written)
        assert all(written not in tokenizer.decode(part) for part in (ids[1:], ids[:-1]))


def test_special_names_and_long_texts_are_refused(home):
    model = load(home / "model", window=16)
    with pytest.raises(HoldsSpecial, match="'a </s> b'") as error:
        Read.of("a </s> b", model.tokenizer)
    one_line(error)
    with pytest.raises(ValueError, match=r"example 1 has \d\d tokens and the window 16") as error:
        score_targets(model, Table(home / "n2").examples, [])
    one_line(error)
    with pytest.raises(ValueError, match="example 2: .*</s>") as error:
        score_targets(model, [{"prompt": "a", "answer": "b"}, {"prompt": "a </s>", "answer": "b"}], [])
    one_line(error)


def test_files_of_a_table_are_whole(home, tmp_path):
    """A file that is cut off at a line's end, or in a line, is not read as a smaller table."""
    place = tmp_path / "table"
    shutil.copytree(home / "n2", place)
    whole = (place / "pairs.jsonl").read_bytes()
    count = whole.count(b"\n")
    for rest in (whole[: whole.index(b"\n") + 1], whole[:-9], whole[: whole.index(b"\n") + 9]):
        (place / "pairs.jsonl").write_bytes(rest)
        with pytest.raises(ValueError, match=rf"{rest.count(10)} pairs .* {count}") as error:
            Table(place)
        one_line(error)
    (place / "pairs.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl.*again"):
        Table(place)


def test_bad_example_is_named_by_its_line(tmp_path):
    path = tmp_path / "task.jsonl"
    for last, words in ('{"prompt": "a"}', "task.jsonl:4"), ('{"prompt": "a", "answer": " "}', "task.jsonl:4"):
        path.write_text('\n\n{"prompt": "a", "answer": "b"}\n' + last + "\n")
        with pytest.raises(ValueError, match=words):
            read_examples(path)


def brute_infinity(context: list[str], word: str) -> float | None:
    """The longest end of the context that occurs anywhere, and how often the word follows it."""
    documents = [words_of(text) for text in TEXTS]
    for start in range(len(context) + 1):
        used = tuple(context[start:])
        before = sum(ngrams(words, len(used)).count(used) for words in documents) if used else sum(map(len, documents))
        if before:
            both = sum(ngrams(words, len(used) + 1).count((*used, word)) for words in documents)
            return both / before
    raise AssertionError


def test_infinity_gram_is_brute_forces(home):
    from cepe_jax.tracing.index import Index

    queries = []
    for text in [*TEXTS, *(f"{prompt} {answer}" for prompt, answer in ROWS)]:
        words = words_of(text)
        queries += [(tuple(words[:at]), word) for at, word in enumerate([*words, "Rome"])]
    found = infinity_gram(Index(home / "index"), *zip(*queries, strict=True))
    wanted = [brute_infinity(list(context), word) for context, word in queries]
    np.testing.assert_allclose(np.exp(np.nan_to_num(found, nan=-np.inf)), wanted, rtol=1e-12)
    assert 0 in wanted
    assert 1 in wanted


def ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_rank_correlations_follow_their_definitions():
    """Spearman by ranks, Kendall's tau-b by pairs, with ties and -inf."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 40) + 0.0
    y = x + rng.normal(0, 2, 40).round()
    x[x == 0] = -np.inf
    found = correlate_ranks(x, y, np.arange(40) // 2, resamples=400, seed=0)
    assert found.rho == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    signs = [(np.sign(x[j] - x[i]), np.sign(y[j] - y[i])) for i in range(40) for j in range(i) if x[i] != x[j]]
    signs += [(0.0, np.sign(y[j] - y[i])) for i in range(40) for j in range(i) if x[i] == x[j]]
    agreed = sum(a * b for a, b in signs)
    tau = agreed / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    assert found.tau == pytest.approx(tau)
    assert found.distance == pytest.approx((1 - tau) / 2)
    wanted = stats.permutation_test((ranks(x), ranks(y)), lambda a, b: np.corrcoef(a, b)[0, 1],
                                    permutation_type="pairings", n_resamples=400, rng=1)  # fmt: skip
    assert found.permuted_p == pytest.approx(wanted.pvalue, abs=0.01)
    low, high = np.percentile(wanted.null_distribution, [2.5, 97.5])
    assert found.permuted == pytest.approx((low, high), abs=0.08)
    assert found.interval[0] < found.rho < found.interval[1]
    assert (found.units, found.groups) == (40, 20)


def test_groups_widen_the_interval():
    """Units that are copies of one another tell no more than one of them."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    y = x + 2 * rng.normal(size=60)
    once = correlate_ranks(x, y, np.arange(60), resamples=500, seed=0)
    copied = correlate_ranks(np.repeat(x, 5), np.repeat(y, 5), np.repeat(np.arange(60), 5), resamples=500, seed=0)
    assert copied.rho == pytest.approx(once.rho, abs=0.01)
    assert copied.rho_p < once.rho_p / 10  # which takes them for independent
    assert np.diff(copied.interval) == pytest.approx(np.diff(once.interval), rel=0.15)
    assert (
        correlate_ranks(x, y, np.zeros(60, int), resamples=9, seed=0).interval is None
    )  # of one group nothing is known


def test_a_constant_measure_has_no_correlation():
    found = correlate_ranks(np.zeros(9), np.arange(9.0), np.arange(9), resamples=10, seed=0)
    assert (found.rho, found.rho_p, found.units) == (None, None, 9)
    assert correlate_ranks(np.zeros(0), np.zeros(0), np.zeros(0, int), 10, 0).units == 0


@pytest.mark.parametrize("kind", ["holm", "benjamini-hochberg"])
def test_p_values_are_adjusted_by_definition(kind):
    rng = np.random.default_rng(2)
    tests = [correlate_ranks(x, x + 3 * rng.normal(size=25), np.arange(25), 5, 0) for x in rng.normal(size=(6, 25))] + [
        correlate_ranks(np.zeros(4), np.arange(4.0), np.arange(4), 5, 0)
    ]
    p = [test.rho_p for test in tests[:-1]]
    order = sorted(p)
    if kind == "holm":
        wanted = [min(1, max(order[i] * (6 - i) for i in range(order.index(one) + 1))) for one in p]
    else:
        wanted = [min(1, min(order[i] * 6 / (i + 1) for i in range(order.index(one), 6))) for one in p]
    found = adjusted(tests, kind)
    assert [test.adjusted_p for test in found[:-1]] == pytest.approx(wanted)
    assert found[-1].adjusted_p is None


def value(example: int, log: float, *pairs: tuple[int, int], infinity: float = -1.0) -> Values:
    rows = [{"x": f"x{n}", "y": "y", "cosine": 1.0, "documents": a, "count": b} for n, (a, b) in enumerate(pairs)]
    return Values(Target(example, ("y",), 0, 0, 1, rows), log, infinity)


def test_units_are_pairs_or_answers():
    values = [value(0, -1.0, (1, 2), (3, 3), (0, 5), (0, 0)), value(1, -2.0, (0, 4)), value(2, -3.0, (0, 0))]
    x, y, groups = units_of(values, "pair", zero_counts=True)
    assert x.tolist() == [math.log(0.5), 0, -math.inf, -math.inf]
    assert y.tolist() == [-1, -1, -1, -2]
    assert groups.tolist() == [0, 0, 0, 1]
    assert units_of(values, "pair", zero_counts=False)[0].tolist() == [math.log(0.5), 0]
    x, y, _ = units_of(values, "answer", zero_counts=True)
    assert x.tolist() == [pytest.approx(math.log(0.5) / 2), -math.inf]
    assert y.tolist() == [-1, -2]
    assert units_of([values[2]], "pair", zero_counts=True)[0].tolist() == []
    x, _, groups = infinity_units([value(0, -1.0, (1, 1), infinity=math.nan), value(3, -1.0, (1, 1))])
    assert (x.tolist(), groups.tolist()) == ([-1.0], [3])


def test_exposure_is_the_sum_of_cooccurrences():
    scores = [Scored(-4.0, 2, True), Scored(-3.0, 3, False), Scored(-9.0, 3, False), Scored(-5.0, 1, True)]
    values = [value(1, 0, (2, 9), (1, 4)), value(1, 0, (4, 4)), value(2, 0, (7, 7)), value(3, 0, (50, 60))]
    curve = exposure_curve(values, scores, bins=2)
    assert [(point.examples, point.exposure) for point in curve] == [(1, 0), (2, 7), (1, 50)]
    assert [point.log_prob for point in curve] == [-2, -2, -5]
    assert [point.accuracy for point in curve] == [1, 0, 1]
    assert curve[1].log_prob_error == pytest.approx(np.std([-1, -3], ddof=1) / math.sqrt(2))


def test_the_command_writes_all_values_and_a_report(home, tmp_path, capsys):
    settings = {"model": home / "model", "index": home / "index", "tables": (home / "n1", home / "n2"), "resamples": 20}
    correlate(CorrelateConfig(out=tmp_path / "out", **settings))
    result = json.loads((tmp_path / "out/correlate.json").read_text())
    rows = {(row["table"], row["measure"]): row for row in result["correlations"]}
    assert list(rows) == [(f"n{n}", kind) for n in (1, 2) for kind in (f"{n}-gram pairs", "infinity-gram")]
    lines = [json.loads(line) for line in (tmp_path / "out/values.jsonl").read_text().splitlines()]
    x, y = [], []
    for line in lines:
        if line["table"] == "n1":
            for _, documents, count in line["pairs"]:
                if count:
                    x.append(documents / count)
                    y.append(line["log_model"])
    assert rows["n1", "1-gram pairs"]["rho"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rows["n1", "1-gram pairs"]["units"] == len(x) > 20
    assert (tmp_path / "out/report.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out/report.png").stat().st_size > 10_000
    correlate(CorrelateConfig(out=tmp_path / "compat", **settings | {"compat": True}))
    compat = json.loads((tmp_path / "compat/correlate.json").read_text())["correlations"]
    assert compat[2]["rho"] != pytest.approx(result["correlations"][2]["rho"], abs=1e-3)


def test_what_does_not_belong_together_is_refused(home, tmp_path):
    other = write_index(tmp_path / "other", ["another corpus of the capital", "and more"])
    settings = {"model": home / "model", "index": home / "index", "tables": (home / "n1",), "out": tmp_path / "out"}
    refused = [
        ({"index": other.path}, ValueError, "n1.*other/index"),
        ({"tables": (tmp_path,)}, FileNotFoundError, "no table"),
        ({"index": tmp_path}, FileNotFoundError, "no index"),
        ({"tables": (home / "n1", home / "n1")}, ValueError, "n1, n1"),
    ]
    for changed, kind, match in refused:
        with pytest.raises(kind, match=match) as error:
            correlate(CorrelateConfig(**settings | changed))
        one_line(error)
    write_task(tmp_path / "one.jsonl", ROWS[:1])
    table(home, examples=tmp_path / "one.jsonl", out=tmp_path / "one")
    with pytest.raises(ValueError, match="one.*n1.*different examples") as error:
        correlate(CorrelateConfig(**settings | {"tables": (home / "n1", tmp_path / "one")}))
    one_line(error)
    facts = json.loads((home / "model/tokenizer.json").read_text())
    facts["model"]["merges"] = facts["model"]["merges"][:-1]
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/tokenizer.json").write_text(json.dumps(facts))
    save(load(home / "model").model, tmp_path / "model", assets=tmp_path / "assets")
    with pytest.raises(ValueError, match="index is the index of a corpus with tokenizer") as error:
        correlate(CorrelateConfig(**settings | {"model": tmp_path / "model"}))
    one_line(error)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"examples": "absent"}, "none of 2 words, as 'emu'"),
        ({"examples": "bad"}, "bad.jsonl:2"),
        ({"examples": "empty"}, "empty.jsonl:1"),
        ({"n": 40}, "40 words"),
        ({"gamma": 0.999}, "gamma 0.999"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(home, tmp_path, changed, match):
    write_task(tmp_path / "absent.jsonl", [("zebra", "zebra emu")])
    write_task(tmp_path / "empty.jsonl", [("what", " ")])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": 1, "answer": "b"}\n')
    if "examples" in changed:
        changed = {"examples": tmp_path / f"{changed['examples']}.jsonl"}
    with pytest.raises(ValueError, match=match) as error:
        table(home, out=tmp_path / "table", **changed)
    one_line(error)
    assert not (tmp_path / "table").exists()


def test_settings_out_of_range_are_refused(home):
    for settings, match in (({"n": 0}, "n is 0"), ({"gamma": 1.0}, "1.0"), ({"encoder": "sentences"}, "sentences")):
        with pytest.raises(ValueError, match=match):
            table(home, **settings)
    for settings, match in (({"bins": 0}, "bins is 0"), ({"tables": ()}, "tables")):
        with pytest.raises(ValueError, match=match):
            CorrelateConfig(**{"model": home, "index": home, "out": home, "tables": (home,)} | settings)
