"""Synthetic texts: what is asked has the answers that are given, by reading the text, and lengths are kept."""

import itertools
import re
from collections import Counter
from typing import get_args

import pytest
from support.fakes import Letters, Scripted, whole_text

from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.synthetic import Kind, Synthetic, sentences_of, texts

KINDS = get_args(Kind)
LENGTHS = {"common_words": (900, 5000, 9000), "frequent_words": range(240, 900, 30)}


def made(kind, length, samples=5, seed=42, haystack=()):
    return list(texts(kind, length, samples, seed, haystack, lambda record: len(record.contexts[0])))


def read_needles(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"A secret number of the (\w+ \w+) is (\d+)\.", text):
        found.setdefault(name, []).append(value)
    return found


def solve(kind: str, text: str, question: str) -> set[str]:
    """The answers, by reading what a model reads and knowing the kind of question alone."""
    if kind == "variable_tracking":
        (wanted,) = set(re.findall(r"value (\d+)", question))
        known = {}
        for name, of, value in re.findall(r"VAR (\w+) = (VAR \w+|(\d+))\.", text):
            known[name] = value or known.get(of.removeprefix("VAR "))  # None where it was not read
        return {name for name, value in known.items() if value == wanted}
    if kind == "common_words":
        return {word for word, _ in Counter(re.findall(r"\d+\. (\w+)", text)).most_common(10)}
    if kind == "frequent_words":
        counts = Counter(text.split())
        del counts["...."]
        *asked, (_, most) = counts.most_common(4)
        assert min(count for _, count in asked) > most  # no tie
        return {word for word, _ in asked}
    needles = read_needles(text)
    return {value for name, values in needles.items() if f"the {name}" in question for value in values}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_text(kind):
    for length in LENGTHS.get(kind, (700, 3000)):
        for record in made(kind, length):
            (text,) = record.contexts
            assert solve(kind, text, record.question) == set(record.answers)
            assert length - 70 - (length >= 4096) * 200 * (kind == "common_words") < len(text) <= length


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_a_function_of_the_seed_and_the_number(kind):
    first = made(kind, 1000)
    assert made(kind, 1000, samples=2) == first[:2]
    assert len({record.contexts for record in (*first, *made(kind, 1000, seed=43))}) == 10
    longer = made(kind, 2000)
    assert [(r.question, r.answers, r.depths) for r in longer] == [(r.question, r.answers, r.depths) for r in first]


def test_needles():
    counts = {"single": (1, 1, 1), "multi_key": (4, 1, 1), "multi_value": (1, 4, 4), "multi_query": (4, 1, 4)}
    for kind, (keys, each, answers) in counts.items():
        for record in made(kind, 2000):
            (text,) = record.contexts
            needles = read_needles(text)
            assert [len(needles), *map(len, needles.values())] == [keys] + [each] * keys
            assert len(record.answers) == len(set(record.answers)) == len(record.depths) == answers
            for answer, depth in zip(record.answers, record.depths, strict=True):
                assert text.index(answer) / len(text) == pytest.approx(depth, abs=0.1)


def test_depths_are_spread():
    depths = sorted(record.depths[0] for record in made("single", 500, samples=20))
    assert depths[0] < 0.08
    assert depths[-1] > 0.92
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.1


def test_haystack(tmp_path):
    (tmp_path / "a.txt").write_text("One is here.  Two\nfollows! Is three last? Yes")
    sentences = sentences_of(tmp_path / "a.txt")
    assert sentences == ["One is here.", "Two follows!", "Is three last?", "Yes"]
    for record in made("single", 900, haystack=sentences):
        text = re.sub(r"A secret number of the \w+ \w+ is \d+\. ?", "", record.contexts[0]).strip()
        around = " ".join(sentences * 30)
        assert text in around
        assert len(text) > 800
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(ValueError, match="b.txt: .*empty .*haystack"):
        sentences_of(tmp_path / "b.txt")


def test_too_short():
    with pytest.raises(ValueError, match="multi_query-0 has 1.. tokens .* 99"):
        made("multi_query", 99)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_all_finds_all(kind):
    """Whoever reads contexts and prompt is right; whoever reads the prompt alone is not always."""
    config = Synthetic(
        axis=(500, 4000), samples=6, seeds=(1, 2), kind=kind, window=900, chunk_length=100, max_new_tokens=80
    )

    def reader(read):
        def says(prompt):
            *_, question = read(prompt).split("Question: ")
            return " " + ", ".join(sorted(solve(kind, read(prompt), question)))[:79]

        return Scripted(says)

    whole = reader(whole_text)
    results = list(config.measure(Point("", 4000), whole))
    assert len({result["id"] for result in results}) == 12
    for result, prompt in zip(results, whole.asked, strict=True):
        assert result["read"] + 80 <= 4000
        assert result["read"] + 80 > 4000 - 250
        assert len(prompt.ids) == 900 - 80
        assert all(len(context) == 100 for context in prompt.contexts[1:])
        assert config.values(result) == {"match_all": 1, "match_part": 1}
    if kind not in ("common_words", "frequent_words"):
        half_blind = reader(lambda prompt: Letters().decode(prompt.ids))
        found = [config.values(result)["match_all"] for result in config.measure(Point("", 4000), half_blind)]
        assert sum(found) < 0.7 * len(found)
        assert "depths" in results[0]


def test_samples_are_needed():
    with pytest.raises(ValueError, match="samples is missing"):
        Synthetic(axis=(500,))
