"""The layouts in which question answering, classification and long documents are published, as records.

A row of LAYOUTS is one of them. Its data is a directory with `test.jsonl`, and `train.jsonl` where demonstrations are
drawn (or `.jsonl.gz`); for the sets that TFDS prepares without TensorFlow, TFDS's `data_dir` will do.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cepe_jax.data import tfds
from cepe_jax.evaluation.tasks.metrics import ROUGE
from cepe_jax.evaluation.tasks.protocols import Protocol, Template
from cepe_jax.evaluation.tasks.questions import SUFFIXES, Demonstration, Question, lines, parsed
from cepe_jax.evaluation.tasks.selection import as_demonstration
from cepe_jax.parsing import parse_json, shortened, typed
from cepe_jax.progress import track

Mapping = Callable[[dict, tuple[str, ...]], dict]  # a published line and the names of its labels -> a record's fields
T = TypeVar("T")
OTHER = "another layout has such a field"
HEADING = re.compile(r"^(Question and Possible Answers|Question|Query|Summary):\s*")
OPTION = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prepared:
    """The same set as TFDS prepares it."""

    name: str
    test: str  # the split that is asked
    mapping: Mapping
    label: str


@dataclass(frozen=True)
class Layout:
    family: str  # whose questions these are; "": any
    protocol: Protocol | None  # None: the family's own
    mapping: Mapping
    source: str  # where the data comes from
    shown: str = "train"  # the split that demonstrations are drawn from
    label: str = ""  # of a classification: the field with the label
    labels: tuple[str, ...] = ()  # their names by number; (): as labels.txt or the data has them
    prepared: Prepared | None = None


def _get(line: dict, name: str, kind: type[T]) -> T:
    """Return the field's value; ValueError if it is of another type."""
    return typed(line.get(name), kind, name, OTHER)


def _written(line: dict, name: str, kind: type[T]) -> T:
    """Return the field's value, which may be written as a text."""
    value = line.get(name)
    return parse_json(value, name, kind, OTHER) if isinstance(value, str) else _get(line, name, kind)


def _passage(context: dict) -> str:
    title, text = _get(context, "title", str | None), _get(context, "text", str)
    return f"{title}\n{text}" if title else text


def retrieved(line: dict, _: tuple[str, ...]) -> dict:
    """DPR's layout, which Contriever's retrieval writes: question, answers, and ctxs with title, text and score."""
    question, contexts = _get(line, "question", str), _get(line, "ctxs", list[dict[str, Any]])
    name = next((name for name in ("answers", "answer", "possible_answers") if name in line), "answers")
    answers = _written(line, name, list[str]) if name == "possible_answers" else _get(line, name, list[str] | str)
    answers = [answers] if isinstance(answers, str) else answers
    answers = [answer for answer in answers if answer != ""]  # which some lists of aliases hold
    fields = {"question": question, "answers": answers, "contexts": [_passage(context) for context in contexts]}
    if all("score" in context for context in contexts):
        fields["scores"] = [_written(context, "score", float) for context in contexts]
    return fields | ({"id": line["id"]} if "id" in line else {})


def classified(label: str, *text: str) -> Mapping:
    """A mapping of lines with a label, a number or a name, and the input in one field or several."""

    def mapping(line: dict, names: tuple[str, ...]) -> dict:
        value = _get(line, label, int | str)
        if isinstance(value, str):
            name = value
        elif 0 <= value < len(names):
            name = names[value]
        else:
            raise ValueError(
                f"{label} is {value} and there are {len(names)} labels: give one line of labels.txt to each"
            )
        spelled = [name.replace("_", " ") for name in names]
        question = " ".join(_get(line, field, str).strip() for field in text)
        return {"question": question, "answers": [name.replace("_", " ")], "choices": spelled}

    return mapping


def zero_scrolls(line: dict, _: tuple[str, ...]) -> dict:
    """`input` holds document and query, and says where."""
    text, output = _get(line, "input", str), line.get("output")
    if not isinstance(output, str):
        raise ValueError("output is not told, as in the test split: take the validation split")
    document, query = (
        text[_get(line, f"{part}_start_index", int) : _get(line, f"{part}_end_index", int)].strip()
        for part in ("document", "query")
    )
    question = HEADING.sub("", query)
    return {"id": _get(line, "id", str), "question": question, "contexts": [document], "answers": [output]}


def quality(line: dict, names: tuple[str, ...]) -> dict:
    """Return the fields of `zero_scrolls`, with the query's options as a choice of letters."""
    fields = zero_scrolls(line, names)
    options, output = OPTION.findall(fields["question"]), line["output"].strip()
    right = [letter for letter, text in options if output in (letter, f"({letter})", text, f"({letter}) {text}")]
    if not right:
        raise ValueError(f"output is {shortened(output)}: this layout has one of the query's options (A) ... there")
    return fields | {"answers": right, "choices": [letter for letter, _ in options]}


