"""Raw documents to a dataset: splits, every token accounted for, whole or absent, and the same however it was made."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.refusals import one_line

from cepe_jax.data import corpus as corpus_module
from cepe_jax.data.builder import Builder, ShardWriter
from cepe_jax.data.corpus import SPLITS, Corpus, PrepareConfig, prepare, split_of
from cepe_jax.data.records import Records, read_index
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train
from cepe_jax.exits import FAULT

WORDS = ["def ", "return ", "self", "\n", "    ", "x", " = ", "é🙂", "(", ")", "1", "\t", "\r\n"]


def text_of(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(WORDS, size=rng.integers(40, 200)))


def write_lines(path: Path, texts) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Tokenizer:
    return train(map(text_of, range(100, 120)), 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def texts() -> dict[str, str]:
    """The documents, by name."""
    texts = {f"c/{number}.txt": text_of(number) for number in range(5)}
    for name, seeds in (("a/1.jsonl", range(10, 30)), ("b/2.jsonl.gz", range(30, 40))):
        start = 0
        for seed in seeds:
            texts[f"{name}:{start}"] = text_of(seed)
            start += len(json.dumps({"text": text_of(seed)})) + 1
    return texts


@pytest.fixture
def config(tmp_path, given) -> PrepareConfig:
    """Thirty-five documents of three kinds in five units, and how to prepare them in this process."""
    write_lines(tmp_path / "in" / "a" / "1.jsonl", map(text_of, range(10, 30)))
    write_lines(tmp_path / "in" / "b" / "2.jsonl.gz", map(text_of, range(30, 40)))
    (tmp_path / "in" / "c").mkdir()
    for number in range(5):
        (tmp_path / "in" / "c" / f"{number}.txt").write_bytes(text_of(number).encode())
    return PrepareConfig(
        input=tmp_path / "in",
        out=tmp_path / "out",
        tokenizer=str(given.path),
        test_fraction=0.3,
        retrieval_fraction=0.2,
        unit_bytes=3000,
        workers=1,
    )


def elsewhere(config: PrepareConfig, name: str, **changes) -> PrepareConfig:
    return dataclasses.replace(config, out=config.out.with_name(name), **changes)


def read_all(out: Path) -> dict[str, tuple]:
    """name -> (split, document)"""
    filled = [split for split in SPLITS if read_index(out)["splits"][split]["records"]]
    return {document.name: (split, document) for split in filled for document in Corpus(out, split)}


def shards_of(out: Path) -> dict:
    """What is in the shards, their sha256 among it."""
    return read_index(out)["splits"]


class Encodings:
    """Watches Tokenizer.parts: `count` texts so far; `stop` at a number raises KeyboardInterrupt there."""

    def __init__(self, monkeypatch):
        self.count, self.stop = 0, -1
        parts = Tokenizer.parts

        def watched(tokenizer, *args, **options):
            self.count += 1
            if self.count == self.stop:
                raise KeyboardInterrupt
            return parts(tokenizer, *args, **options)

        monkeypatch.setattr(Tokenizer, "parts", watched)


@pytest.fixture
def encodings(monkeypatch) -> Encodings:
    return Encodings(monkeypatch)


def test_every_token_is_accounted_for(config, texts):
    prepare(config)
    found = read_all(config.out)
    assert found.keys() == texts.keys()
    tokenizer = Corpus(config.out, "train").tokenizer
    for name, (_, document) in found.items():
        assert document.domain == name[0]
        assert document.tokens.dtype == np.uint16
        assert (document.tokens[0], document.tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert document.tokens[1:-1].tolist() == tokenizer.encode(texts[name])
        assert tokenizer.decode(document.tokens) == texts[name]
    for split in SPLITS:
        facts = Records(config.out, split).facts
        chosen = [document for of, document in found.values() if of == split]
        assert facts["records"] == len(chosen)
        assert facts["tokens"] == sum(len(document.tokens) for document in chosen)
        for domain, counts in facts["domains"].items():
            lengths = [len(document.tokens) for document in chosen if document.domain == domain]
            assert (counts["records"], counts["tokens"]) == (len(lengths), sum(lengths))
            bins = [sum(2 ** (b - 1) <= length < 2**b for length in lengths) for b in range(1, 12)]
            assert counts["histogram"] == [0, *bins][: len(counts["histogram"])]
        domains = [
            line.split("|")[2].strip() for line in (config.out / "report.md").read_text().splitlines() if split in line
        ]
        assert domains == [*facts["domains"], "all"]
    assert read_index(config.out)["counts"] == {"documents": 35, "skipped": 0, "bad": 0, "faults": []}


def test_documents_come_in_the_order_of_the_input(config, texts):
    """Of each split, so that the order of units is that of shards."""
    prepare(config)
    order = sorted(texts, key=lambda name: (name.split(":")[0], int(name.partition(":")[2] or 0)))
    for split in SPLITS:
        names = [document.name for document in Corpus(config.out, split)]
        assert names == [name for name in order if name in names]
        assert len(names) > 3


def test_splits_are_drawn_evenly_and_move_at_their_edges_alone(config):
    names = [f"a/{number}.py" for number in range(2000)]

    def splits(**changes) -> list[str]:
        return [split_of(name, dataclasses.replace(config, **changes)) for name in names]

    base = splits()
    for split, share in (("test", 0.3), ("retrieval", 0.2), ("train", 0.5)):
        assert abs(base.count(split) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5  # standard deviations
    assert base == splits(out=Path("other"), workers=3, tokenizer="", unit_bytes=5)
    for change, moved in (
        ({"test_fraction": 0.4}, ("train", "test")),
        ({"test_fraction": 0.2}, ("test", "train")),
        ({"retrieval_fraction": 0.3}, ("train", "retrieval")),
        ({"retrieval_fraction": 0.1}, ("retrieval", "train")),
    ):
        pairs = [pair for pair in zip(base, splits(**change), strict=True) if pair[0] != pair[1]]
        assert set(pairs) == {moved}
        assert 100 < len(pairs) < 300
    other = splits(seed=1)
    agreeing = sum(a == b for a, b in zip(base, other, strict=True)) / 2000
    assert abs(agreeing - (0.3**2 + 0.2**2 + 0.5**2)) < 0.05  # as two independent draws


def test_splits_stay_when_documents_come_and_go(config):
    """A file goes by its name, a line by its text: wherever it stands, and whatever stands beside it."""
    prepare(config)
    before = read_all(config.out)
    (config.input / "c" / "0.txt").unlink()
    (config.input / "c" / "1.txt").write_text("another text under the same name")
    for number in range(50, 60):
        (config.input / "c" / f"{number}.txt").write_text(text_of(number))
    shuffled = np.random.default_rng(0).permutation(range(5, 30)).tolist()
    write_lines(config.input / "a" / "1.jsonl", map(text_of, shuffled))
    prepare(elsewhere(config, "more", unit_bytes=1 << 20))
    after = read_all(config.out.with_name("more"))
    assert len(after) == 35 - 1 + 10 + 5
    decode = Corpus(config.out, "train").tokenizer.decode

    def by_text(found) -> dict[str, str]:
        return {decode(document.tokens): split for split, document in found.values() if document.domain == "a"}

    assert by_text(before).items() <= by_text(after).items()
    assert all(after[name][0] == before[name][0] for name in before if name[0] != "a" and name in after)


def test_copies_of_a_text_share_a_split(config):
    """Else the model is tested on what it was trained on."""
    copies = [text_of(seed) for seed in range(40, 60)]
    write_lines(config.input / "a" / "3.jsonl", copies * 2)
    write_lines(config.input / "d" / "4.jsonl.gz", copies[::-1])
    prepare(config)
    tokens_to_splits: dict[bytes, list[str]] = {}
    for split, document in read_all(config.out).values():
        tokens_to_splits.setdefault(document.tokens.tobytes(), []).append(split)
    several = [splits for splits in tokens_to_splits.values() if len(splits) > 1]
    assert len(several) == 20
    assert all(len(splits) == 3 and len(set(splits)) == 1 for splits in several)
    assert {splits[0] for splits in several} == set(SPLITS)


def test_the_tokenizer_is_trained_on_the_training_split(config):
    """A letter of the held-out documents has no piece, and one of the training documents has."""
    config = dataclasses.replace(config, tokenizer="", vocab_size=330)
    letters = {"train": "ß", "test": "ö", "retrieval": "ü"}
    for number in range(20):
        (config.input / "c" / f"{number}.txt").write_text(letters[split_of(f"c/{number}.txt", config)] * 200)
    assert {split_of(f"c/{number}.txt", config) for number in range(20)} == set(SPLITS)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for seed in range(200):
        for split, letter in letters.items():
            if split_of(marked := text_of(seed) + letter * 50, config) == split and len(lines[split]) < 5:
                lines[split].append(marked)
    write_lines(config.input / "d" / "3.jsonl", [text for texts in lines.values() for text in texts])
    prepare(config)
    tokenizer = Corpus(config.out, "test").tokenizer
    pieces = "".join(tokenizer.decode([i]) for i in range(3 + 256, tokenizer.vocab_size))
    assert [letter in pieces for letter in letters.values()] == [True, False, False]
    assert tokenizer.decode(tokenizer.encode("ö")) == "ö"


def test_some_of_every_unit_trains_the_tokenizer(config, monkeypatch):
    """The same number of characters, not all from the first."""
    trained = []
    monkeypatch.setattr(corpus_module, "TOKENIZER_TEXT", 5 * 500)
    monkeypatch.setattr(corpus_module, "train", lambda texts, *_: trained.extend(texts) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(dataclasses.replace(config, tokenizer="", test_fraction=1e-9, retrieval_fraction=0.0))
    whose = [next(number for number in range(40) if text_of(number).startswith(text)) for text in trained]
    assert sum(len(text) for text, number in zip(trained, whose, strict=True) if number < 5) == 500  # the last unit
    assert sum(map(len, trained)) == 5 * 500
    assert len(trained) == len(set(trained))


def save_json(path: Path, vocab: dict[str, int]) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["[B]", "[E]"])
    model.save(str(path))
    settings = {"bos_token": "[B]", "eos_token": "[E]"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", ["llama.model", "tokenizer.json", "other.json", ""])
def test_a_given_tokenizer(config, given, texts, tmp_path, name):
    """A file of either kind, or a directory that holds one; ids above 65,535 are kept."""
    path = tmp_path / "mine" / name
    (tmp_path / "mine").mkdir()
    wide = name.endswith(".json")
    if wide:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {f"unused {number}": number for number in range(65_500)}
        save_json(path, vocab | {letter: 65_500 + number for number, letter in enumerate(alphabet)})
    else:
        shutil.copy(given.path, path if name else tmp_path / "mine" / "tokenizer.model")
    prepare(dataclasses.replace(config, tokenizer=str(path)))
    corpus, own = Corpus(config.out, "train"), Tokenizer(path)
    assert corpus.tokenizer.fingerprint() == own.fingerprint() == read_index(config.out)["tokenizer"]
    assert (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id) == (own.bos_id, own.eos_id)
    for name, (_, document) in read_all(config.out).items():
        assert document.tokens.dtype == (np.uint32 if wide else np.uint16)
        assert document.tokens.tolist() == own.encode(texts[name], bos=True, eos=True)
    assert (max(document.tokens) > 65_535) == wide


def test_what_is_left_out(config):
    (config.input / "c" / "short.txt").write_text("short")
    (config.input / "c" / "empty.txt").write_text("")  # shorter too, and so not bad
    (config.input / "c" / "other.md").write_text(text_of(1))
    (config.input / "folder.txt").mkdir()
    inside = dataclasses.replace(config, skip_shorter=6, exclude=("a",), patterns=("**/*",), out=config.input / "out")
    for _ in range(2):  # its own output is no input
        prepare(inside)
    expected = {"c/0.txt", "c/1.txt", "c/2.txt", "c/3.txt", "c/4.txt", "c/other.md"}
    assert {name.partition(":")[0] for name in read_all(inside.out)} == expected | {"b/2.jsonl.gz"}
    assert read_index(inside.out)["counts"] == {"documents": 18, "skipped": 2, "bad": 0, "faults": []}


def test_few_bad_documents_are_counted_and_said(config, caplog):
    with open(config.input / "a" / "1.jsonl", "ab") as file:
        file.write(b'{"txt": "a"}\n')
    (config.input / "c" / "5.txt").write_bytes(b"\xff")
    places = [f"{config.input / 'a' / '1.jsonl'}:21: no text", f"{config.input / 'c' / '5.txt'}: not UTF-8 at byte 0"]
    prepare(dataclasses.replace(config, bad_share=2 / 37))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    faults = [line.removeprefix("left out: ") for line in warnings]
    assert [fault[: len(place)] for fault, place in zip(faults, places, strict=True)] == places
    assert warnings == [f"left out: {fault}" for fault in faults]
    assert len(read_all(config.out)) == 35
    assert read_index(config.out)["counts"] == {"documents": 37, "skipped": 0, "bad": 2, "faults": faults}


def test_many_bad_documents_are_an_error(config, encodings):
    """It names one; nothing looks whole; and with a larger share it goes on and does nothing again."""
    with open(config.input / "a" / "1.jsonl", "ab") as file:
        file.write(b"[]\n")
    with pytest.raises(ValueError, match=r"\b1 of 36 .*--bad_share=0.02 ") as error:
        prepare(dataclasses.replace(config, bad_share=0.02))
    assert f" {config.input / 'a' / '1.jsonl'}:21: no text" in one_line(error)
    with pytest.raises(FileNotFoundError, match="out: not finished"):
        Corpus(config.out, "train")
    assert encodings.count == 35
    prepare(dataclasses.replace(config, bad_share=0.03))
    assert encodings.count == 35
    assert len(read_all(config.out)) == 35


def test_nothing_but_bad_documents_ends_it_at_once(config, encodings, monkeypatch):
    """Not after hours: such as when all lines call their text something else."""
    monkeypatch.setattr(corpus_module, "HOPELESS", 100)
    write_lines(config.input / "a" / "0.jsonl", [" "] * 300)
    with pytest.raises(ValueError, match="100 of 100 .*0.jsonl:1: .*empty"):
        prepare(dataclasses.replace(config, unit_bytes=1 << 20))
    assert encodings.count == 0
    prepare(elsewhere(config, "all", bad_share=1.0, unit_bytes=1 << 20))
    counts = read_index(config.out.with_name("all"))["counts"]
    assert (counts["bad"], len(counts["faults"])) == (300, 100)  # what is listed has an end


def test_a_damaged_file_is_named_and_can_be_mended(config, encodings):
    path = config.input / "b" / "2.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="2.jsonl.gz: damaged"):
        prepare(config)
    done = encodings.count
    path.write_bytes(whole)
    prepare(config)
    assert encodings.count - done < 20  # not the lines of the first file again
    mended = shards_of(config.out)
    prepare(elsewhere(config, "whole"))
    assert shards_of(config.out.with_name("whole")) == mended


@pytest.mark.parametrize("trained", [False, True])
def test_cut_off_at_any_document_it_goes_on(config, encodings, trained):
    """Nothing half-written looks whole; no unit is done twice; in the end the same bytes."""
    config = dataclasses.replace(config, unit_bytes=1000, **({"tokenizer": "", "vocab_size": 300} if trained else {}))
    prepare(elsewhere(config, "whole"))
    marks: dict[Path, int] = {}
    for stop in range(1, 100):  # each run reaches one document more than the last; and the next goes on from there
        encodings.count, encodings.stop = 0, stop
        try:
            prepare(config)
            break
        except KeyboardInterrupt:
            with pytest.raises(FileNotFoundError, match="not finished"):
                Corpus(config.out, "train")
            found = {path: path.stat().st_mtime_ns for path in (config.out / "units").glob("0*.json")}
            assert marks.items() <= found.items()
            marks = found
    assert 6 < stop < 20
    assert 0 < encodings.count < stop
    assert shards_of(config.out) == shards_of(config.out.with_name("whole"))
    assert not list(config.out.rglob(".*"))


def test_cut_off_at_any_renaming_it_goes_on(config, monkeypatch):
    """What is written gets its name by renaming: it is cut off before each of these."""
    config = dataclasses.replace(config, unit_bytes=1 << 20)
    prepare(elsewhere(config, "whole"))
    rename, names = Path.rename, []

    def cut_off(path, target):
        names.append(Path(target).name)
        if len(names) == stop:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut_off)
    for stop in range(1, 100):
        names.clear()
        stopped = elsewhere(config, str(stop))
        try:
            prepare(stopped)
            break
        except KeyboardInterrupt:
            with pytest.raises(FileNotFoundError, match="not finished"):
                Corpus(stopped.out, "train")
            prepare(stopped)
        assert shards_of(stopped.out) == shards_of(config.out.with_name("whole"))
    assert names[0] == "tokenizer.model"
    assert names[-5:] == ["00000.json", "dataset.json", "report.md", "features.json", "dataset_info.json"]
    assert len(names) == 1 + 1 + 2 * 3 + 5


KILLED = """
import os, signal, sys
from pathlib import Path
from cepe_jax.settings import parse
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.builder import ShardWriter
last, write = int(os.environ["WRITES"]), ShardWriter.write
def count(*args):
    global last
    last -= 1
    if not last:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)
