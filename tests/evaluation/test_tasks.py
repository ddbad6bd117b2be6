"""Tasks, as a model meets them: what is asked, and how what it says counts. The model is scripted."""

import json
from pathlib import Path

import pytest
from support.fakes import BOS, Letters, Scripted, whole_text

from cepe_jax.evaluation.sweep.grid import TaskRun
from cepe_jax.evaluation.tasks.document import Document
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.icl import Icl
from cepe_jax.evaluation.tasks.protocols import Template, Words
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.settings import decode


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def text(ids) -> str:
    return Letters().decode(ids)


@pytest.fixture
def qa(tmp_path):
    """Twelve questions with four passages each; the answer of question n stands in its passage number n % 4."""
    write(
        tmp_path / "test.jsonl",
        (
            {
                "id": f"q{n}",
                "question": f"What is {n}?",
                "answers": [f"The number {n}", f"N{n}"],
                "contexts": [f"{n}: N{n}" if c == n % 4 else f"{n}: other {c}" for c in range(4)],
                "scores": [4.0, 3.0, 2.0, 1.0],
            }
            for n in range(12)
        ),
    )
    train = ({"question": f"T{n}?", "answers": [f"A{n}", "else"], "contexts": [f"c{n}", "no"]} for n in range(20))
    write(tmp_path / "train.jsonl", train)
    return tmp_path


def test_qa_prompt(qa):
    model = Scripted(lambda prompt: " N1\nQuestion: what else?")
    config = Qa(axis=(0, 2), data=qa, samples=5, passages=2, demonstrations=1)
    (*_,) = results = list(config.measure(Point("", 2), model))
    assert len(results) == len(model.asked) == 5
    for result, prompt in zip(results, model.asked, strict=True):
        seed, name = result["id"].split(":")
        n = int(name[1:])
        assert seed == "42"
        read = [f"{n}: N{n}" if c == n % 4 else f"{n}: other {c}" for c in range(4)]
        assert prompt.ids[0] == BOS
        shown, *rest = text(prompt.ids).split("\n\nQuestion: ", 1)
        number = shown.removeprefix("Passage: c")
        assert rest == [
            f"T{number}?\nAnswer: A{number}\n\nPassage: {read[0]}\n\nPassage: {read[1]}\n\n"
            f"Question: What is {n}?\nAnswer:"
        ]
        # The worst stands first, each with its score and what parts it from the next.
        assert [text(ids) for ids in prompt.contexts] == [f"Passage: {read[3]}\n\n", f"Passage: {read[2]}\n\n"]
        assert list(prompt.scores) == [1.0, 2.0]
        assert result["prediction"] == " N1"
        assert result["read"] == len(whole_text(prompt)) + 1
        found = config.values(json.loads(json.dumps(result)))
        assert found == {"exact_match": n == 1, "substring_match": n == 1, "f1": n == 1}
    assert {int(result["id"].split(":q")[1]) for result in results} != set(range(5))  # not the first ones


def test_qa_axis_changes_the_contexts_alone(qa):
    asked = {}
    for axis in (0, 1, 2):
        model = Scripted(lambda prompt: "x")
        list(Qa(axis=(0, 1, 2), data=qa, passages=2).measure(Point("", axis), model))
        asked[axis] = model.asked
    assert [p.ids for p in asked[0]] == [p.ids for p in asked[1]] == [p.ids for p in asked[2]]
    assert all(not p.contexts and not p.scores for p in asked[0])
    assert [list(p.contexts[1:]) for p in asked[2]] == [list(p.contexts) for p in asked[1]]


def test_choice_is_a_function_of_seed_and_id(qa):
    def asked(**options):
        model = Scripted(lambda prompt: "x")
        results = list(Qa(axis=(0,), data=qa, passages=1, **options).measure(Point("", 0), model))
        return {result["id"]: text(prompt.ids) for result, prompt in zip(results, model.asked, strict=True)}

    some, both = asked(samples=4, seeds=(43,)), asked(samples=4, seeds=(42, 43))
    assert len(both) == 8
    assert {name: both[name] for name in some} == some
    every = asked(seeds=(43,))
    assert {name: every[name] for name in some} == some
    assert {name.split(":")[1] for name in both if name.startswith("42")} != {name.split(":")[1] for name in some}
    lines = (qa / "test.jsonl").read_text().splitlines()
    (qa / "test.jsonl").write_text("\n".join(reversed(lines)))
    assert asked(samples=4, seeds=(43,)) == some
    demonstrations = {prompt.split("\n\nPassage: ")[0] for prompt in every.values()}
    assert len(demonstrations) > 6


