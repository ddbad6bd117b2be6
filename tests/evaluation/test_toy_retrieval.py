"""Full context, retrieval into the decoder and into CEPE's encoder, on planted facts; three seeds.

17 CPU-minutes: these say that retrieved chunks are worth what their recall is, whoever reads them. The table of
`cepe_jax/evaluation/README.md` is printed.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.facts import CEPE_STAGES, DECODER_STAGES, DOCUMENTS, Corpus, tuned, with_encoder, words, write_tokenizer
from support.toys import trained

from cepe_jax.evaluation.readers.models import ModelConfig, load_model
from cepe_jax.evaluation.tasks.protocols import Words
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.retrieved import Retrieve
from cepe_jax.weights.source import save

pytestmark = pytest.mark.slow
KS = 1, 2, 4, 8
CORPORA = 4  # for each seed, with a question for every fact
SEEDS = 0, 1, 2


def write_corpus(home: Path, rng: np.random.Generator) -> None:
    """Write a folder of documents, and questions that have all of them as contexts."""
    corpus, names = Corpus.draw(rng), words()
    texts = [" ".join(names[word] for word in document) for document in corpus.documents_DL]
    (home / "documents").mkdir(parents=True)
    for number, text in enumerate(texts):
        (home / "documents" / f"{number:02}.txt").write_text(text)
    lines = []
    for document in range(DOCUMENTS):
        for fact in (0, 1):
            question = " ".join(names[word] for word in corpus.question(rng, document, fact))
            answers = [names[corpus.values_D2[document, fact]]]
            lines.append({"id": f"{document}.{fact}", "question": question, "answers": answers, "contexts": texts})
    (home / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def means(home: Path, model, **settings) -> dict[int, dict[str, float]]:
    """k -> accuracy, recall, tokens and seconds to the first token, over all corpora."""
    template = Words(question="{question}", context="{context}")
    usual = {"template": template, "demonstrations": 0, "max_new_tokens": 1, "metrics": ("exact_match",)}
    found: dict[int, list[dict]] = {}
    for number in range(CORPORA):
        place = home / f"corpus{number}"
        retrieve = settings and Retrieve(corpus=place / "documents", k=KS, **settings)
        given = {"retrieve": retrieve} if retrieve else {"passages": DOCUMENTS, "axis": (0,)}
        qa = Qa(data=place / "questions.jsonl", **given, **usual)
        for point in qa.points():
            for record in list(qa.measure(point, model))[1:]:  # the first one waits for compilation
                found.setdefault(point.value, []).append(record | {"recall": 1.0} | record | qa.values(record))
    columns = {"accuracy": "exact_match", "recall": "recall", "tokens": "read"}
    results = {}
    for k, records in found.items():
        results[k] = {name: float(np.mean([record[key] for record in records])) for name, key in columns.items()}
        results[k]["seconds"] = float(np.median([record["first_seconds"] for record in records]))
    return results


@pytest.fixture(scope="module", params=SEEDS)
def results(request, tmp_path_factory) -> dict[str, dict[int, dict[str, float]]]:
    """Reader -> k (0: all documents) -> what it costs and gives."""
    home, seed = tmp_path_factory.mktemp("toy"), request.param
    write_tokenizer(home)
    rng = np.random.default_rng(seed)
    for number in range(CORPORA):
        write_corpus(home / f"corpus{number}", rng)
    base = trained(seed)
    save(tuned(base, DECODER_STAGES, seed), home / "decoder", assets=home)
    save(tuned(with_encoder(base, seed), CEPE_STAGES, seed), home / "cepe", assets=home)
    decoder = load_model(ModelConfig(home / "decoder", reads="decoder"))
    cepe = load_model(ModelConfig(home / "cepe"))
    results = {
        "all documents, decoder": means(home, decoder),
        "retrieved, decoder": means(home, decoder, into="decoder"),
        "retrieved, encoder": means(home, cepe, into="encoder"),
    }
    for reader, row in results.items():
        for k, values in row.items():
            shown = f"{values['accuracy']:.1%} | {values['recall']:.1%} | {values['tokens']:.0f}"
            print(f"| {seed} | {reader} | {k or DOCUMENTS} | {shown} | {1000 * values['seconds']:.1f} |", flush=True)
    return results


@pytest.mark.parametrize("reader", ["retrieved, decoder", "retrieved, encoder"])
def test_accuracy_follows_recall(results, reader):
    """No value is in two documents, so that a reader without the one that says it has to guess."""
    row = results[reader]
    for values in row.values():
        assert values["accuracy"] < values["recall"] + 0.03
        assert values["accuracy"] > 0.9 * values["recall"] - 0.03
    assert row[1]["recall"] < 0.5 < 0.9 < row[8]["recall"]
    assert row[8]["accuracy"] > row[1]["accuracy"] + 0.3


def test_all_documents_are_more_tokens_for_no_more_answers(results):
    (everything,) = results["all documents, decoder"].values()
    best = results["retrieved, encoder"][8]
    assert best["tokens"] < 0.5 * everything["tokens"]
    assert best["accuracy"] > everything["accuracy"] - 0.1
