"""Conversations to windows: every token accounted for, labels that are the assistant's, and lines that are refused."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from support.tokenizers import write_chatml

from cepe_jax.data.conversations import ConversationConfig, Packs, packs, prepare_conversations
from cepe_jax.data.examples import IGNORE, ExampleConfig, chunks_of
from cepe_jax.data.loader import batches, examples, names_in, open_mix
from cepe_jax.data.recipes import WholeConversations, Windows, blank
from cepe_jax.data.records import Records
from cepe_jax.data.template import Template
from cepe_jax.data.tokenizer import Tokenizer

WINDOW = ExampleConfig(window=120, num_chunks=3, chunk_length=8)
PLAIN, READING = WholeConversations(WINDOW, reads_documents=False), WholeConversations(WINDOW, reads_documents=True)


def asked(number: int) -> list[dict]:
    turns = [
        ("user", f"what is {number}?"),
        ("assistant", f"It is {number * 'x'}."),
        ("user", "is it?"),
        ("assistant", "no"),
    ]
    return [{"role": role, "content": content} for role, content in turns[: 2 + number % 2 * 2]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tokenizer and a chat template, and lines of conversations; some are bad."""
    home = tmp_path_factory.mktemp("chats")
    (home / "model").mkdir()
    write_chatml(home / "model")
    (home / "raw").mkdir()
    lines = [{"messages": asked(number)} for number in range(40)]
    (home / "raw/chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "documents").mkdir()
    lines = [line | {"documents": ["a fox " * (n % 4), "", "the dog"][: n % 3]} for n, line in enumerate(lines)]
    (home / "documents/chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("raw", "documents"):
        prepare_conversations(config_of(home, name))
    return home


def config_of(home, name: str, **settings) -> ConversationConfig:
    settings = {"tokenizer": str(home / "model"), "test_fraction": 0.2, "workers": 1} | settings
    return ConversationConfig(input=home / name, out=home / f"data-{name}", **settings)


def test_a_window_holds_conversations_one_after_another(home):
    """Each conversation in one window once, with the template's tokens; labels are its targets, moved by one."""
    template, records = Template(Tokenizer(home / "model")), Records(home / "data-raw", "train")
    wanted = {}
    for record in records:
        line = json.loads((home / "raw/chats.jsonl").read_text()[int(record["name"].split(":")[1]) :].splitlines()[0])
        wanted[tuple(record["tokens"].tolist())] = template.with_targets(line["messages"])
    assert len(wanted) == len(records) > 20
    packed, seen = Packs(home / "data-raw", PLAIN), []
    for number in range(len(packed)):
        example = PLAIN(packed[number], np.random.default_rng(0), None)
        tokens, labels, segments = (example[name] for name in ("tokens", "labels", "segments"))
        assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
            name: (x.shape, x.dtype) for name, x in blank(PLAIN).items()
        }
        assert not labels[segments == 0].max(initial=IGNORE) >= 0
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            assert np.diff(np.flatnonzero(at)).max(initial=1) == 1
            ids, targets = next(both for key, both in wanted.items() if list(key[:-1]) == tokens[at].tolist())
            assert labels[at].tolist() == [i if t else IGNORE for i, t in zip(ids[1:], targets[1:], strict=True)]
            seen.append(tuple(ids))
    assert sorted(seen) == sorted(wanted)


def test_windows_are_filled_as_well_as_can_be():
    assert packs([5, 3, 4, 11, 2, 12, 1], 10) == [[3], [0, 2, 1, 4]]  # 12 tokens do not fit, and 1 teaches nothing
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 500).tolist()
    found = packs(lengths, 128)
    assert sorted(n for pack in found for n in pack) == list(range(500))
    used = [sum(lengths[n] - 1 for n in pack) for pack in found]
    assert max(used) <= 128
    assert len(found) <= np.ceil(sum(used) / 128) + 1