def test_demonstrations_do_not_ask_the_same(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": "T1?", "answers": ["A1"], "contexts": ["c"]}])
    train = [{"question": f"T{n // 2}?", "answers": [f"A{n % 3}"], "contexts": ["c"]} for n in range(8)]
    write(tmp_path / "train.jsonl", train)
    model = Scripted(lambda prompt: "x")
    list(Qa(axis=(0,), data=tmp_path, passages=1, demonstrations=3).measure(Point("", 0), model))
    shown = text(model.asked[0].ids).split("Question: ")
    assert sorted(part.split("\n")[0] for part in shown[1:-1]) == ["T0?", "T2?", "T3?"]
    with pytest.raises(ValueError, match="record 1: 4 demonstrations .* 3 "):
        list(Qa(axis=(0,), data=tmp_path, passages=1, demonstrations=4).measure(Point("", 0), model))


def test_too_few_contexts(qa):
    with pytest.raises(ValueError, match=" 4 contexts, and 3 .*decoder .*2 .*encoder"):
        next(Qa(axis=(2,), data=qa, passages=3).measure(Point("", 2), Scripted()))


def test_own_demonstrations_and_words(tmp_path):
    shown = [{"question": "1+1", "answer": "2", "contexts": ["sums", "more"]}, {"question": "3+3", "answer": "6"}]
    record = {"question": "{2}+2", "answers": ["4"], "contexts": ["a {b}"], "demonstrations": shown}
    write(tmp_path / "a.jsonl", [record])
    template = Words("Add.", "({context})", "{question} =", " {answer}.")
    model = Scripted(lambda prompt: " 4.\n")
    config = Qa(axis=(0,), data=tmp_path / "a.jsonl", passages=1, template=template, metrics=("f1",))
    (result,) = config.measure(Point("", 0), model)
    assert text(model.asked[0].ids) == "Add.\n\n(sums)\n\n1+1 = 2.\n\n3+3 = 6.\n\n(a {b})\n\n{2}+2 ="
    assert config.values(result) == {"f1": 1.0}
    with pytest.raises(ValueError, match="record 1 has 2 demonstrations, and 3 .*decoder"):
        next(Qa(axis=(0,), data=tmp_path / "a.jsonl", passages=1, demonstrations=3).measure(Point("", 0), model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "rag"}, "family is 'rag': .*qa"),
        ({"family": "synthetic", "kind": "two"}, "kind is 'two': .*single"),
        ({"window": 2048}, "window is 2048, .* qa .*leave it out"),
        ({"overflow": "passages"}, "overflow is passages, .* qa "),
        ({"kind": "multi_key"}, "kind is multi_key, .* qa "),
        ({"family": "document", "passages": 3}, "passages is 3, .* document "),
        ({"family": "document", "demonstrations": 0}, "demonstrations is 0, .* document "),
        ({"family": "icl", "max_new_tokens": 9}, "max_new_tokens is 9, .* icl "),
        ({"family": "icl", "metrics": ["f1"]}, "metrics is .* icl "),
        ({"family": "synthetic"}, "data is x.jsonl, .* synthetic "),
        ({"window_size": 7}, "unknown setting window_size: did you mean window"),
        ({"template": {"question": "{question:99999999999}"}}, "template.question is '.*9}': .*{question}"),
        ({"template": {"context": "{context!r}"}}, "template.context is '.*r}': .*{context}"),
        ({"template": {"question": "?"}}, "template.question is '.': .*{question}"),
        ({"family": "document", "overflow": "error"}, "overflow is 'error': .*passages"),
        ({"axis": []}, r"axis is \[\]"),
        ({"axis": [5, 5]}, r"axis is \[5, 5\]: .*different"),
        ({"axis": [-1]}, "0 or more"),
        ({"seeds": []}, "seeds are"),
        ({"seeds": [-1]}, r"seeds is \[-1\]: "),
        ({"axis": [True]}, r"axis is \[True\]: "),
        ({"samples": 0}, "samples is 0: "),
        ({"passages": -1}, "passages is -1: "),
        ({"metrics": []}, r"metrics is \[\]"),
        ({"metrics": ["bleu"]}, "metric bleu: .*exact_match"),
    ],
)
def test_config_faults(options, message):
    """A command names what is at fault, also a setting that the family does not read."""
    settings = {"family": "qa", "axis": [0], "data": "x.jsonl", "model": {"path": "m"}, "out": "o"}
    with pytest.raises(ValueError, match=message):
        decode(TaskRun, settings | options)


def test_template_faults():
    for name in ("question", "answer", "context"):
        with pytest.raises(ValueError, match=f"template.{name} is 'no place'.*{{{name}}}"):
            Template(**{name: "no place"})
    with pytest.raises(ValueError, match=r"template.question is '{question} \{' .*brace .*twice"):
        Template(question="{question} {")


