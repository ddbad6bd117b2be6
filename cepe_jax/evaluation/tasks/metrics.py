"""Metrics of predictions: DrQA's and SQuAD's text matches, RULER's, ROUGE; and accuracies of a choice.

Each metric compares one prediction with all right answers; the best of them counts, 0 to 1.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


def normalise(text: str) -> str:
    """Return the text without case, punctuation and articles, its words apart by one space (DrQA, SQuAD).

    As in the official script of SQuAD only ASCII punctuation goes: dashes, curly quotes and accents stay as they are.
    A text of which nothing would remain, such as the name "The The", keeps it: every prediction would contain it.
    """
    text = text.lower()
    words = text.translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", words).split() or words.split() or text.split())


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers are {answers!r}: give a list of one text or more")


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The score with the answer that fits best; 0 where nothing was said."""
    _check_answers(answers)
    return max(float(score(prediction, answer)) for answer in answers) if prediction.strip() else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is an answer, both normalised."""
    return _best(lambda text, answer: normalise(text) == normalise(answer), prediction, answers)


def substring_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if an answer stands anywhere in the prediction, both normalised."""
    return _best(lambda text, answer: normalise(answer) in normalise(text), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, both normalised."""

    def score(text: str, answer: str) -> float:
        words, answer_words = normalise(text).split(), normalise(answer).split()
        same = (Counter(words) & Counter(answer_words)).total()
        return 2 * same / (len(words) + len(answer_words))

    return _best(score, prediction, answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains an answer, whatever its case (RULER, of questions with one answer)."""
    return _best(lambda text, answer: answer.lower() in text.lower(), prediction, answers)


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction contains, whatever their case (RULER)."""
    _check_answers(answers)
    return sum(match_part(prediction, [answer]) for answer in answers) / len(answers)


@cache
def _rouge_scorer(kind: str):
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise ValueError(f"{kind} needs a library: pip install '.[evaluation]' in the checkout") from error
    return rouge_scorer.RougeScorer([kind], use_stemmer=True)


def rouge(kind: str) -> Callable[[str, Sequence[str]], float]:
    """The metric rouge1, rouge2, rougeL or rougeLsum: F of stemmed words, by the library `rouge-score`.

    rougeLsum compares sentence by sentence; a sentence ends with a line, or with . ! ? before white space.
    """

    def lines(text: str) -> str:
        return SENTENCE_ENDS.sub("\n", text) if kind == "rougeLsum" else text

    def score(text: str, answer: str) -> float:
        return _rouge_scorer(kind).score(lines(answer), lines(text))[kind].fmeasure

    return lambda prediction, answers: _best(score, prediction, answers)


ROUGE = "rouge1", "rouge2", "rougeL"
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "substring_match": substring_match,
    "f1": f1,
    "match_part": match_part,
    "match_all": match_all,
    **{kind: rouge(kind) for kind in (*ROUGE, "rougeLsum")},
}


def accuracies(
    right: Sequence[bool],
    log_probs: Sequence[float],
    lengths: Sequence[int],
    domain_log_probs: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return 1 if the most probable choice is right: by its log probability, by that of a token, and calibrated.

    `lengths`: tokens of each choice. Calibrated is log p(choice | prompt) - log p(choice | domain prompt).
    """
    if not any(right):
        raise ValueError("none of the choices is right: give answers that are among them")
    scores = {"accuracy": log_probs, "accuracy_normalised": [p / n for p, n in zip(log_probs, lengths, strict=True)]}
    if domain_log_probs is not None:
        scores["accuracy_calibrated"] = [p - q for p, q in zip(log_probs, domain_log_probs, strict=True)]
    return {name: float(right[max(range(len(right)), key=of.__getitem__)]) for name, of in scores.items()}


def means(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over examples.

    Where rouge1, rouge2 and rougeL are among them: `rouge` too, the geometric mean of these means, the score of SCROLLS
    and ZeroSCROLLS. ValueError for no examples.
    """
    if not values:
        raise ValueError("no predictions: a metric needs one or more")
    averages = {name: sum(value[name] for value in values) / len(values) for name in values[0]}
    if set(ROUGE) <= set(averages):
        product = averages["rouge1"] * averages["rouge2"] * averages["rougeL"]
        averages["rouge"] = product ** (1 / 3)
    return averages
