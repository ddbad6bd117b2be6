"""Published layouts: three lines of each, as they are published, and what they are as records."""

import json
import re

import numpy as np
import pytest
from support.fakes import Scripted
from support.tfds import prepare

from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.icl import Icl
from cepe_jax.evaluation.tasks.layouts import LAYOUTS, load
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.questions import Question
from cepe_jax.evaluation.tasks.task import FAMILIES


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def passage(title, text, score):
    return {"id": "7", "title": title, "text": text, "score": score, "hasanswer": True}


QA = {
    "nq": [
        {"question": "q1?", "answers": ["a", "b"], "ctxs": [passage("T", "x", "1.5"), passage("U", "y", "0.5")]},
        {"question": "q2?", "answer": ["c"], "ctxs": [passage("", "z", 2)]},
        {"question": "q3?", "answers": ["d"], "ctxs": [{"text": "w"}]},
    ],
    "trivia_qa": [
        {
            "id": "tc_1",
            "question": "q1?",
            "answers": ["a", "", "b"],
            "ctxs": [passage("T", "x", 1.5), passage("U", "y", 0.5)],
        },
        {"id": "tc_2", "question": "q2?", "answers": ["c"], "ctxs": [passage(None, "z", 2)]},
        {"id": "tc_3", "question": "q3?", "answer": "d", "ctxs": [{"title": "", "text": "w"}]},
    ],
    "popqa": [
        {
            "id": 11,
            "question": "q1?",
            "possible_answers": '["a", "b"]',
            "prop": "capital",
            "ctxs": [passage("T", "x", "1.5"), passage("U", "y", "0.5")],
        },
        {"id": 12, "question": "q2?", "possible_answers": '["c"]', "obj": "o", "ctxs": [passage("", "z", "2")]},
        {"id": 13, "question": "q3?", "answers": ["d"], "ctxs": [{"text": "w"}]},
    ],
}
IDS = {"nq": ("1", "2", "3"), "trivia_qa": ("tc_1", "tc_2", "tc_3"), "popqa": ("11", "12", "13")}


@pytest.mark.parametrize("name", QA)
def test_retrieved_passages(tmp_path, name):
    write(tmp_path / "test.jsonl", QA[name])
    records, _ = load(tmp_path, LAYOUTS[name], shows=False)
    assert records == [
        Question(IDS[name][0], "q1?", ("a", "b"), contexts=("T\nx", "U\ny"), scores=(1.5, 0.5)),
        Question(IDS[name][1], "q2?", ("c",), contexts=("z",), scores=(2.0,)),
        Question(IDS[name][2], "q3?", ("d",), contexts=("w",)),
    ]


def test_popqa_shows_its_other_questions(tmp_path):
    write(tmp_path / "test.jsonl", QA["popqa"])
    model = Scripted(lambda prompt: "x")
    config = Qa(axis=(0,), data=tmp_path, layout="popqa", passages=1)
    list(config.measure(Point("", 0), model))
    for prompt in model.asked:
        text = "".join(map(chr, prompt.ids))
        assert sorted(re.findall(r"q\d", text)) == ["q1", "q2", "q3"]
    with pytest.raises(FileNotFoundError, match="train.jsonl, .*demonstrations.*ctxs"):
        next(Qa(axis=(0,), data=tmp_path, layout="nq", passages=1).measure(Point("", 0), model))


