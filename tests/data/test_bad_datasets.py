"""Bad files of data and text: each is refused in one line that names the file, and the field or the value."""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
from support.datasets import SEQUENCE, joins, make_tokenizer, write, write_sequences
from support.refusals import one_line
from support.tokenizers import byte_level

from cepe_jax.data import sources
from cepe_jax.data.builder import Builder, ShardWriter
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.recipes import RETRIEVED, WindowsInContext
from cepe_jax.data.records import Records, digest_of, lengths_path, read_index, shard_path
from cepe_jax.data.sources import Extent, read
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GONE = object()  # in the place of a value: the key is removed
DEEP = "[" * 100_000


def edited(facts: dict, field: str, value) -> dict:
    """Return the facts with another value at a place such as `splits.train.shards.0.bytes`."""
    *groups, last = field.split(".")
    inner = facts
    for group in groups:
        inner = inner[int(group) if isinstance(inner, list) else group]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return facts


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two datasets: sequences, and others that are joined to them."""
    home = tmp_path_factory.mktemp("datasets")
    tokenizer = make_tokenizer(home)
    write_sequences(home / "base", [np.arange(9)] * 4, 8, tokenizer)
    write(home / "joined", "retrieved", SEQUENCE, [[]], tokenizer, joins=joins(home / "base"), query_tokens=4)
    return home


INDEX = [  # dataset, field, value, words of the refusal
    ("base", "name", GONE, "name"),
    ("base", "name", 5, "name is 5"),
    ("base", "tokenizer", GONE, "tokenizer"),
    ("base", "tokenizer", [], "tokenizer is a list of 0"),
    ("base", "splits", "x", "splits is 'x'"),
    ("base", "splits.train", 5, r"splits\[\.\.\.\] is|splits.* 5"),
    ("base", "splits.train.shards", {}, "shards|array"),
    ("base", "splits.train.shards.0.bytes", "x", "expected int, got str"),
    ("base", "splits.train.shards.0.bytes", GONE, "bytes"),
    ("base", "splits.train.domains", [], "expected object, got array"),
    ("base", "splits.train.records", -1, "expected int >= 0"),
    ("base", "length", True, "length is True"),
    ("base", "length", 10**30, r"length is 1e\+30"),
    ("base", "length", 58, "train has 4 sequences of 58 tokens, and 32 tokens"),
    ("base", "length", 4, "train has 4 sequences of 4 tokens, and 32 tokens"),
    ("joined", "joins", 5, "joins is 5"),
    ("joined", "joins.split", GONE, "split"),
    ("joined", "query_tokens", None, "query_tokens is None"),
]


@pytest.mark.parametrize(("name", "field", "value", "words"), INDEX)
def test_edited_index(home, tmp_path, name, field, value, words):
    """Refused by the value, whatever digest the index has."""
    path = shutil.copytree(home / name, tmp_path / name) / "dataset.json"
    facts = edited(json.loads(path.read_text()), field, value)
    del facts["sha256"]
    path.write_text(json.dumps(facts | {"sha256": digest_of(facts)}))
    with pytest.raises(ValueError, match=rf"dataset\.json: .*({words})") as error:
        read_index(path.parent)
    one_line(error)


def test_index_has_a_digest_of_itself(home, tmp_path):
    """Every edit of a value is refused; an index of an earlier version has none, and is read."""
    path = shutil.copytree(home / "base", tmp_path / "base") / "dataset.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(edited(json.loads(json.dumps(whole)), "identity", {"other": 1})))
    with pytest.raises(ValueError, match=r"dataset\.json .*sha256") as error:
        Records(path.parent, "train")
    one_line(error)
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "sha256"}))
    assert len(Records(path.parent, "train")) == 4


@pytest.mark.parametrize("text", [DEEP, "{", "[]", '{"name": 1, "name": 2}', "\xff"])
def test_index_that_is_no_object(home, tmp_path, text):
    path = shutil.copytree(home / "base", tmp_path / "base") / "dataset.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"dataset\.json.*prepare the dataset again") as error:
        Records(path.parent, "train")
    one_line(error)


def test_lack_of_memory_is_no_damage(home, monkeypatch):
    """TFDS may meet it in sound files: then they are not called damaged."""
    import tensorflow_datasets as tfds

    def fail(path):
        raise MemoryError

    monkeypatch.setattr(tfds, "builder_from_directory", fail)
    with pytest.raises(MemoryError):
        Records(home / "base", "train")


@pytest.mark.parametrize("spoil", [lambda _: "[]", lambda _: "{}", lambda text: text[:-9], lambda text: text[1:]])
@pytest.mark.parametrize("value", ["records", "5"])
def test_a_unit_whose_mark_is_damaged_is_done_again(tmp_path, caplog, spoil, value):
    """A mark has a digest of itself: nothing that it says is believed without."""
    builder = Builder(tmp_path / "out", {})
    builder.mark(0, 1, {"records": 5})
    path = builder.units / "00000.json"
    assert builder.marked(0, 1) == {"key": 1, "records": 5}
    text = path.read_text()
    for changed in (spoil(text), text.replace(value, "7")):
        path.write_text(changed)
        caplog.clear()
        assert builder.marked(0, 1) is None
        assert f"{path} is damaged" in caplog.text


def test_the_tokenizer_of_an_unfinished_dataset_is_held_against_its_source(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    out = Builder(tmp_path / "out", {}, tokenizer).out
    Builder(out, {}, tokenizer)
    other = train(["another text of other letters xyz"] * 40, 290, tmp_path / "other.model")
    shutil.copy(other.path, out / "tokenizer.model")
    with pytest.raises(ValueError, match=f"{out}: its tokenizer is not {tokenizer.path}") as error:
        Builder(out, {}, tokenizer)
    one_line(error)


def test_lengths_are_held_against_their_shard_before_a_dataset_is_registered(home, tmp_path):
    tokenizer = Tokenizer(home / "base")
    builder = Builder(tmp_path / "out", {}, tokenizer)
    shard = ShardWriter(shard_path(builder.out, "n", "train", 0, 1), SEQUENCE)
    shard.write({"tokens": np.arange(4, dtype=np.uint16), "name": "a", "domain": "d"}, "d", 4)
    facts = shard.close()
    path = lengths_path(shard.path)
    np.save(path, np.array([[0, 5]]))
    with pytest.raises(ValueError, match=f"{path}: is not of its shard.*remove .*00000.json") as error:
        builder.register("n", SEQUENCE, [{"splits": {"train": facts}}], {})
    one_line(error)


def test_bad_identity_of_a_run(tmp_path):
    (Builder(tmp_path / "out", {}).units / "identity.json").write_text("[]")
    with pytest.raises(ValueError, match=r"identity\.json: .*a list of 0.*remove"):
        Builder(tmp_path / "out", {})


def test_flipped_shard_is_not_registered(home, tmp_path):
    """Of the right size: its unit was finished before the command was started again."""
    out = shutil.copytree(home / "base", tmp_path / "base")
    index = read_index(out)
    path = shard_path(out, "filtered", "train", 1, 2)
    content = path.read_bytes()
    path.write_bytes(content[:70] + bytes([content[70] ^ 1]) + content[71:])
    (out / "dataset_info.json").unlink()
    marks = [{"splits": {"train": shard}} for shard in index["splits"]["train"]["shards"]]
    builder = Builder(out, {})
    with pytest.raises(ValueError, match=rf"{path.name} .*remove .*00001\.json"):
        builder.register("filtered", SEQUENCE, marks, {})
    assert not builder.finished


PACKS = {".gz": gzip.compress, ".zst": zstd.compress}


@pytest.mark.parametrize("pack", PACKS)
def test_packed_zeros(tmp_path, pack, monkeypatch):
    """Little is read of a file that stands for much, and it is refused by its name."""
    monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    path = tmp_path / f"a.jsonl{pack}"
    path.write_bytes(PACKS[pack](bytes(1 << 25)))
    assert sources.RATIO * path.stat().st_size < 1 << 25
    with pytest.raises(ValueError, match=rf"{path.name}: unpacks to more than 1,000 times") as error:
        list(read(tmp_path, Extent(path.name, 0, path.stat().st_size), ""))
    one_line(error)


@pytest.mark.parametrize("suffix", ["", *PACKS])
def test_documents_have_a_longest(tmp_path, suffix, monkeypatch):
    """A longer one is a bad one, and those after it are read."""
    monkeypatch.setattr(sources, "LONGEST", 40)
    text = "".join(json.dumps({"text": text}) + "\n" for text in ("a", "b" * 90, "c" * 27, "d" * 28, "e"))
    files = {"a.jsonl": text, "a.txt": "x" * 40, "b.txt": "x" * 41}
    documents = {}
    for name, content in files.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACKS.get(suffix, bytes)(content.encode()))
        documents[name] = list(read(tmp_path, Extent(path.name, 0, path.stat().st_size), ""))
    assert [document.text for document in documents["a.jsonl"]] == ["a", None, "c" * 27, None, "e"]
    assert [bool(document.fault) for document in documents["a.jsonl"]] == [False, True, False, True, False]
    assert re.search(r":2: longer than", documents["a.jsonl"][1].fault)
    assert documents["a.txt"][0].text == "x" * 40
    assert re.search(r"b\.txt.*: longer than", documents["b.txt"][0].fault)


def test_a_dataset_without_a_fact_that_a_recipe_needs(home, tmp_path):
    """Earlier versions wrote fewer facts: here are query_tokens and no passage_length."""
    record = {"tokens": np.arange(4), "name": "a", "domain": "d"}
    path = write(tmp_path / "joined", RETRIEVED, SEQUENCE, [[record]], Tokenizer(home / "base"), query_tokens=4)
    recipe = WindowsInContext(ExampleConfig(window=4, num_chunks=1, chunk_length=2))
    with pytest.raises(ValueError, match="dataset.json has no passage_length: prepare") as error:
        recipe.size(Records(path, "train"))
    one_line(error)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A tokenizer.json with a chat template beside it."""
    home = tmp_path_factory.mktemp("tokens")
    byte_level(home / "tokenizer.json", ("<s>", "</s>"), 400)
    return home


