"""Text to ids and back, from SentencePiece and from tokenizer.json."""

import io
import json
import random
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import sentencepiece as library
import tokenizers
from support.refusals import one_line
from support.tokenizers import as_llama_2, byte_level, to_tokenizers

from cepe_jax.data import tokenizer_json, tokenizer_sentencepiece, tokenizer_training
from cepe_jax.data.builder import copy_tokenizer
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import MAX_SENTENCE, train, training_pieces

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
    byte_level(path, special, vocab_size, SOURCES[:2])
    if options:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.enable_padding(length=options["padding"])
        tokenizer.enable_truncation(options["truncation"])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
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
    assert tokenizer.decode([tokenizer.vocab_size, *plain, tokenizer.mask_id, 99_999]) == "a b"


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_what_a_text_begins_with(tmp_path, kind, begins):
    """As tokenizer.json says itself, and the settings beside a SentencePiece model: what transformers puts there."""
    model = as_llama_2(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "tokenizer.json":
        library = tokenizers.Tokenizer.from_file(str(to_tokenizers(model, tmp_path / kind)))
        model.unlink()
        if begins:
            library.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
            library.save(str(tmp_path / kind))
    else:
        settings["add_bos_token"] = begins
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer(tmp_path)
    assert ours.begin == [1] * begins
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ends = [2] * (begins and kind == "tokenizer.json")
    assert theirs("It is")["input_ids"] == ours.begin + ours.encode("It is") + ends


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": None}])
def test_text_begins_with_bos_unless_switched_off(llama_2, tmp_path, settings):
    shutil.copy(llama_2, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(tmp_path).begin == [1]


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


def test_special_tokens_that_are_found_in_normalised_text(tmp_path):
    """As some checkpoints mark them: an escaped name is text all the same, and case decides."""
    from tokenizers import AddedToken, normalizers

    tokenizer = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path / "tokenizer.json")))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(
        [AddedToken("<end>", normalized=True), AddedToken("<go>", normalized=True, rstrip=True)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer(tmp_path)
    end, go = (read.special[name] for name in ("<end>", "<go>"))
    assert read.encode_special("<end>a<go> b", "~") == [end, *read.encode("a"), go, *read.encode("b")]
    assert read.encode_special("<~end>A<~go>", "~") == read.encode("<end>a<go>")
    assert end not in read.encode("<end>")


def test_half_a_character_is_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_special):
        with pytest.raises(ValueError, match=r"'\\udcff' at 2, .*UTF-8"):
            encode("ab\udcff")


PROBES = [" a", "  b", "   a", "\n", "\n\n x", "<s>", " <s>x</s>", "def f(x):\n    return  x\n", "\t🙂 é", ""]


@pytest.mark.parametrize("kind", ["ours", "as llama 2"])
def test_ids_are_those_of_tokenizers(home, sentencepiece, kind):
    """The same model as a tokenizer.json, read by the library itself: leading spaces, newlines, a literal <s>."""
    model = sentencepiece.path if kind == "ours" else as_llama_2(home / "llama_2.model")
    theirs = tokenizers.Tokenizer.from_file(str(to_tokenizers(model, home / f"{kind}.json")))
    theirs.encode_special_tokens = True
    ours, read = Tokenizer(model), Tokenizer(home / f"{kind}.json")
    for text in [*PROBES, *SPECIAL]:
        assert ours.encode(text) == read.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == read.decode(ours.encode(text)) == text
    theirs.encode_special_tokens = False
    for text in ["<s>[INST] a b\n [/INST] c </s>\n<s> d", "a</s>", "<s>", " "]:
        assert ours.encode_special(text) == read.encode_special(text) == theirs.encode(text).ids
    assert ours.encode_special("<s>") == [ours.bos_id]


@pytest.mark.parametrize("kind", ["ours", "as llama 2", "byte level", "byte fallback"])
def test_text_that_goes_on(home, sentencepiece, kind):
    """What is encoded part by part is what it is as a whole, where the parts meet between its pieces."""
    paths = {
        "ours": sentencepiece.path,
        "as llama 2": as_llama_2(home / "llama_2.model"),
        "byte level": home / "b.json",
    }
    paths["byte fallback"] = to_tokenizers(paths["as llama 2"], home / "llama_2.json")
    byte_level(home / "b.json")
    tokenizer = Tokenizer(paths[kind])
    for text in ["It is a  test.\n\n\nA test </s><s>here:\n  x", "</s>", "\n\n", " </s> a"]:
        whole = tokenizer.encode_special("Hello" + text)
        assert whole == tokenizer.encode_special("Hello") + tokenizer.encode_special(text, continues=True)
    escaped = tokenizer.encode_special("<~s>a<s>", "~")
    assert escaped == [*tokenizer.encode("<s>a"), tokenizer.bos_id]


def test_the_mask_id_is_one_more(tokenizer):
    assert tokenizer.mask_id == tokenizer.vocab_size


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory) -> Path:
    """A SentencePiece model of 330 pieces."""
    return as_llama_2(tmp_path_factory.mktemp("llama 2") / "tokenizer.model")


