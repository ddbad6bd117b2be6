"""Text to ids and back, from SentencePiece and from tokenizer.json."""

import json
import random
import re
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from cepe_jax.data.tokenizer import Tokenizer, train

LIBRARY = Path(sysconfig.get_path("stdlib"))
SOURCES = [(LIBRARY / name).read_text() for name in ("abc.py", "ast.py", "bdb.py", "csv.py", "heapq.py", "queue.py")]
HELD_OUT = (LIBRARY / "textwrap.py").read_text()
SPECIAL = ["<s>", "</s>", "<unk>", "<mask>", "<pad>", "<|begin_of_text|>", "<0x0A>", "[MASK]"]
ODD = ["a\n\n\tb  \r\n   c ", " \t ", "\n", "\x00\x7f\x1b", "\ufeffx\u00a0y\u2028z", "e\u0301 é", "ﬁ ½ ａ", ""]
ODD += ["🙂 é 漢字 🏴‍☠️"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece(home) -> Tokenizer:
    return train(SOURCES, 420, home / "tokenizer.model")


def save_json(path: Path, special=("<s>", "</s>", "<mask>"), vocab_size: int = 320, **options) -> Path:
    """A byte-level BPE in the format of the `tokenizers` library, which adds BOS and EOS, pads and cuts by itself."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SOURCES[:2], trainer)
    if options:
        tokenizer.enable_padding(length=options["padding"])
        tokenizer.enable_truncation(options["truncation"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def hugging_face(home) -> Tokenizer:
    return Tokenizer(save_json(home / "tokenizer.json", padding=64, truncation=3))


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_every_text_comes_back(tokenizer):
    rng = random.Random(0)
    letters = "".join([*SPECIAL, *ODD, "ab(\n    ,\t"])
    drawn = ["".join(rng.choices(letters, k=40)) for _ in range(50)]
    for text in [*SOURCES, HELD_OUT, *SPECIAL, *ODD, *drawn]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(tokenizer.encode(HELD_OUT)) < len(HELD_OUT) * 0.8  # pieces, not bytes


def test_a_part_of_a_text_comes_back_as_it_stands(tokenizer):
    """A piece keeps its space wherever it comes first: chunks begin, and generation goes on, within a text."""
    ids = tokenizer.encode("x = y  # a b\n    return")
    assert "".join(tokenizer.decode([i]) for i in ids) == "x = y  # a b\n    return"
    assert tokenizer.encode(" b")[0] != tokenizer.encode("b")[0]


def test_begin_and_end(tokenizer):
    plain, (bos, eos) = tokenizer.encode("a b"), (tokenizer.bos_id, tokenizer.eos_id)
    assert bos != eos
    assert tokenizer.encode("a b", bos=True) == [bos, *plain]
    assert tokenizer.encode("a b", eos=True) == [*plain, eos]
    assert tokenizer.encode("", bos=True, eos=True) == [bos, eos]
    assert tokenizer.decode([bos, *plain, eos]) == "a b"


def test_special_tokens_in_a_text_are_text(tokenizer):
    for name in SPECIAL:
        for text in (name, f"x{name}y", f" {name} "):
            ids = tokenizer.encode(text)
            assert len(ids) > 1
            assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
            assert tokenizer.decode(ids) == text


def test_ids_of_the_library(sentencepiece, hugging_face):
    """The ids are those that the libraries name, and nothing is added, padded or cut by what a file stores."""
    assert sentencepiece.vocab_size == 420
    processor = sentencepiece._impl.processor
    assert [processor.id_to_piece(i) for i in (sentencepiece.bos_id, sentencepiece.eos_id)] == ["<s>", "</s>"]
    assert (hugging_face.vocab_size, hugging_face.bos_id, hugging_face.eos_id) == (320, 0, 1)
    assert len(hugging_face.encode("a b c d e f g")) > 3
    assert len(hugging_face.encode("a")) == 1


def test_the_mask_id_is_one_more(tokenizer):
    assert tokenizer.mask_id == tokenizer.vocab_size


def test_a_directory_prefers_the_model(home, sentencepiece, hugging_face):
    assert (home / "tokenizer.json").exists()
    assert Tokenizer(home).path == sentencepiece.path
    assert Tokenizer(str(home / "tokenizer.json")).fingerprint() == hugging_face.fingerprint()


def test_fingerprints(home, sentencepiece, hugging_face):
    """Equal for equal pieces, whatever the files' options; different for others."""
    again = train(iter(SOURCES), 420, home / "again.model")
    assert again.fingerprint() == sentencepiece.fingerprint()
    padded = Tokenizer(save_json(home / "padded.json", padding=9, truncation=8))
    assert padded.path.read_text() != hugging_face.path.read_text()
    assert padded.fingerprint() == hugging_face.fingerprint()
    others = [train(SOURCES, 421, home / "more.model"), train(SOURCES[1:], 420, home / "other.model")]
    others += [Tokenizer(save_json(home / "small.json", vocab_size=319)), hugging_face]
    assert sentencepiece.fingerprint() not in {other.fingerprint() for other in others}
    assert len({other.fingerprint() for other in others}) == 4


def test_fingerprint_ignores_what_a_model_file_notes(home, sentencepiece):
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece.path.read_bytes())
    proto.trainer_spec.model_prefix = "elsewhere"
    (home / "noted.model").write_bytes(proto.SerializeToString())
    assert (home / "noted.model").read_bytes() != sentencepiece.path.read_bytes()
    assert Tokenizer(home / "noted.model").fingerprint() == sentencepiece.fingerprint()
    proto.pieces[-1].piece += "x"
    (home / "changed.model").write_bytes(proto.SerializeToString())
    assert Tokenizer(home / "changed.model").fingerprint() != sentencepiece.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("garbage.model", b"hello", "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("garbage.json", b"hello", "not a tokenizer.json"),
        ("empty.json", b"", "not a tokenizer.json"),
        ("other.json", b"{}", "not a tokenizer.json"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: {said}") as error:
        Tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_truncated_model(tmp_path, sentencepiece):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece.path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such tokenizer"):
        Tokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("special", "said"), [(["<pad>"], "no bos_token"), (["<s>"], "no eos_token")])
def test_a_tokenizer_without_begin_or_end(tmp_path, special, said):
    with pytest.raises(ValueError, match=said):
        Tokenizer(save_json(tmp_path / "tokenizer.json", special))


@pytest.mark.parametrize("texts", [[], [""], ["ab"]])
def test_too_little_text(tmp_path, texts):
    with pytest.raises(ValueError, match="cannot train 420 pieces on these texts") as error:
        train(texts, 420, tmp_path / "tokenizer.model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tokenizer.model").exists()


def test_special_tokens_are_the_ones_the_settings_name(tmp_path):
    """tokenizer_config.json beside tokenizer.json wins over the usual names, as text or as an object."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer(tmp_path)
    assert (read.bos_id, read.eos_id) == (1, 2)
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = Tokenizer(tmp_path)
    assert (read.bos_id, read.eos_id) == (3, 4)