def test_words_that_are_not_given_stay():
    template = Icl(
        axis=(0,), data=Path("x"), layout="banking77", template=Words("Label it.", answer=" -> {answer}")
    ).protocol
    assert template.template == Template("Label it.", "{context}", "Query: {question}\nIntent:", " -> {answer}")
    template = Qa(axis=(0,), data=Path("x"), template=Words(question="{question}")).protocol.template
    assert template == Template("", "Passage: {context}", "{question}", " {answer}")
    assert Document(axis=(0,), data=Path("x"), template=Words("")).protocol.template == Template("")


def test_what_a_model_refuses_names_the_record(qa):
    def says(prompt):
        raise ValueError("too long")

    with pytest.raises(ValueError, match=r"^record q\d+: too long$"):
        list(Qa(axis=(0,), data=qa, passages=1).measure(Point("", 0), Scripted(says)))


def test_data_faults(qa, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no .*: put there "):
        next(Qa(axis=(0,), data=tmp_path / "nowhere").measure(Point("", 0), Scripted()))
    with pytest.raises(ValueError, match="samples is 13 .* 12 records"):
        next(Qa(axis=(0,), data=qa, samples=13).measure(Point("", 0), Scripted()))
    with pytest.raises(ValueError, match=r"\b1 .*axis \[0\]"):
        next(Qa(axis=(0,), data=qa).measure(Point("", 1), Scripted()))


def icl_model():
    """Prefers the label whose demonstrations it saw, in proportion; and 'maybe so' where there is nothing to see."""

    def log_prob(prompt, continuation):
        if text(prompt.ids) == "Input: \nLabel:":
            return {" no": -6.0, " yes": -3.0, " maybe so": -0.5}[continuation]
        return -len(continuation) + whole_text(prompt).count(f"Label:{continuation}\n")

    return Scripted(log_prob=log_prob)


@pytest.fixture
def icl(tmp_path):
    """Labels are words of the text. Half of the training set says yes, and a tenth no."""
    labels = ["yes", "maybe so", "yes", "maybe so", "yes", "no", "yes", "maybe so", "yes", "maybe so"]
    for name, count in ("train", 60), ("test", 10):
        lines = [
            {"question": f"{name} {n}", "answers": [labels[n % 10]], "choices": ["yes", "no", "maybe so"]}
            for n in range(count)
        ]
        write(tmp_path / f"{name}.jsonl", lines)
    return tmp_path


def test_icl(icl):
    asked = {}
    for axis in (0, 3, 7):
        model = icl_model()
        config = Icl(axis=(0, 3, 7), data=icl, samples=6)
        results = list(config.measure(Point("", axis), model))
        domain = [prompt for prompt in model.asked if text(prompt.ids) == "Input: \nLabel:"]
        assert len(domain) == 1  # the choices are the same: they are asked for once
        assert not domain[0].contexts
        asked[axis] = [prompt for prompt in model.asked if prompt is not domain[0]]
        for result, prompt in zip(results, asked[axis], strict=True):
            assert len(prompt.contexts) == axis
            shown = whole_text(prompt).split("Input: ")[1:-1]
            assert len(shown) == 2 + axis
            assert len(set(shown)) == len(shown)
            assert all(one.startswith("train ") and one.endswith("\n\n") for one in shown)
            counts = [sum(f"Label: {label}\n" in one for one in shown) for label in ("yes", "no", "maybe so")]
            assert max(counts) - min(counts) <= 1  # balanced, though the training set is not
            sums = [count - len(label) - 1 for count, label in zip(counts, ("yes", "no", "maybe so"), strict=True)]
            assert result["log_probs"] == sums
            found = config.values(json.loads(json.dumps(result)))
            best = lambda scores: ["yes", "no", "maybe so"][scores.index(max(scores))]  # noqa: E731
            (answer,) = result["answers"]
            per_token = [score / length for score, length in zip(sums, (4, 3, 9), strict=True)]
            calibrated = [score - base for score, base in zip(sums, (-3, -6, -0.5), strict=True)]
            assert found == {
                "accuracy": best(sums) == answer,
                "accuracy_normalised": best(per_token) == answer,
                "accuracy_calibrated": best(calibrated) == answer,
            }
    for few, many in (0, 3), (3, 7):  # more demonstrations are more of the same
        assert [p.ids for p in asked[few]] == [p.ids for p in asked[many]]
        assert [p.contexts for p in asked[few]] == [p.contexts[:few] for p in asked[many]]


def test_icl_needs_choices(icl):
    write(icl / "test.jsonl", [{"question": "Q", "answers": ["yes"]}])
    with pytest.raises(ValueError, match="record 1 .*choices: .* icl "):
        next(Icl(axis=(0,), data=icl).measure(Point("", 0), icl_model()))


WORDS = " ".join(f"w{n:03}" for n in range(200))  # 999 letters


def document_task(tmp_path, axis, options={}, **fields):  # noqa: B006 (never changed)
    write(tmp_path / "a.jsonl", [{"question": "Which?", "answers": ["w7"], "contexts": [WORDS]} | fields])
    given = {"axis": axis, "data": tmp_path / "a.jsonl", "window": 200, "chunk_length": 64}
    return Document(**given | {"max_new_tokens": 20, "template": Words("Look it up.", question="{question}")} | options)


ASKED = "\n\nLook it up.\n\nWhich?"


def test_document_is_cut_by_the_window(tmp_path):
    for axis in (0, 100, 5000):
        model = Scripted(lambda prompt: "w7 and")
        config = document_task(tmp_path, (0, 100, 5000))
        (result,) = config.measure(Point("", axis), model)
        (prompt,) = model.asked
        assert len(prompt.ids) == 200 - 20
        assert (WORDS + ASKED).endswith(text(prompt.ids))
        assert text(prompt.ids).endswith(ASKED)
        lengths = [len(context) for context in prompt.contexts]
        moved = len(WORDS + ASKED) - 179
        assert sum(lengths) == min(axis, moved)
        assert all(length == 64 for length in lengths[1:])
        assert all(0 < length <= 64 for length in lengths)
        assert (WORDS + ASKED).endswith(whole_text(prompt))
        assert config.values(result) == {"f1": pytest.approx(2 / 3)}


def test_document_by_passages(tmp_path):
    contexts = ["a" * 50 + "\n\n" + "b" * 90, "c" * 60]
    model = Scripted(lambda prompt: "x")
    options = {"overflow": "passages", "window": 110}
    list(document_task(tmp_path, (100, 1000), options, contexts=contexts).measure(Point("", 100), model))
    list(document_task(tmp_path, (100, 1000), options, contexts=contexts).measure(Point("", 1000), model))
    for prompt in model.asked:
        assert text(prompt.ids) == "c" * 60 + ASKED
    few, many = ([text(ids) for ids in prompt.contexts] for prompt in model.asked)
    assert few == ["a" * 6 + "\n\n", "b" * 90 + "\n\n"]
    assert many == ["a" * 50 + "\n\n", "b" * 90 + "\n\n"]


def test_document_choices(tmp_path):
    """The longest choice fits beside the prompt, and the metric is accuracy."""
    model = Scripted(log_prob=lambda prompt, continuation: {" A": -3.0, " BB": -1.0, " CCC": -2.0}[continuation])
    config = document_task(tmp_path, (300,), choices=["A", "BB", "CCC"], answers=["BB"])
    (result,) = config.measure(Point("", 300), model)
    assert len(model.asked[0].ids) == 200 - 4
    assert sum(map(len, model.asked[0].contexts)) == 300
    assert config.values(result) == {"accuracy": 1, "accuracy_normalised": 1}
    assert "domain_log_probs" not in result


def test_choices_in_some_records_alone(tmp_path):
    config = document_task(tmp_path, (0,))
    rows = [
        {"question": "Which?", "answers": ["A"], "contexts": []},
        {"question": "Or?", "answers": ["A"], "choices": ["A"]},
    ]
    write(config.data, rows)
    with pytest.raises(ValueError, match="a.jsonl: .*choices .*not"):
        next(config.measure(Point("", 0), Scripted()))


def test_document_that_fits_has_no_contexts(tmp_path):
    model = Scripted(lambda prompt: "x")
    list(document_task(tmp_path, (300,), contexts=["short"]).measure(Point("", 300), model))
    assert not model.asked[0].contexts
    assert text(model.asked[0].ids) == "short" + ASKED


def test_question_that_does_not_fit(tmp_path):
    (result,) = document_task(tmp_path, (300,), {"window": 40}).measure(Point("", 300), Scripted(lambda prompt: "x"))
    assert result["read"] == 20 + 300  # the window is full of BOS and the question
    with pytest.raises(ValueError, match="record 1: .* have 19 tokens, and .* window of 39 leaves 18.*raise window"):
        list(document_task(tmp_path, (300,), {"window": 39}).measure(Point("", 300), Scripted()))


def test_a_long_passage_stays_whole(qa):
    """It has one weight, however many chunks an encoder makes of it."""
    model = Scripted(lambda prompt: "x")
    list(Qa(axis=(2,), data=qa, samples=1, passages=1, chunk_length=10).measure(Point("", 2), model))
    (prompt,) = model.asked
    assert [len(context) > 10 for context in prompt.contexts] == [True, True]
    assert list(prompt.scores) == [2.0, 3.0]
    assert prompt.chunk_length == 10