ADDED = {"[PAD]": 330, "<|im_start|>": 331, "<|im_end|>": 332}


def both_files(llama_2: Path, home: Path, *added: str) -> tokenizers.Tokenizer:
    """Put in `home` the model and the tokenizer.json made from it, which alone knows the added tokens."""
    shutil.copy(llama_2, home / "tokenizer.model")
    theirs = tokenizers.Tokenizer.from_file(str(to_tokenizers(llama_2, home / "tokenizer.json")))
    theirs.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in added])
    theirs.save(str(home / "tokenizer.json"))
    return theirs


def test_directory_uses_the_file_that_knows_more(llama_2, tmp_path):
    theirs = both_files(llama_2, tmp_path, *ADDED)
    ours = Tokenizer(tmp_path)
    assert (ours.path.name, ours.vocab_size) == ("tokenizer.json", 333)
    text = "<|im_start|>user\nhi<|im_end|>"
    assert ours.encode_special(text) == theirs.encode(text).ids
    assert ours.encode_special(text)[0] == 331
    with pytest.raises(ValueError, match=r"tokenizer\.model .*tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.model").check_is_of(tmp_path)


@pytest.mark.parametrize("added", [(), ("<pad>",)])
def test_directory_prefers_the_model_of_equals(llama_2, tmp_path, added):
    """Padding does not count: directories that add it may have models without a row for it."""
    both_files(llama_2, tmp_path, *added)
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict.fromkeys(added, 330)))
    ours = Tokenizer(tmp_path)
    assert (ours.path.name, ours.vocab_size) == ("tokenizer.model", 330)
    assert ours.fingerprint() == Tokenizer(llama_2).fingerprint()


def test_either_file_of_equals_is_the_directory_s(llama_2, tmp_path):
    both_files(llama_2, tmp_path)
    named = Tokenizer(tmp_path / "tokenizer.json")
    named.check_is_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<0x0A>"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json .*tokenizer\.model"):
        named.check_is_of(tmp_path)


def test_tiktoken_vocabulary_gives_way_to_tokenizer_json(hugging_face, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ValueError, match=r"tokenizer\.model: .*tiktoken.*tokenizer\.json"):
            Tokenizer(path)
    shutil.copy(hugging_face.path, tmp_path)
    assert Tokenizer(tmp_path).path.name == "tokenizer.json"
    with pytest.raises(ValueError, match=f"tiktoken.* use {tmp_path}/tokenizer.json"):
        Tokenizer(tmp_path / "tokenizer.model")