ShardWriter.write = count
prepare(parse(PrepareConfig, sys.argv[1:]))
"""


def test_killed_it_goes_on(config):
    """By SIGKILL in the middle of a unit: what was finished is not touched, and the result that of one process."""
    arguments = [
        f"--{name}={getattr(config, name)}" for name in ("input", "out", "tokenizer", "test_fraction", "workers")
    ]
    arguments += [f"--{name}={getattr(config, name)}" for name in ("retrieval_fraction", "unit_bytes")]
    environment = os.environ | {"PYTHONPATH": str(Path(corpus_module.__file__).parents[2]), "WRITES": "24"}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(config.out.glob(".documents-*"))
    finished = {path: path.stat().st_mtime_ns for path in config.out.glob("documents-*")}
    assert len(finished) == 2 * 3 * len(list((config.out / "units").glob("0*.json"))) > 0
    with pytest.raises(FileNotFoundError, match="not finished"):
        Corpus(config.out, "train")
    prepare(config)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert not list(config.out.rglob(".*"))
    prepare(elsewhere(config, "whole"))
    assert shards_of(config.out) == shards_of(config.out.with_name("whole"))
    assert len(read_all(config.out)) == 35


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_jobs_are_as_one(config, order, caplog):
    prepare(elsewhere(config, "whole"))
    for number in order:
        with pytest.raises(FileNotFoundError):
            Corpus(config.out, "train")
        prepare(dataclasses.replace(config, shard=f"{number}/2"))
    assert re.search(rf"{config.out}: \d+ of \d+ units", caplog.text)
    assert shards_of(config.out) == shards_of(config.out.with_name("whole"))
    for name in ("features.json", "dataset_info.json", "report.md", "dataset.json", "tokenizer.model"):
        assert (config.out / name).read_bytes() == (config.out.with_name("whole") / name).read_bytes()


def test_several_processes_are_as_one(config):
    prepare(config)
    prepare(elsewhere(config, "two", workers=2))
    assert read_index(config.out.with_name("two")) == read_index(config.out)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"test_fraction": 0.25},
        {"retrieval_fraction": 0.25},
        {"skip_shorter": 1},
        {"unit_bytes": 3001},
        {"domain_field": "x"},
        {"patterns": ("**/*.jsonl", "**/*.txt", "**/*.jsonl.gz")},
        {"exclude": ("z",)},
        {"tokenizer": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_refused(config, change, finished):
    prepare(config if finished else dataclasses.replace(config, shard="0/2"))
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    (name,) = change
    with pytest.raises(ValueError, match=f"out: .*another run, {name} "):
        prepare(dataclasses.replace(config, **change))
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before


def test_more_input_is_refused(config):
    """The number of units is in the names of shards."""
    prepare(dataclasses.replace(config, shard="0/2"))
    write_lines(config.input / "a" / "3.jsonl", map(text_of, range(60, 80)))
    with pytest.raises(ValueError, match='another run, input .*"5 units".*"9 units"'):
        prepare(config)


def test_a_finished_dataset_is_left_alone(config, encodings, caplog):
    prepare(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    encodings.count = 0
    prepare(dataclasses.replace(config, workers=2, bad_share=0.5, shard="1/3"))
    assert encodings.count == 0
    assert re.match(f"{config.out} is finished", caplog.messages[-1])
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
    (config.input / "one_more.txt").write_text("a small file that makes no other unit")
    with pytest.raises(ValueError, match="finished.*other files.*--out"):
        prepare(config)


def test_documents_in_linked_folders_are_read(config, tmp_path):
    """Domains may lie on several disks."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.txt").write_text("a document on another disk " * 9)
    (config.input / "link").symlink_to(tmp_path / "elsewhere")
    prepare(config)
    found = {d.name: d.domain for split in ("train", "test") for d in Corpus(config.out, split)}
    assert found["link/linked.txt"] == "link"


