"""Metrics against the definitions as published, written out by hand, and against `rouge-score` called directly."""

import random

import pytest
from rouge_score import rouge_scorer as scorer

from cepe_jax.evaluation.tasks.metrics import (
    METRICS,
    accuracies,
    exact_match,
    f1,
    match_all,
    means,
    normalise,
    substring_match,
)

WORDS = ["the", "The", "a", "An", "cat", "Cat.", "sat-on", "42", "it's", "…", "—", "mat,", "U.S.", "the-end", "\n", "é"]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def squad_words(text: str) -> list[str]:
    """SQuAD's: lower case, ASCII punctuation dropped, then a, an and the where they stand as words."""
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    words = "".join(letter if letter.isalnum() or letter == "_" else f" {letter} " for letter in kept).split()
    gone = {"a", "an", "the"}
    # Articles beside what is neither letter nor digit, such as a dash of Unicode, are words too.
    return " ".join(word for word in words if word not in gone).split()


def test_normalise():
    assert normalise("  The  quick-brown\tFox, an\nU.S. a.") == "quickbrown fox us"
    assert normalise("theatre a") == "theatre"
    assert normalise("The The") == "the the"
    assert normalise("“The–end” − 5") == "“ –end” − 5"


def test_text_matches_are_those_of_squad():
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        said, *answers = (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(3))
        if not all(map(squad_words, (said, *answers))):
            continue
        bags = [squad_words(answer) for answer in answers]
        mine = squad_words(said)
        exact = float(mine in bags)
        overlap = []
        for bag in bags:
            left, same = list(bag), 0
            for word in mine:
                if word in left:
                    left.remove(word)
                    same += 1
            precision, recall = same / len(mine), same / len(bag)
            overlap.append(2 * precision * recall / (precision + recall) if same else 0.0)
        assert exact_match(said, answers) == exact
        assert f1(said, answers) == pytest.approx(max(overlap))
        assert substring_match(said, answers) == any(" ".join(bag) in " ".join(mine) for bag in bags)
        seen.add((exact, round(max(overlap), 1)))
    assert len(seen) > 8


def test_the_best_answer_counts():
    assert exact_match("Paris!", ["London", "the paris"]) == 1
    assert exact_match("Paris, France", ["paris"]) == 0
    assert substring_match("It is Paris, France", ["Rome", "paris"]) == 1
    assert substring_match("", ["paris"]) == 0
    assert f1("the city of Paris", ["Paris", "city Paris"]) == pytest.approx(0.8)


@pytest.mark.parametrize("name", METRICS)
def test_no_answers_and_nothing_said(name):
    assert METRICS[name](" \n", ["a", "The The"]) == 0
    assert METRICS[name]("anything goes", ["anything goes"]) == pytest.approx(1)
    for none in ([], "anything"):
        with pytest.raises(ValueError, match="answers are .*list"):
            METRICS[name]("anything goes", none)


def test_a_name_of_articles_alone_is_not_in_every_text():
    assert substring_match("Queen", ["The The"]) == 0
    assert substring_match("Queen", ["!!!"]) == 0
    assert exact_match("The the!", ["The The"]) == 1
    assert exact_match("!!!", ["!!!"]) == 1


def test_ruler():
    assert match_all("They are 12 and ABC.", ["12", "abc", "77"]) == pytest.approx(2 / 3)
    assert METRICS["match_part"]("They are 12 and ABC.", ["77", "abc"]) == 1
    assert METRICS["match_part"]("They are 12 and ABC.", ["77", "the"]) == 1  # RULER looks for letters, not for words
    assert METRICS["match_part"]("They are 12.", ["77"]) == 0


def test_rouge_is_that_of_the_library():
    said = "The cats were sitting. Dogs sat outside the house! Why"
    answers = ["A cat sits on mats.\nThe dogs are sitting outside. Why", "dogs outside", "Why. Dogs sat. The cats sat"]
    split = [text.replace(". ", ".\n").replace("! ", "!\n") for text in answers]
    for name in ("rouge1", "rouge2", "rougeL"):
        found = [scorer.RougeScorer([name], use_stemmer=True).score(answer, said)[name].fmeasure for answer in answers]
        assert METRICS[name](said, answers) == pytest.approx(max(found))
    by_lines = scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    said_lines = said.replace(". ", ".\n").replace("! ", "!\n")
    found = [by_lines.score(answer, said_lines)["rougeLsum"].fmeasure for answer in split]
    assert METRICS["rougeLsum"](said, answers) == pytest.approx(max(found))
    assert METRICS["rougeLsum"](said, answers[2:]) > METRICS["rougeL"](said, answers[2:])  # sentences in another order
    assert METRICS["rouge1"]("running", ["runs"]) == 1  # stemmed


def test_accuracies():
    """Three scores of the same numbers can take three different choices."""
    log_probs, lengths, domain = [-4.0, -6.0, -5.0], [1, 4, 1], [-1.0, -1.0, -9.0]
    assert accuracies([True, False, False], log_probs, lengths, domain) == {
        "accuracy": 1,
        "accuracy_normalised": 0,
        "accuracy_calibrated": 0,
    }
    assert accuracies([False, True, False], log_probs, lengths, domain)["accuracy_normalised"] == 1
    assert accuracies([False, False, True], log_probs, lengths, domain)["accuracy_calibrated"] == 1
    assert set(accuracies([False, True], [-1, -2], [1, 1])) == {"accuracy", "accuracy_normalised"}
    with pytest.raises(ValueError, match="choices .*right"):
        accuracies([False, False], [-1, -2], [1, 1])


def test_means():
    values = [{"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.4}, {"rouge1": 0.3, "rouge2": 0.2, "rougeL": 0.2}]
    found = means(values)
    assert found["rouge1"] == pytest.approx(0.4)
    assert found["rouge"] == pytest.approx((0.4 * 0.1 * 0.3) ** (1 / 3))  # not the mean of 0 and 0.229
    assert means([{"f1": 1.0}, {"f1": 0.0}]) == {"f1": 0.5}
    with pytest.raises(ValueError, match="no predictions"):
        means([])