def _passages(where: str, shown: str = "train") -> Layout:
    """`where`: its files, of those that the repository of the paper links."""
    source = (
        f"{where} linked at princeton-nlp/CEPE, or others in DPR's layout: lines with question, answers, and ctxs, "
        f"which have title, text and score"
    )
    return Layout("qa", None, retrieved, source, shown)


def _classes(
    of: str, fields: str, words: str, labels: str = "", test: str = "test", prepared: Prepared | None = None
) -> Layout:
    """`of`: what load_dataset is given; `fields`: text and label; `words`: what the prompt calls them."""
    (text, label), (asks, says) = fields.split(), words.split()
    source = (
        f"what this writes: data = load_dataset({of}) of the library `datasets` (before 4.0 where it is a script); "
        f'data["train"].to_json("train.jsonl"); data["{test}"].to_json("test.jsonl")'
    )
    if not labels:
        source += f'; in labels.txt a line for each of data["train"].features["{label}"].names, if it has these'
    if prepared is not None:
        source += (
            f"; or TFDS's data_dir, after import tensorflow_datasets.text and "
            f'tfds.builder("{prepared.name}", file_format="array_record").download_and_prepare()'
        )
    protocol = Protocol(Template(question=f"{asks}: {{question}}\n{says}:"))
    names = tuple(filter(None, labels.split(",")))
    return Layout("icl", protocol, classified(label, text), source, "train", label, names, prepared)


def _document(name: str, protocol: Protocol, mapping: Mapping = zero_scrolls) -> Layout:
    source = f"{name}/validation.jsonl of the tasks page of ZeroSCROLLS as test.jsonl: its test split has no answers"
    return Layout("document", protocol, mapping, source)


def _answered(instruction: str, question: str = "Question: {question}\nAnswer:") -> Protocol:
    return Protocol(Template(instruction, question=question), ("f1",), max_new_tokens=50, stop=("\n",))


def _summed_up(instruction: str, question: str = "{question}Summary:") -> Protocol:
    return Protocol(Template(instruction, question=question), (*ROUGE, "rougeLsum"), max_new_tokens=1024)


FEELINGS = "negative,positive"
TREC_COARSE = "abbreviation,entity,description,human,location,numeric"
TREC_FINE = {  # in the order of the published numbers
    "abbreviation": "abbreviation,expansion",
    "entity": "animal,body,color,creation,currency,disease,event,food,instrument,language,letter,other,plant,product,"
    "religion,sport,substance,symbol,technique,term,vehicle,word",
    "description": "definition,description,manner,reason",
    "human": "group,individual,title,description",
    "location": "city,country,mountain,other,state",
    "numeric": "code,count,date,distance,money,order,other,period,percent,speed,temperature,size,weight",
}
FINE = ",".join(f"{coarse} {fine}" for coarse, names in TREC_FINE.items() for fine in names.split(","))
DBPEDIA = "company,school,artist,athlete,politician,transportation,building,nature,village,animal,plant,album,film,book"
NEWS = "World,Sports,Business,Sci/Tech"
NLU = '"nlu_evaluation_data", split="train").train_test_split(seed=42'
SST2 = Prepared("glue/sst2", "validation", classified("label", "sentence"), "label")
AG_NEWS = Prepared("ag_news_subset", "test", classified("label", "title", "description"), "label")
CLINC = Prepared("clinc_oos", "test", classified("intent_name", "text"), "intent_name")
IN_A_PHRASE = "Answer the question about the text above in a phrase, as briefly as you can."
OF_A_PAPER = (
    "Answer the question about the paper above in a phrase or a sentence. Say yes or no where the question asks "
    "whether something is so, and unanswerable where the paper does not tell."
)
LAYOUTS = {
    "nq": _passages("nq-open/train.jsonl and nq-open/test.jsonl"),
    "trivia_qa": _passages("triviaqa/train.jsonl, and triviaqa/validation.jsonl as test.jsonl,"),
    "popqa": _passages("popqa/test.jsonl", "test"),  # its one split
    "sst2": _classes('"glue", "sst2"', "sentence label", "Sentence Sentiment", FEELINGS, "validation", SST2),
    "sst5": _classes('"SetFit/sst5"', "text label", "Sentence Sentiment", "terrible,bad,okay,good,great"),
    "mr": _classes('"rotten_tomatoes"', "text label", "Review Sentiment", FEELINGS),
    "ag_news": _classes('"ag_news"', "text label", "Article Topic", NEWS, prepared=AG_NEWS),
    "trec_coarse": _classes('"trec"', "text coarse_label", "Question Type", TREC_COARSE),
    "trec_fine": _classes('"trec"', "text fine_label", "Question Type", FINE),
    "dbpedia": _classes('"dbpedia_14"', "content label", "Text Category", DBPEDIA),
    "nlu_scenario": _classes(NLU, "text scenario", "Utterance Scenario"),
    "nlu_intent": _classes(NLU, "text label", "Utterance Intent"),
    "banking77": _classes('"banking77"', "text label", "Query Intent"),
    "clinic150": _classes('"clinc_oos", "plus"', "text intent", "Utterance Intent", prepared=CLINC),
    "narrative_qa": _document("narrative_qa", _answered(IN_A_PHRASE)),
    "qasper": _document("qasper", _answered(OF_A_PAPER)),
    "quality": _document(
        "quality", _answered("Choose the right answer to the question about the story above."), quality
    ),
    "gov_report": _document("gov_report", _summed_up("Sum up the report above on one page.")),
    "summ_screen_fd": _document("summ_screen_fd", _summed_up("Sum up the episode above in one paragraph.")),
    "qmsum": _document(
        "qmsum", _summed_up("Answer the query about the meeting above in some sentences.", "Query: {question}\nAnswer:")
    ),
}