SETTINGS = [  # file, content, words of the refusal
    ("tokenizer_config.json", {"bos_token": 5}, "bos_token is 5"),
    ("tokenizer_config.json", {"eos_token": ["x"]}, "eos_token is a list of 1"),
    ("tokenizer_config.json", {"pad_token": {}}, "pad_token is an object of 0"),
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is a list of 0"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "missing required field content"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "a", "lstrip": 1}}}, "got int"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"999999999": {"content": "a"}}}, "added_tokens_decoder"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template is 5"),
    ("tokenizer_config.json", {"chat_template": {"a": "b"}}, "chat_template is an object of 1"),
    ("tokenizer_config.json", {"chat_template": ["a"]}, r"chat_template\[0\] is 'a'"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "missing required field template"),
    ("tokenizer_config.json", {"add_bos_token": "no"}, "add_bos_token is 'no'"),
    ("tokenizer_config.json", [], "a list of 0"),
    ("tokenizer_config.json", DEEP, "nested"),
    ("special_tokens_map.json", {"additional_special_tokens": [3]}, r"additional_special_tokens\[0\] is 3"),
    ("added_tokens.json", {"a": "330"}, "'330'|expected int"),
    ("added_tokens.json", {"a": 4_000_000_000}, "expected int <"),
    ("tokenizer.json", lambda facts: edited(facts, "model.vocab.a", 4_000_000_000), "expected int <"),
    ("tokenizer.json", lambda facts: edited(facts, "added_tokens.0.id", 4_000_000_000), "expected int <"),
    ("tokenizer.json", lambda facts: edited(facts, "model", "x"), "expected object"),
    ("tokenizer.json", lambda facts: edited(facts, "model.vocab.a", 100), "its id 100 is there twice"),
    ("tokenizer.json", lambda facts: edited(facts, "added_tokens.0.content", "b"), "token 'b' or its id .* twice"),
    ("tokenizer.json", DEEP, "tokenizer.json"),
]