# Of each: three published lines, the names that labels.txt has, and of the records question, answer and choices.
ICL = {
    "sst2": (
        [{"sentence": f"s{n} ", "label": n % 2, "idx": n} for n in range(3)],
        None,
        [("s0", "negative"), ("s1", "positive"), ("s2", "negative")],
        ["negative", "positive"],
    ),
    "sst5": (
        [{"text": f"s{n}", "label": n, "label_text": "?"} for n in (0, 2, 4)],
        None,
        [("s0", "terrible"), ("s2", "okay"), ("s4", "great")],
        ["terrible", "bad", "okay", "good", "great"],
    ),
    "mr": (
        [{"text": f"s{n}", "label": n} for n in (1, 0, 1)],
        None,
        [("s1", "positive"), ("s0", "negative"), ("s1", "positive")],
        ["negative", "positive"],
    ),
    "ag_news": (
        [{"text": f"s{n}", "label": n} for n in (0, 1, 3)],
        None,
        [("s0", "World"), ("s1", "Sports"), ("s3", "Sci/Tech")],
        ["World", "Sports", "Business", "Sci/Tech"],
    ),
    "trec_coarse": (
        [{"text": f"s{n}", "coarse_label": n, "fine_label": 0} for n in (0, 3, 5)],
        None,
        [("s0", "abbreviation"), ("s3", "human"), ("s5", "numeric")],
        ["abbreviation", "entity", "description", "human", "location", "numeric"],
    ),
    "trec_fine": (
        [{"text": f"s{n}", "coarse_label": 0, "fine_label": n} for n in (1, 27, 49)],
        None,
        [("s1", "abbreviation expansion"), ("s27", "description reason"), ("s49", "numeric weight")],
        50,
    ),
    "dbpedia": (
        [{"title": "?", "content": f"s{n}", "label": n} for n in (0, 7, 13)],
        None,
        [("s0", "company"), ("s7", "nature"), ("s13", "book")],
        14,
    ),
    "nlu_scenario": (
        [{"text": f"s{n}", "label": n, "scenario": s} for n, s in enumerate(("play", "iot", "alarm"))],
        None,
        [("s0", "play"), ("s1", "iot"), ("s2", "alarm")],
        ["alarm", "iot", "play"],
    ),
    "nlu_intent": (
        [{"text": f"s{n}", "label": n, "scenario": "play"} for n in (1, 0, 2)],
        "alarm_query\niot_hue_lighton\nplay_music\n",
        [("s1", "iot hue lighton"), ("s0", "alarm query"), ("s2", "play music")],
        ["alarm query", "iot hue lighton", "play music"],
    ),
    "banking77": (
        [{"text": f"s{n}", "label": n} for n in (2, 1, 0)],
        "activate_my_card\nage_limit\napple_pay_or_google_pay",
        [("s2", "apple pay or google pay"), ("s1", "age limit"), ("s0", "activate my card")],
        ["activate my card", "age limit", "apple pay or google pay"],
    ),
    "clinic150": (
        [{"text": f"s{n}", "intent": n} for n in (2, 1, 0)],
        "restaurant_reviews\nnutrition_info\naccount_blocked",
        [("s2", "account blocked"), ("s1", "nutrition info"), ("s0", "restaurant reviews")],
        ["restaurant reviews", "nutrition info", "account blocked"],
    ),
}


@pytest.mark.parametrize("name", ICL)
def test_classification(tmp_path, name):
    lines, labels, wanted, choices = ICL[name]
    write(tmp_path / "test.jsonl", lines)
    write(tmp_path / "train.jsonl", lines)
    if labels:
        (tmp_path / "labels.txt").write_text(labels)
    records, shown = load(tmp_path, LAYOUTS[name], shows=True)
    assert [(record.question, record.answers[0]) for record in records] == wanted
    assert [(one.question, one.answer) for one in shown] == wanted
    for record in records:
        assert len(record.choices) == choices if isinstance(choices, int) else list(record.choices) == choices
        assert len(record.answers) == 1


def scrolls(instruction, document, query, output, id="1"):
    text, at = f"{instruction}\n\n{document}\n\n{query}\n\nAnswer:\n", len(instruction) + 2
    query_at = at + len(document) + 2
    return {
        "id": id,
        "pid": id,
        "input": text,
        "output": output,
        "document_start_index": at,
        "document_end_index": at + len(document),
        "query_start_index": query_at,
        "query_end_index": query_at + len(query),
        "truncation_seperator": "...",
    }


OPTIONS = "Question and Possible Answers:\nWhy?\n (A) One.\n (B) Two\n (C) Three\n (D) Four (all)"
ZERO_SCROLLS = {
    name: ([scrolls("Read.", f"Text\n{n}.", query, f"answer {n}", f"i{n}") for n in range(3)], question)
    for name, query, question in (
        ("narrative_qa", "Question:\nWho?", "Who?"),
        ("qasper", "Question:\nWho?", "Who?"),
        ("gov_report", "", ""),
        ("summ_screen_fd", "Summary:", ""),
        ("qmsum", "Query:\nWho?", "Who?"),
    )
}