def test_a_failed_tokenizer_leaves_room_for_another_run(config):
    with pytest.raises(ValueError, match=" 100000 pieces"):
        prepare(dataclasses.replace(config, tokenizer="", vocab_size=100_000))
    prepare(dataclasses.replace(config, tokenizer="", vocab_size=300))
    assert Corpus(config.out, "train").tokenizer.vocab_size == 300


@pytest.mark.parametrize("moment", ["of the texts", "after them", "once it is there"])
def test_ctrl_c_while_a_tokenizer_is_trained(config, monkeypatch, moment):
    """The same command goes on, and so does one with another tokenizer: nothing remembers the first."""
    own = dataclasses.replace(config, tokenizer="", vocab_size=300)

    def interrupt(*args, **_):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    def interrupt_after(*args, **settings):
        real(*args, **settings)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is deaf to it
    try:
        with monkeypatch.context() as patch:
            if moment == "of the texts":
                real = corpus_module.training_pieces
                patch.setattr(corpus_module, "training_pieces", interrupt)
            elif moment == "after them":
                real = sentencepiece.SentencePieceTrainer.train
                patch.setattr(sentencepiece.SentencePieceTrainer, "train", interrupt_after)
            else:
                real = corpus_module.train
                patch.setattr(corpus_module, "train", interrupt_after)
            with pytest.raises(KeyboardInterrupt):
                prepare(own)
    finally:
        signal.signal(signal.SIGINT, before)
    again = dataclasses.replace(own, vocab_size=310)
    prepare(again)
    assert Corpus(config.out, "train").tokenizer.vocab_size == 310


