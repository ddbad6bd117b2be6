"""Files to a dataset: splits, every token accounted for, whole or absent."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from cepe_jax.data import corpus as corpus_module
from cepe_jax.data.corpus import Corpus, PrepareConfig, prepare, split_of
from cepe_jax.data.tokenizer import Tokenizer, train

WORDS = ["def ", "return ", "self", "\n", "    ", "x", " = ", "é🙂", "(", ")", "1", "\t", "\r\n"]


def text_of(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(WORDS, size=rng.integers(40, 200)))


@pytest.fixture
def config(tmp_path) -> PrepareConfig:
    """Thirty documents in folders, and how to prepare them."""
    for number in range(30):
        path = tmp_path / "in" / f"folder{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text_of(number).encode())
    return PrepareConfig(tmp_path / "in", tmp_path / "out", vocab_size=300, test_fraction=0.3)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_token_is_accounted_for(config):
    prepare(config)
    found = {}
    for split in ("train", "test"):
        corpus = Corpus(config.out, split)
        stored = np.load(config.out / f"{split}.npy")
        assert stored.dtype == np.int32
        np.testing.assert_array_equal(np.concatenate([d.tokens for d in corpus.documents]), stored)
        found |= {document.name: (split, document.tokens) for document in corpus.documents}
    paths = sorted(config.input.rglob("*.txt"))
    assert sorted(found) == [str(path.relative_to(config.input)) for path in paths]
    assert {split for split, _ in found.values()} == {"train", "test"}
    tokenizer = corpus.tokenizer
    for path in paths:
        split, tokens = found[str(path.relative_to(config.input))]
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & set(tokens[1:-1].tolist())
        assert tokenizer.decode(tokens[1:-1]) == path.read_bytes().decode()
    assert not list(config.out.parent.glob(".*.partial"))


def test_the_tokenizer_is_trained_on_the_training_split(config):
    """A letter that the held-out documents alone hold has no piece."""
    for path in config.input.rglob("*.txt"):
        if split_of(str(path.relative_to(config.input)), config) == "test":
            path.write_text("ßßßß" * 50 + path.read_text())
    prepare(config)
    tokenizer = Corpus(config.out, "test").tokenizer
    pieces = [tokenizer.decode([i]) for i in range(3, tokenizer.vocab_size)]
    assert not any("ß" in piece for piece in pieces)
    assert tokenizer.decode(tokenizer.encode("ß")) == "ß"


def test_splits_stay_when_documents_come_and_go(config):
    names = [f"a/{number}.py" for number in range(2000)]
    splits = [split_of(name, config) for name in names]
    assert 0.3 - 4 * 0.0103 < splits.count("test") / 2000 < 0.3 + 4 * 0.0103  # four standard deviations
    assert splits == [split_of(name, dataclasses.replace(config, out=config.input)) for name in names]
    assert splits != [split_of(name, dataclasses.replace(config, seed=1)) for name in names]
    more = dataclasses.replace(config, test_fraction=0.4)
    assert all(split_of(n, more) == "test" for n, split in zip(names, splits, strict=True) if split == "test")

    prepare(config)
    before = {d.name: split for split in ("train", "test") for d in Corpus(config.out, split).documents}
    (config.input / "folder0" / "00.txt").unlink()
    for number in range(100, 130):
        (config.input / "folder0" / f"{number}.txt").write_text(text_of(number))
    prepare(dataclasses.replace(config, out=config.out.with_name("more")))
    corpora = {split: Corpus(config.out.with_name("more"), split) for split in ("train", "test")}
    after = {d.name: split for split, corpus in corpora.items() for d in corpus.documents}
    assert len(after) == 59
    assert all(after[name] == split for name, split in before.items() if name in after)


def test_the_same_again_is_the_same(config):
    prepare(config)
    prepare(dataclasses.replace(config, out=config.out.with_name("again")))
    for name in ("train.npy", "test.npy", "train.json", "test.json", "dataset.json"):
        assert (config.out / name).read_bytes() == (config.out.with_name("again") / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.model", "llama.model"])
def test_a_given_tokenizer(config, tmp_path, name):
    given = train([text_of(seed) for seed in range(50, 60)], 290, tmp_path / name)
    prepare(dataclasses.replace(config, tokenizer=str(tmp_path / name)))
    corpus = Corpus(config.out, "train")
    assert corpus.tokenizer.fingerprint() == given.fingerprint()
    document = corpus.documents[0]
    assert document.tokens[1:-1].tolist() == given.encode((config.input / document.name).read_bytes().decode())


def test_what_is_left_out(config, capsys):
    (config.input / "folder1" / "short.txt").write_text("short")
    (config.input / "folder1" / "empty.txt").write_text("")
    (config.input / "folder1" / "other.md").write_text(text_of(1))
    (config.input / "folder2.txt").mkdir()
    prepare(dataclasses.replace(config, skip_shorter=6, exclude=("folder2",)))
    names = {d.name for split in ("train", "test") for d in Corpus(config.out, split).documents}
    assert names == {f"folder{number % 3}/{number:02}.txt" for number in range(30) if number % 3 != 2}
    assert "2 shorter than 6 characters" in capsys.readouterr().out


def refused(config, kind=ValueError, match="") -> str:
    with pytest.raises(kind, match=match) as error:
        prepare(config)
    assert not config.out.exists()
    return one_line(error)


def test_bad_documents(config):
    (config.input / "empty.txt").write_text("")
    assert "--skip_shorter=1" in refused(config, match="empty.txt: an empty document")
    (config.input / "empty.txt").write_bytes(b"abc\xff")
    refused(config, match="empty.txt: not UTF-8 at byte 3")


def test_bad_configs(config, tmp_path):
    refused(dataclasses.replace(config, pattern="*.rst"), match=r"no document matches \*\.rst")
    refused(dataclasses.replace(config, input=tmp_path / "absent"), FileNotFoundError, "absent: no such directory")
    refused(dataclasses.replace(config, tokenizer=str(tmp_path / "absent")), FileNotFoundError, "no such tokenizer")
    refused(dataclasses.replace(config, vocab_size=100_000), match="cannot train 100000 pieces")
    for fraction, split in ((0.0, "test"), (1.0, "train")):
        message = refused(dataclasses.replace(config, test_fraction=fraction), match=f"fell into the {split} split")
        assert f"--test_fraction {fraction}" in message


def test_nothing_that_exists_is_touched(config):
    config.out.mkdir()
    (config.out / "mine").write_text("")
    with pytest.raises(ValueError, match="out exists: remove it or give another name"):
        prepare(config)
    assert [path.name for path in config.out.iterdir()] == ["mine"]


def test_cut_off_in_the_middle(config, monkeypatch):
    """Nothing half-written looks whole, and the next run goes through."""
    encode, calls = Tokenizer.encode, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert not config.out.exists()
    for left in config.out.parent.glob("out*"):
        with pytest.raises(FileNotFoundError, match="not a prepared dataset"):
            Corpus(left, "train")
    monkeypatch.undo()
    prepare(config)
    assert Corpus(config.out, "train").documents
    assert not list(config.out.parent.glob(".*.partial"))


def test_cut_off_while_writing(config, monkeypatch):
    def failing(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module.np, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        prepare(config)
    assert not config.out.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    for number in range(12):
        (home / f"{number}.txt").write_text(text_of(number))
    prepare(PrepareConfig(home, home / "out", vocab_size=300, test_fraction=0.5))
    return home / "out"


def cut(path, keep: int):
    path.write_bytes(path.read_bytes()[:keep])


def drop_document(path):
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))


SPOIL = {
    "another tokenizer": lambda d: train([text_of(s) for s in range(40, 50)], 310, d / "tokenizer.model"),
    "no index": lambda d: (d / "dataset.json").unlink(),
    "no tokens": lambda d: (d / "train.npy").unlink(),
    "no tokenizer": lambda d: (d / "tokenizer.model").unlink(),
    "tokens cut": lambda d: cut(d / "train.npy", (d / "train.npy").stat().st_size - 8),
    "tokens cut in the header": lambda d: cut(d / "train.npy", 50),
    "no token left": lambda d: cut(d / "train.npy", 0),
    "fewer tokens": lambda d: np.save(d / "train.npy", np.load(d / "train.npy")[:-1]),
    "documents cut": lambda d: cut(d / "train.json", 40),
    "a document gone": lambda d: (d / "train.json").write_text(
        json.dumps(json.loads((d / "train.json").read_text())[1:])
    ),
    "index cut": lambda d: cut(d / "dataset.json", 10),
}


@pytest.mark.parametrize("damage", SPOIL)
def test_a_damaged_dataset_is_refused(whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path / "copy")
    SPOIL[damage](tmp_path / "copy")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Corpus(tmp_path / "copy", "train")
    assert str(tmp_path / "copy") in one_line(error)