@pytest.mark.parametrize("name", ZERO_SCROLLS)
def test_zero_scrolls(tmp_path, name):
    lines, question = ZERO_SCROLLS[name]
    write(tmp_path / "test.jsonl", lines)
    records, _ = load(tmp_path, LAYOUTS[name], shows=False)
    assert records == [Question(f"i{n}", question, (f"answer {n}",), contexts=(f"Text\n{n}.",)) for n in range(3)]


def test_quality(tmp_path):
    outputs = ["B", "(D) Four (all)", "Three"]
    write(tmp_path / "test.jsonl", [scrolls("Read.", "Text.", OPTIONS, said, said) for said in outputs])
    records, _ = load(tmp_path, LAYOUTS["quality"], shows=False)
    assert [record.answers for record in records] == [("B",), ("D",), ("C",)]
    assert {record.choices for record in records} == {("A", "B", "C", "D")}
    assert records[0].question == "Why?\n (A) One.\n (B) Two\n (C) Three\n (D) Four (all)"


def test_options(tmp_path):
    """An option without words takes none of the next one's; and only QuALITY has options."""
    empty = "Question and Possible Answers:\nWhy?\n (A)\n (B) Two"
    write(tmp_path / "test.jsonl", [scrolls("Read.", "Text.", empty, "Two")])
    (record,), _ = load(tmp_path, LAYOUTS["quality"], shows=False)
    assert (record.answers, record.choices) == (("B",), ("A", "B"))
    write(tmp_path / "test.jsonl", [scrolls("Read.", "Text.", "Query:\nWhat of\n(A) that?", "It was so.")])
    (record,), _ = load(tmp_path, LAYOUTS["qmsum"], shows=False)
    assert (record.answers, record.choices) == (("It was so.",), ())
    for query, said in (OPTIONS, "Five"), ("Question:\nWhy?", "Two"):
        write(tmp_path / "test.jsonl", [scrolls("Read.", "Text.", query, said)])
        with pytest.raises(ValueError, match=f"test.jsonl:1: output is '{said}': .*options"):
            load(tmp_path, LAYOUTS["quality"], shows=False)


def test_all_layouts_are_tested_and_can_be_asked(tmp_path):
    """Every row through `measure`: its words, its choices and its metrics fit its family."""
    files = QA | {name: lines for name, (lines, *_) in (ICL | ZERO_SCROLLS).items()}
    files["quality"] = [scrolls("Read.", "Text.", OPTIONS, "B")]
    assert set(files) == set(LAYOUTS)
    for name, lines in files.items():
        home = tmp_path / name
        home.mkdir()
        for split in "test", "train":
            write(home / f"{split}.jsonl", lines)
        if name in ICL and ICL[name][1]:
            (home / "labels.txt").write_text(ICL[name][1])
        options = {"qa": {"passages": 1, "demonstrations": 1}, "icl": {"demonstrations": 1}, "document": {}}
        config = FAMILIES[LAYOUTS[name].family](axis=(0,), data=home, layout=name, **options[LAYOUTS[name].family])
        model = Scripted(lambda prompt: "x", lambda prompt, continuation: 0.0)
        assert len(list(config.measure(Point("", 0), model))) == len(lines)