def test_a_full_disk_while_a_tokenizer_is_trained(config):
    """It has status 70, and with room the same command goes on. A limit of the size of files stands for the disk."""
    own = dataclasses.replace(config, tokenizer="", vocab_size=300)
    settings = [f"--{name}={getattr(own, name)}" for name in ("input", "out", "vocab_size", "test_fraction", "workers")]
    settings += [f"--{name}={getattr(own, name)}" for name in ("retrieval_fraction", "unit_bytes")]
    root = Path(corpus_module.__file__).parents[2]
    command = ["bash", "-c", 'ulimit -f 2; exec "$@"', "", sys.executable, root / "scripts/prepare_data.py", *settings]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == FAULT
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    prepare(own)
    assert {path.name for path in config.out.iterdir() if path.name.startswith(".")} == set()


def test_the_share_of_bad_documents_is_that_of_all(tmp_path):
    """A file of nothing but bad lines, in a unit of its own, below the share of the whole."""
    home = tmp_path / "in"
    home.mkdir()
    (home / "good.jsonl").write_text("".join(json.dumps({"text": f"document {n} of many"}) + "\n" for n in range(3000)))
    (home / "poor.jsonl").write_text("".join('{"text": 1}\n' if n % 3 else '{"text": "fine"}\n' for n in range(450)))
    config = PrepareConfig(
        input=home, out=tmp_path / "out", vocab_size=300, unit_bytes=20_000, workers=1, bad_share=0.1
    )
    prepare(config)
    assert Corpus(config.out, "train").records.index["counts"]["bad"] == 300


