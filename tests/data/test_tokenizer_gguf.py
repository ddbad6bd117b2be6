"""Tokenizers from GGUF metadata give the ids of those that the metadata were taken from."""

import json

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from support.tokenizers import CHATML, CHATML_TOKENS, TEXTS, as_llama_2
from tokenizers import decoders, models, pre_tokenizers, trainers

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_gguf import is_known, write
from cepe_jax.data.tokenizer_training import train

PROBES = [
    "In 1984  there were   12345 pages\n\n\t 007  x",
    "  1",
    " 1 \r\n 2",
    "naïve — 日本語 🙂 ½ ٣٤ Ⅻ",
    "I'm WE'LL it's",
]
PROBES += ["def f(x):\n    return x + 1\n", "a<|im_end|>b<a>c <a> d", "\n", " a", "   ", ""]
SPECIAL = ["<|endoftext|>", *CHATML_TOKENS]
UNMERGED = "Ġzebra"  # a token that no merge leads to
KEYS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


def byte_level(pre_tokenizer, path):
    """A BPE of the `tokenizers` library that cuts as told, with merges that join digits, and an added token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, **options)
    tokenizer.train_from_iterator([*TEXTS, *PROBES * 5, "1984" * 99], trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens([tokenizers.AddedToken("<a>", normalized=False)])
    tokenizer.save(str(path))
    return tokenizer


def metadata_of(path) -> dict:
    """What llama.cpp's converter writes of a tokenizer.json."""
    found = json.loads(path.read_text())
    kinds = {token["id"]: 3 if token["special"] else 4 for token in found["added_tokens"]}
    ids = found["model"]["vocab"] | {token["content"]: token["id"] for token in found["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    merges = [" ".join(merge) for merge in found["model"]["merges"]]
    kinds = [kinds.get(i, 1) for i in range(len(tokens))]
    return {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges} | KEYS


DIGITS = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_smollm(tmp_path):
    original = byte_level(pre_tokenizers.Sequence(list(DIGITS)), tmp_path / "original.json")
    assert original.token_to_id("1984") is not None  # merges would join digits that are not cut
    write(metadata_of(tmp_path / "original.json") | {"pre": "smollm"}, CHATML, tmp_path, "x.gguf")
    ours = Tokenizer(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (361, 1, 2)
    assert set(ours.special) == set(SPECIAL)
    for text in PROBES:
        assert ours.encode_special(text) == original.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.pop("chat_template") == CHATML
    assert settings.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert settings == dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))


def test_where_digits_are_cut(tmp_path):
    """Around each digit first: of several spaces the last stays with the others, where GPT-2 gives it to a number.

    Tokens are what merges lead to.
    """
    byte_level(None, tmp_path / "original.json")
    metadata = metadata_of(tmp_path / "original.json") | {"pre": "smollm"}
    metadata["tokens"][-1], metadata["token_type"][-1] = UNMERGED, 1
    write(metadata, None, tmp_path, "x.gguf")
    assert 360 not in Tokenizer(tmp_path).encode("a zebra")
    assert Tokenizer(tmp_path).begin == []
    parts = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str
    assert [part for part, _ in parts("in   19 a  b\n\n 7")] == [
        *("in", "ĠĠĠ", "1", "9", "Ġa", "Ġ", "Ġb", "ĊĊĠ", "7"),
    ]


def test_llama_3(tmp_path):
    """Numbers in threes, contractions of any case, and words that are tokens without a merge that leads to them."""
    byte_level(None, tmp_path / "original.json")
    metadata = metadata_of(tmp_path / "original.json") | {"pre": "llama-bpe"}
    metadata["tokens"][-1], metadata["token_type"][-1] = UNMERGED, 1
    write(metadata, None, tmp_path, "x.gguf")
    assert Tokenizer(tmp_path).begin == [1]  # llama.cpp's default for these
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    parts = [part for part, _ in library.pre_tokenizer.pre_tokenize_str("WE'LLpay  12345.67\n\n\tnow!!\n x")]
    assert parts == ["WE", "'LL", "pay", "Ġ", "Ġ", "123", "45", ".", "67", "ĊĊ", "ĉnow", "!!Ċ", "Ġx"]
    assert Tokenizer(tmp_path).encode("a zebra") == [metadata["tokens"].index("a"), 360]


def test_qwen(tmp_path):
    """As transformers' own class cuts: digits one by one, characters composed first, and nothing before a text."""
    transformers = pytest.importorskip("transformers")
    byte_level(None, tmp_path / "original.json")
    metadata = metadata_of(tmp_path / "original.json") | {"pre": "qwen2"}
    write(metadata, None, tmp_path, "x.gguf")
    model = json.loads((tmp_path / "original.json").read_text())["model"]
    theirs = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    ours = Tokenizer(tmp_path)
    assert ours.begin == []
    for text in [*PROBES[:5], "nai\u0308ve cafe\u0301", "WE'LLpay  12345.67\n\n\tnow!!\n x", "a zebra"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """The pieces, scores and kinds are the model: with a space before each text, as Llama 2 has it, or without."""
    source = tmp_path / "source.model"
    original = Tokenizer(as_llama_2(source)) if prefix else train(TEXTS, 330, source)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes()).pieces
    columns = {"tokens": "piece", "scores": "score", "token_type": "type"}
    metadata = {ours: [getattr(piece, theirs) for piece in pieces] for ours, theirs in columns.items()}
    metadata |= {"model": "llama"} | KEYS | ({} if prefix else {"add_space_prefix": False})
    write(metadata, CHATML, tmp_path, "x.gguf")
    ours = Tokenizer(tmp_path / "tokenizer.model")
    assert ours.fingerprint() == original.fingerprint()
    for text in PROBES:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    assert ours.begin == [1]
    write(metadata | {"add_bos_token": False}, None, tmp_path, "x.gguf")
    assert Tokenizer(tmp_path).begin == []


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("says", [True, False])
def test_what_a_text_begins_with(pre, says, tmp_path):
    """As the file says, in transformers too."""
    byte_level(None, tmp_path / "original.json")
    metadata = metadata_of(tmp_path / "original.json") | {"pre": pre, "add_bos_token": says}
    write(metadata, None, tmp_path, "x.gguf")
    ours = Tokenizer(tmp_path)
    assert ours.begin == [1] * says
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("It is")["input_ids"] == ours.begin + ours.encode("It is")


def test_a_gguf_file_is_no_tokenizer(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="x.gguf: run scripts/convert.py to-jax on it"):
        Tokenizer(tmp_path / "x.gguf")


def test_what_is_not_written(tmp_path):
    known = [("gpt2", "smollm"), ("gpt2", "llama-bpe"), ("llama", None)]
    unknown = [("gpt2", "tekken"), ("gpt2", None), ("bert", "smollm"), (None, None)]
    assert [pair for pair in known + unknown if is_known(*pair)] == known
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": ["a"], "token_type": [1]} | KEYS
    with pytest.raises(ValueError, match="x.gguf lacks tokenizer.ggml.merges"):
        write(metadata, None, tmp_path, "x.gguf")
    with pytest.raises(ValueError, match="x.gguf: its tokens are .*`b`"):
        write(
            metadata | {"tokens": ["a", "c", "d"], "merges": ["a b"], "token_type": [1] * 3}, None, tmp_path, "x.gguf"
        )
    assert not list(tmp_path.iterdir())