def test_conversations_with_documents_have_a_window_each(home):
    packed = Packs(home / "data-documents", READING)
    assert len(packed) == len(packed.records)
    for number, record in enumerate(packed.records):
        example = READING(packed[number], np.random.default_rng(0), None)
        assert example["segments"].max() == 1
        real = example["context"][example["context_mask"]]
        assert real.tolist() == record["documents"].tolist()[-len(real) :] or len(record["documents"]) > 24
        assert example["context_mask"][-1].any() == (len(record["documents"]) > 0)
    with pytest.raises(ValueError, match="chats.jsonl:[0-9]+ has documents, which an encoder reads"):
        [PLAIN(record | {"lengths": [len(record["tokens"])]}, None, None) for record in packed.records]


def test_each_document_begins_a_chunk():
    context = chunks_of(np.arange(1, 15), [10, 4], ExampleConfig(window=8, num_chunks=4, chunk_length=8))
    assert context["context"].tolist() == [
        [0] * 8,
        [1, 2, 3, 4, 5, 6, 7, 8],
        [9, 10, *[0] * 6],
        [11, 12, 13, 14, *[0] * 4],
    ]
    assert context["context_mask"].sum(axis=1).tolist() == [0, 8, 2, 4]
    full = chunks_of(np.arange(1, 15), [10, 4], ExampleConfig(window=8, num_chunks=2, chunk_length=8))
    assert full["context"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, *[0] * 6]]


def test_mixtures_and_names(home):
    sources = open_mix(home, {"data-raw": 1.0, "data-documents": 3.0}, READING)
    data = examples(sources, [1.0, 3.0], READING, seed=0)
    (batch,) = (batch for batch, _ in zip(batches(data, 8), range(1), strict=False))
    assert batch["context"].shape == (8, 3, 8)
    names = names_in(sources, [1.0, 3.0], 0, 8, 0)
    assert sorted(name.split("/")[0] for name in names) == ["data-documents"] * 6 + ["data-raw"] * 2


def test_a_blend_by_size_has_all_conversations_once(home):
    """In windows of several too: every conversation of both parts in each pass, none twice."""
    mix = {"data-raw": 1.0, "data-raw-too": 1.0}
    prepare_conversations(dataclasses.replace(config_of(home, "raw"), out=home / "data-raw-too", seed=1))
    sources = open_mix(home, mix, PLAIN)
    windows = sum(map(len, sources))
    assert windows < sum(len(source.numbers) for source in sources)
    data = examples(sources, [1.0, 1.0], PLAIN, seed=0, by_size=True)
    wanted = Counter(tuple(r["tokens"][:-1].tolist()) for source in sources for r in source.records)
    for first in (0, windows):
        seen = Counter()
        for example in (data[i] for i in range(first, first + windows)):
            tokens, segments = example["tokens"], example["segments"]
            seen.update(tuple(tokens[segments == n].tolist()) for n in range(1, segments.max() + 1))
        assert seen == wanted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "chats.jsonl, at byte 0: .*no assistant's turn"),
        ({"messages": [{"role": "user"}]}, r"chats.jsonl:1: .*content - at \$.messages"),
        ({"messages": asked(1), "documents": "x"}, r"chats.jsonl:1: .*documents"),
        ({"messages": asked(1), "documents": [], "contexts": []}, "chats.jsonl:1: documents and contexts"),
        ({"text": "x"}, "chats.jsonl:1: .*messages"),
    ],
)
def test_lines_that_are_no_conversations(home, tmp_path, line, said):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/chats.jsonl").write_text(json.dumps(line) + "\n")
    config = ConversationConfig(input=tmp_path / "raw", out=tmp_path / "out", tokenizer=str(home / "model"), workers=1)
    with pytest.raises(ValueError, match=f"1 of 1 documents are bad, .*{said}"):
        prepare_conversations(config)


def test_datasets_of_another_kind(home, tmp_path):
    with pytest.raises(ValueError, match="data-raw holds conversations, .*train stage sft"):
        open_mix(home / "data-raw", {}, Windows(WINDOW))
    with pytest.raises(ValueError, match="no conversation has 5 tokens or fewer"):
        open_mix(home / "data-raw", {}, WholeConversations(ExampleConfig(window=4), reads_documents=False))
    (tmp_path / "tokenizer.json").write_bytes((home / "model/tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with pytest.raises(ValueError, match="has no chat template"):
        prepare_conversations(config_of(home, "raw", tokenizer=str(tmp_path)))