def test_bad_documents_while_a_tokenizer_is_trained(config, monkeypatch):
    """The error is the documents', not SentencePiece's."""
    monkeypatch.setattr(corpus_module, "HOPELESS", 5)
    (config.input / "a.jsonl").write_text('{"content": "the wrong name"}\n' * 9)
    with pytest.raises(ValueError, match=r"\b5 of 5 .*a\.jsonl:1: no text"):
        prepare(dataclasses.replace(config, tokenizer="", patterns=("*.jsonl",)))


@pytest.mark.parametrize("name", ["mine", "tokenizer.json", "units"])
def test_nothing_that_exists_is_touched(config, name):
    config.out.mkdir()
    (config.out / name).write_text("")
    with pytest.raises((ValueError, NotADirectoryError, FileExistsError)) as error:
        prepare(config)
    assert str(config.out) in one_line(error)
    assert [path.name for path in config.out.iterdir()] == [name]


def refused(config, kind=ValueError, match="", **changes) -> None:
    with pytest.raises(kind, match=match) as error:
        prepare(dataclasses.replace(config, **changes))
    one_line(error)
    assert not config.out.exists()


def test_bad_configs(config, tmp_path):
    (tmp_path / "file").touch()
    refused(config, match=r"\*\.rst: .*patterns", patterns=("*.rst",))
    refused(config, FileNotFoundError, "absent: no .*directory", input=tmp_path / "absent")
    refused(config, FileNotFoundError, "file: no .*directory", input=tmp_path / "file")
    refused(config, FileNotFoundError, "absent: no .*tokenizer", tokenizer=str(tmp_path / "absent"))
    refused(config, match="out .*input", out=config.input)
    refused(config, match="test_fraction is 0: .*evaluate", test_fraction=0.0)
    refused(config, match="retrieval_fraction 0.7 .*train", retrieval_fraction=0.7)
    refused(config, match="test_fraction is 1.5", test_fraction=1.5)
    refused(config, match="bad_share is -0.1", bad_share=-0.1)
    refused(config, match="unit_bytes is 0", unit_bytes=0)
    refused(config, match="several jobs.*--tokenizer", tokenizer="", shard="0/2")
    with pytest.raises(ValueError, match=" 100000 pieces") as error:
        prepare(dataclasses.replace(config, tokenizer="", vocab_size=100_000))
    one_line(error)