RECORDS = Layout("", None, lambda line, _: line, "records, one a line")  # questions as they stand


@dataclass(frozen=True)
class _Data:
    """A set on disk: the place of each split, and a function that returns its numbered lines."""

    splits: dict[str, tuple[Path, Callable[[], Iterable[tuple[int, dict]]]]]
    mapping: Mapping
    label: str
    names: tuple[str, ...]


def load(path: Path, layout: Layout, shows: bool) -> tuple[list[Question], list[Demonstration]]:
    """The records at `path`, and what demonstrations are drawn from if there are to be any (`shows`).

    FileNotFoundError says what to put where.
    """
    versions = tfds.versions(path, layout.prepared.name) if layout.prepared is not None else []
    data = _from_tfds(layout.prepared, versions[-1]) if versions else _from_files(path, layout)
    if "test" not in data.splits:
        raise FileNotFoundError(f"{path}: no such file, and no directory with test.jsonl: put there {layout.source}")
    names = data.names or (_names_in(data) if data.label else ())

    def records(split: str) -> Iterable[Question]:
        place, numbered = data.splits[split]
        return track(parsed(place, numbered(), lambda line: data.mapping(line, names)), f"read {place}")

    asked = list(records("test"))
    if not shows or all(record.demonstrations for record in asked):
        return asked, []
    if layout.shown not in data.splits:
        raise FileNotFoundError(
            f"{path}: no directory with {layout.shown}.jsonl, which gives demonstrations: put there {layout.source}"
        )
    return asked, [as_demonstration(record) for record in records(layout.shown)]


def _from_tfds(prepared: Prepared, directory: Path) -> _Data:
    def split(name: str) -> tuple[Path, Callable]:
        return directory / name, lambda: enumerate(tfds.rows(directory, name), start=1)

    splits = {"test": split(prepared.test), "train": split("train")}
    return _Data(splits, prepared.mapping, prepared.label, tfds.label_names(directory, prepared.label))


def _from_files(path: Path, layout: Layout) -> _Data:
    """Return the test.jsonl and train.jsonl of a directory, or a file as the test split."""
    named = [(split, path / f"{split}{end}") for split in ("test", "train") for end in SUFFIXES]
    places = {"test": path} if path.is_file() else {split: place for split, place in named if place.exists()}
    splits = {split: (place, partial(lines, place)) for split, place in places.items()}
    listed = (path.parent if path.is_file() else path) / "labels.txt"
    names = layout.labels
    if layout.label and not names and listed.exists():
        names = tuple(listed.read_text("utf-8").splitlines())
    return _Data(splits, layout.mapping, layout.label, names)


def _names_in(data: _Data) -> tuple[str, ...]:
    """The labels that stand in the data, in the order of the alphabet."""
    place, numbered = data.splits["train" if "train" in data.splits else "test"]
    names = set()
    for number, line in numbered():
        try:
            name = _get(line, data.label, int | str)
        except ValueError as error:
            raise ValueError(f"{place}:{number}: {error}") from None
        if isinstance(name, int):
            raise FileNotFoundError(
                f"{place.parent / 'labels.txt'}: no such file, and {data.label} is a number: give names, a line each"
            )
        names.add(name)
    return tuple(sorted(names))