def test_faults(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": "q", "answers": ["a"], "ctxs": [{"title": "T"}]}])
    with pytest.raises(ValueError, match="test.jsonl:1: text: holds None"):
        load(tmp_path, LAYOUTS["nq"], shows=False)
    for line in 7, ["question"], {"question": "q", "answers": ["a"], "ctxs": ["T"]}:
        write(tmp_path / "test.jsonl", [line])
        with pytest.raises(ValueError, match=r"test.jsonl:1: (holds (7|a list of 1)|ctxs: \[0\] is 'T')"):
            load(tmp_path, LAYOUTS["nq"], shows=False)
    asked = {"question": "q", "ctxs": []}
    for wrong, said in ("5", ": holds 5"), ("oops", " is not JSON"), (5, ": holds 5"):
        write(tmp_path / "test.jsonl", [asked | {"possible_answers": wrong}])
        with pytest.raises(ValueError, match=f"test.jsonl:1: possible_answers{said}"):
            load(tmp_path, LAYOUTS["popqa"], shows=False)
    for score in "abc", "9" * 999, "[" * 100_000, None:
        write(tmp_path / "test.jsonl", [asked | {"answers": ["a"], "ctxs": [passage("T", "x", score)]}])
        with pytest.raises(ValueError, match="test.jsonl:1: score(: holds None| is not JSON)"):
            load(tmp_path, LAYOUTS["nq"], shows=False)
    for name, label in ("banking77", "label"), ("clinic150", "intent"), ("nlu_intent", "label"):
        write(tmp_path / "test.jsonl", [{"text": "x"}])
        with pytest.raises(ValueError, match=f"test.jsonl:1: {label}: holds None"):
            load(tmp_path, LAYOUTS[name], shows=False)
    write(tmp_path / "test.jsonl", [{"text": "q", "label": 4}])
    with pytest.raises(ValueError, match="test.jsonl:1: label is 4 .* 4 labels"):
        load(tmp_path, LAYOUTS["ag_news"], shows=False)
    with pytest.raises(FileNotFoundError, match="labels.txt: .*label .*number"):
        load(tmp_path, LAYOUTS["banking77"], shows=False)
    write(tmp_path / "test.jsonl", [scrolls("Read.", "Text.", "Question:\nWho?", None)])
    with pytest.raises(ValueError, match="test.jsonl:1: output .*validation"):
        load(tmp_path, LAYOUTS["qasper"], shows=False)
    with pytest.raises(ValueError, match="layout sst: .*nq, trivia_qa"):
        Icl(axis=(0,), data=tmp_path, layout="sst")
    with pytest.raises(ValueError, match="layout sst2 .* icl "):
        Qa(axis=(0,), data=tmp_path, layout="sst2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_data_says_what_to_put_where(tmp_path, name):
    with pytest.raises(FileNotFoundError) as raised:
        load(tmp_path / "here", LAYOUTS[name], shows=True)
    said = str(raised.value)
    assert re.match(f"{tmp_path / 'here'}: .*test.jsonl: put there ", said)
    assert "\n" not in said
    assert {"qa": "ctxs", "icl": "load_dataset(", "document": "ZeroSCROLLS"}[LAYOUTS[name].family] in said
    if name == "sst2":
        assert 'data["validation"].to_json("test.jsonl")' in said
        assert 'tfds.builder("glue/sst2", file_format="array_record").download_and_prepare()' in said


def test_sets_that_tfds_prepared(tmp_path):
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    sst2 = {"sentence": text, "label": tfds.features.ClassLabel(names=["negative", "positive"]), "idx": np.int32}
    rows = [{"sentence": f"é{n}", "label": n % 2, "idx": n} for n in range(3)]
    prepare(tmp_path / "glue/sst2/2.0.0", sst2, {"train": rows[:1], "validation": rows[1:], "test": rows[:1]})
    prepare(tmp_path / "glue/sst2/10.0.0", sst2, {"train": rows, "validation": rows})
    records, shown = load(tmp_path, LAYOUTS["sst2"], shows=True)  # the newest version
    assert [(record.question, record.answers) for record in records] == [
        ("é0", ("negative",)),
        ("é1", ("positive",)),
        ("é2", ("negative",)),
    ]
    assert [(one.question, one.answer) for one in shown] == [("é0", "negative"), ("é1", "positive"), ("é2", "negative")]
    names = ["World", "Sports", "Business", "Sci/Tech"]
    news = {"title": text, "description": text, "label": tfds.features.ClassLabel(names=names)}
    lines = [{"title": "T", "description": "is so", "label": 3}]
    prepare(tmp_path / "ag_news_subset/1.0.0", news, {"train": lines, "test": lines})
    (record,), _ = load(tmp_path, LAYOUTS["ag_news"], shows=False)
    assert (record.question, record.answers, list(record.choices)) == ("T is so", ("Sci/Tech",), names)
    clinc = {"text": text, "intent": np.int32, "intent_name": text, "domain": np.int32, "domain_name": text}
    lines = [
        {"text": f"t{n}", "intent": n, "intent_name": name, "domain": 0, "domain_name": "d"}
        for n, name in enumerate(("tire_pressure", "oil_change"))
    ]
    prepare(tmp_path / "clinc_oos/0.1.0", clinc, {"train": lines, "test": lines[:1]})
    (record,), shown = load(tmp_path, LAYOUTS["clinic150"], shows=True)
    assert (record.answers, record.choices) == (("tire pressure",), ("oil change", "tire pressure"))
    assert [one.answer for one in shown] == ["tire pressure", "oil change"]