@pytest.mark.parametrize(("split", "fraction"), [("test", 1e-9), ("train", 1 - 0.2 - 1e-9)])
def test_a_split_without_documents(config, split, fraction):
    with pytest.raises(ValueError, match=f"no document .*{split} split.*--test_fraction"):
        prepare(dataclasses.replace(config, test_fraction=fraction))
    with pytest.raises(FileNotFoundError, match="not finished"):
        Corpus(config.out, "retrieval")


def test_a_corpus_is_of_documents(config, tmp_path, given):
    prepare(config)
    with pytest.raises(ValueError, match="split valid: .*train, test, retrieval"):
        Corpus(config.out, "valid")
    builder = Builder(tmp_path / "other", {}, given)
    features = corpus_module.features_of(given)
    writer = ShardWriter(tmp_path / "other" / "pairs-train.array_record-00000-of-00001", features)
    writer.write({"tokens": np.zeros(2, np.uint16), "name": "", "domain": ""}, "", 2)
    builder.register("pairs", features, [{"splits": {"train": writer.close()}}], {"tokenizer": given.fingerprint()})
    with pytest.raises(ValueError, match="pairs records.*documents"):
        Corpus(tmp_path / "other", "train")


def test_a_document_of_five_megabytes(tmp_path, given):
    """On one line, longer than several units together, among small ones; it must not fall into the test split."""
    long = ("".join(text_of(seed) for seed in range(200)) * (5_000_000 // 50_000 + 1))[:5_000_000]
    options = {"tokenizer": str(given.path), "test_fraction": 0.3, "retrieval_fraction": 0.2, "unit_bytes": 1 << 20}
    config = PrepareConfig(input=tmp_path / "in", out=tmp_path / "out", workers=1, **options)
    write_lines(config.input / "a.jsonl", [text_of(1), text_of(2), long, *map(text_of, range(3, 20))])
    prepare(config)
    documents = [document for _, document in read_all(config.out).values()]
    assert len(documents) == 20
    longest = max(documents, key=lambda document: len(document.tokens))
    assert Tokenizer(config.out).decode(longest.tokens) == long