@pytest.mark.parametrize(("name", "content", "words"), SETTINGS)
def test_bad_files_of_a_tokenizer(tokens, tmp_path, name, content, words):
    path = shutil.copytree(tokens, tmp_path / "home") / name
    content = content(json.loads(path.read_text())) if callable(content) else content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*({words})") as error:
        Template(Tokenizer(path.parent))
    one_line(error)


def test_settings_of_tokenizers_that_have_no_limit(tokens, tmp_path):
    """Transformers writes 10^30 where a tokenizer knows no longest text."""
    home = shutil.copytree(tokens, tmp_path / "home")
    (home / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert Tokenizer(home).bos_id == Tokenizer(tokens).bos_id


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_devices_are_no_tokenizers(tokens, tmp_path, name):
    """One that never ends would be read for ever."""
    home = shutil.copytree(tokens, tmp_path / "home")
    (home / name).unlink(missing_ok=True)
    (home / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is no regular file"):
        Tokenizer(home)


def test_model_with_a_token_that_is_not_utf_8(tmp_path):
    path = make_tokenizer(tmp_path).path
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.pieces[-1].piece = "qqqq"
    path.write_bytes(proto.SerializeToString().replace(b"qqqq", b"qq\xffq"))
    with pytest.raises(ValueError, match=r"tokenizer\.model: a token is not UTF-8 .*xff") as error:
        Tokenizer(path)
    one_line(error)