def name_beside(home: Path, where: str, added: dict[str, int], special: str = "<|", **settings) -> None:
    """Name the added tokens in one of the two files that may do it; those that begin with `special` are so."""
    special = [name for name in added if name.startswith(special)]
    settings |= {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if where == "added_tokens.json":
        (home / where).write_text(json.dumps(added))
        (home / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": special}))
    else:
        options = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        decoder = {i: {"content": name, "special": name in special, **options} for name, i in added.items()}
        settings["added_tokens_decoder"] = decoder
    (home / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_a_sentencepiece_model(llama_2, tmp_path, where, legacy, monkeypatch):
    """As transformers reads the directory; `legacy`: whether texts after a token begin with a space, as the first."""
    monkeypatch.setattr(tokenizer_sentencepiece, "PART", 1)
    shutil.copy(llama_2, tmp_path / "tokenizer.model")
    name_beside(tmp_path, where, {**ADDED, "<tool>": 333}, legacy=legacy)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours = Tokenizer(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id) == (334, 332)
    texts = ["<|im_start|>user\nIt is<|im_end|>\n<|im_start|>x", "a<tool>b\n c\nd[PAD]", "<tool>", "It is"]
    for text in texts + ["a<tool> b"] * (not legacy):  # with it the library leaves out a space before another
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_special(text) == ids
        if "<|" not in text:
            assert ours.encode(text) == ids
        assert ours.decode(ours.encode(text)) == text
    assert not {331, 332} & set(ours.encode("<|im_start|>user<|im_end|>"))
    assert ours.encode_special("<~|im_start|>a<~tool>b<tool>", "~")[-1] == 333
    assert not {331, 333} & set(ours.encode_special("<~|im_start|>a<~tool>b", "~"))
    text = "<|im_start|>user\n a b<tool>c"
    assert ours.decode(ours.encode_special(text)) == text


def test_added_tokens_keep_their_options(llama_2, tmp_path):
    """White space beside, ids with a gap, a name instead of a piece, and tokens of nothing but white space."""
    shutil.copy(llama_2, tmp_path / "tokenizer.model")
    decoder = {
        "340": {"content": "<go>", "special": True, "lstrip": True, "rstrip": True},
        "9": {"content": "<old>", "special": True},
        "335": {"content": "    ", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    ours, a = Tokenizer(tmp_path), Tokenizer(llama_2).encode("a")
    assert ours.vocab_size == 341
    assert ours.encode_special("a \n<go>  a<old>") == [*a, 340, *a, 9]
    assert ours.encode("a    a") == [*a, 335, *a]
    assert ours.decode([*a, 337, 9, *a, 335]) == "a<old>a    "


def test_tokens_added_beside_tokenizer_json(tmp_path):
    save_json(tmp_path / "tokenizer.json")
    name_beside(tmp_path, "added_tokens.json", {"<tool>": 320, "<|im_end|>": 321, "<pad>": 322})
    ours = Tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos_id) == (322, 321)
    assert ours.encode_special("a<tool>b<|im_end|>") == [*ours.encode("a"), 320, *ours.encode("b"), 321]
    assert 320 in ours.encode("a<tool>")
    assert 321 not in ours.encode("a<|im_end|>")
    name_beside(tmp_path, "added_tokens.json", {"<tool>": 320, "<|im_end|>": 325})
    with pytest.raises(ValueError, match=r"tokenizer\.json .*<\|im_end\|>.* 325.* 321"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_copy_knows_the_added_tokens(llama_2, tmp_path, where):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    copy.mkdir()
    shutil.copy(llama_2, source)
    prints = {Tokenizer(source).fingerprint()}
    more = {**ADDED, "<tool>": 333}
    for added, special, legacy in ((ADDED, "<|", True), (more, "<|", True), (more, "<", True), (more, "<", False)):
        name_beside(source, where, added, special, legacy=legacy)
        copy_tokenizer(Tokenizer(source), copy)
        assert Tokenizer(copy).fingerprint() == Tokenizer(source).fingerprint()
        prints.add(Tokenizer(copy).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("added_tokens.json", '{"<a>": "330"}'),
        ("added_tokens.json", '{"<a>": -1}'),
        ("added_tokens.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "<a>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"330": {"special": true}}}'),
    ],
)
def test_bad_added_tokens(llama_2, tmp_path, where, content):
    shutil.copy(llama_2, tmp_path)
    (tmp_path / where).write_text(content)
    with pytest.raises(ValueError, match=re.escape(where)):
        Tokenizer(tmp_path)


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


def test_fingerprint_knows_the_end_of_sequence(tmp_path):
    """A base and an instruct model may share tokenizer.json and differ in the EOS that their settings name."""
    prints = set()
    for name in ("</s>", "<|im_end|>"):
        home = tmp_path / name.strip("<|/>")
        home.mkdir()
        save_json(home / "tokenizer.json", ["<s>", "</s>", "<|im_end|>"])
        (home / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        prints.add(Tokenizer(home).fingerprint())
    assert len(prints) == 2


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
        ("garbage.model", b"hello", "SentencePiece"),
        ("empty.model", b"", "SentencePiece"),
        ("garbage.json", b"hello", r"tokenizer\.json"),
        ("empty.json", b"", r"tokenizer\.json"),
        ("other.json", b"{}", r"tokenizer\.json"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not .*{said}") as error:
        Tokenizer(tmp_path / name)
    one_line(error)


def test_a_truncated_model(tmp_path, sentencepiece):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece.path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"tokenizer\.model: not .*SentencePiece"):
        Tokenizer(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no .*tokenizer"):
        Tokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model .*no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_a_begin(tmp_path):
    """Qwen's `bos_token` is null: nothing stands before a text, and where a token must, it is <|endoftext|>."""
    path = save_json(tmp_path / "tokenizer.json", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    named = [tokenizer.special[name] for name in ("<|endoftext|>", "<|im_end|>")]
    assert [tokenizer.bos_id, tokenizer.eos_id] == named
    assert tokenizer.begin == []


@pytest.mark.parametrize(("special", "said"), [(["<pad>"], "no bos_token"), (["<s>"], "no eos_token")])
def test_a_tokenizer_without_begin_or_end(tmp_path, special, said):
    with pytest.raises(ValueError, match=said):
        Tokenizer(save_json(tmp_path / "tokenizer.json", special))


@pytest.mark.parametrize("texts", [[], [""], ["ab"]])
def test_too_little_text(tmp_path, texts):
    with pytest.raises(ValueError, match=" 420 pieces") as error:
        train(texts, 420, tmp_path / "tokenizer.model")
    one_line(error)
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


OURS = {
    "model_type": "bpe",
    "vocab_size": 600,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n"],
}
LINES = {"user_defined_symbols": [], "by_line": True}  # no newline in training: newlines are the byte <0x0A>
# For each: options that are not ours, and how many ids come before a newline that begins a text; None: texts stay whole
MODELS = {
    "ours": ({}, 0),
    "dummy prefix": ({"add_dummy_prefix": True}, 1),
    "as Llama 2": ({"add_dummy_prefix": True, **LINES}, 1),
    "newline is a byte": (LINES, 0),
    "compatible characters": ({"normalization_rule_name": "nfkc"}, 0),
    "spaces end words": ({"treat_whitespace_as_suffix": True}, 0),
    "two newlines are a piece": ({"user_defined_symbols": ["\n", "\n\n"]}, None),
    "a newline and an indent are a piece": ({"user_defined_symbols": ["\n", "\n    "]}, None),
    "newlines in pieces": ({"user_defined_symbols": []}, None),
    "white space is collapsed": ({"remove_extra_whitespaces": True}, None),
    "newlines become spaces": ({"normalization_rule_name": "nmt_nfkc"}, None),
    "a suffix is added": ({"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}, None),
    "newlines are unknown": ({"byte_fallback": False, **LINES}, None),
    "unigram": ({"model_type": "unigram"}, None),
}


@pytest.fixture(scope="module")
def long_text() -> str:
    rng = random.Random(0)
    odd = [*ODD, *SPECIAL, "\n\n", "\n    x", " \n", "\r\n", "\n\u0301", "ab", "9", "return", "é"]
    return "\n".join([*SOURCES, "".join(rng.choices(odd, k=20_000)), "x" * 40_000, HELD_OUT])


@pytest.mark.parametrize("kind", MODELS)
def test_long_texts_have_the_ids_of_the_whole(home, long_text, kind, monkeypatch):
    """Cut at newlines where that is exact, and else not cut, for models with all kinds of options."""
    options, prefix = MODELS[kind]
    options = OURS | options
    texts = SOURCES if not options.pop("by_line", False) else [line for text in SOURCES for line in text.split("\n")]
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, max_sentence_length=1 << 20, **options
    )
    (home / f"{kind}.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(home / f"{kind}.model")
    processor = tokenizer._impl.processor
    assert tokenizer._impl._newline == prefix
    whole = processor.encode(long_text)
    for part in (1, 1000, tokenizer_sentencepiece.PART):
        monkeypatch.setattr(tokenizer_sentencepiece, "PART", part)
        assert tokenizer.encode(long_text, bos=True, eos=True) == [tokenizer.bos_id, *whole, tokenizer.eos_id]
    monkeypatch.setattr(tokenizer_sentencepiece, "PART", 1)
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices(["\n", "a", " ", "b", "\t", "é", "  ", "1", "\r"], k=rng.randrange(12)))
        assert tokenizer.encode(text) == processor.encode(text)


def test_long_texts_are_cut(sentencepiece, long_text):
    """Else an exact test of the cuts tests none."""
    parts = [part for part in sentencepiece.parts(long_text) if part]
    assert len(parts) > 5
    assert sum(parts, []) == sentencepiece.encode(long_text)
    texts = [sentencepiece.decode(part) for part in parts]
    assert all(text.startswith("\n") and len(text) >= tokenizer_sentencepiece.PART for text in texts[1:-1])


GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT_2, LLAMA_3, r"\n", r"[^\n]+\n*", r"\p{L}\n+|\s+|\S+"])
def test_json_parts_have_the_ids_of_the_whole(long_text, pattern, tmp_path, monkeypatch):
    """Also with patterns that take letters and newlines together, where a cut may change ids."""
    tokenizer = tokenizers.Tokenizer.from_file(str(save_json(tmp_path / "tokenizer.json")))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>", "<mask>"], show_progress=False
    )
    tokenizer.train_from_iterator(SOURCES, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ours, whole = Tokenizer(tmp_path), tokenizer.encode(long_text, add_special_tokens=False).ids
    for part in (20, 1000):
        monkeypatch.setattr(tokenizer_json, "PART", part)
        assert ours.encode(long_text) == whole
        if pattern in (GPT_2, LLAMA_3):
            assert len(list(ours.parts(long_text))) > len(long_text) / part / 10
            prose = "Words in lines, 漢字 too.\n漢字。\n\nAnd 12 of\n" * 50
            assert len(list(ours.parts(prose))) > len(prose) / part / 10
            assert ours.encode(prose) == tokenizer.encode(prose, add_special_tokens=False).ids


def test_json_of_llama_2_is_cut_without_more_spaces(llama_2, long_text, tmp_path, monkeypatch):
    """Its normaliser puts a space before every text; no pattern divides a text into words."""
    monkeypatch.setattr(tokenizer_json, "PART", 200)
    whole = tokenizers.Tokenizer.from_file(str(to_tokenizers(llama_2, tmp_path / "tokenizer.json")))
    parts = list(Tokenizer(tmp_path).parts(SOURCES[0]))
    assert len(parts) > 20
    assert sum(parts, []) == whole.encode(SOURCES[0], add_special_tokens=False).ids


def test_training_pieces_lose_nothing(monkeypatch):
    """None is longer than SentencePiece takes, and only a line that is too long itself is cut."""
    monkeypatch.setattr(tokenizer_training, "MAX_SENTENCE", 40)
    rng = random.Random(0)
    texts = ["", "a", "\n" * 30, "é" * 35, "é" * 10, "é" * 11, "a\n" + "🙂" * 25 + "\nb"]
    texts += ["".join(rng.choices("ab\n🙂", weights=[5, 5, 1, 1], k=rng.randrange(80))) for _ in range(200)]
    for text in texts:
        pieces = list(training_pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= 40 for piece in pieces)
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert before.endswith("\n") or (len(before) == 10 and "\n" not in before)
            assert before.endswith("\n") or after
    assert list(training_pieces("12345678\n0\n2345")) == ["12345678\n", "0\n2345"]


def test_all_of_a_long_text_is_trained_on(tmp_path):
    """SentencePiece itself drops a text of more bytes than MAX_SENTENCE, and says nothing."""
    text = "alpha beta\n" * 50_000 + " omega" * 100_000
    assert len(text.encode()) > MAX_SENTENCE
    tokenizer = train(training_pieces(text), 284, tmp_path / "tokenizer.model")
    assert len(tokenizer.encode(" omega")) == 1
    assert len(tokenizer.encode("alpha")) == 1
