"""Files and strings to generated text."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from cepe_jax.data.tokenizer import train
from cepe_jax.inference import text
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.text import GenerateConfig, chunks_of, generate_text

LETTERS = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])  # no bos= or eos=: none is asked for


def rows(array: np.ndarray) -> list[str]:
    return ["".join(chr(token) if token else "." for token in row) for row in array]


def test_chunks_of():
    """A text starts a chunk, its last one is padded on the right, in order."""
    context, mask = chunks_of(["abcdefg", "", "hi", "klmn"], LETTERS, 4)
    assert rows(context) == ["abcd", "efg.", "hi..", "klmn"]
    np.testing.assert_array_equal(mask, context != 0)
    assert (context.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_no_chunk(texts):
    context, mask = chunks_of(texts, LETTERS, 4)
    assert context.shape == mask.shape == (0, 4)


def test_generate_text(tmp_path, monkeypatch):
    """BOS and the prompt for the decoder; the files, without BOS, for the encoder; the text of the new tokens."""
    tokenizer = train(["def f(x):\n    return x + 1\n" * 20, "class A:\n\tpass\n"], 290, tmp_path / "tokenizer.model")
    (tmp_path / "a.txt").write_bytes("def g(y):\r\n\treturn 🙂\n".encode())
    (tmp_path / "b.txt").write_text("pass")
    context = tmp_path / "a.txt", tmp_path / "b.txt"
    called = []

    def generate(*args, **kwargs):
        called.append((args, kwargs))
        return [tokenizer.encode(" x\n\ty")]

    monkeypatch.setattr(text, "load", lambda path, dtype: (path, dtype))
    monkeypatch.setattr(text, "encode_chunks", lambda model, context, mask: context.reshape(1, -1))
    monkeypatch.setattr(text, "generate", generate)
    sampling = Sampling(temperature=2.0, seed=3)
    config = GenerateConfig(tmp_path, "def f(x):", context, 5, 9, sampling, "bfloat16")
    assert generate_text(config) == " x\n\ty"
    assert generate_text(dataclasses.replace(config, context=())) == " x\n\ty"
    with_context, without = called
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f(x):")]
    settings = {"max_new_tokens": 9, "sampling": sampling, "stop_ids": [tokenizer.eos_id]}
    assert without == (((tmp_path, "bfloat16"), [prompt]), settings)
    (model, prompts, chunks, mask), given = with_context
    assert (model, prompts, given) == ((tmp_path, "bfloat16"), [prompt], settings)
    assert chunks.shape == mask.shape
    wanted = chunks_of([file.read_bytes().decode() for file in context], tokenizer, 5)
    np.testing.assert_array_equal(chunks, wanted[0].reshape(1, -1))
    np.testing.assert_array_equal(mask, wanted[1].reshape(1, -1))
    assert tokenizer.decode(chunks[mask]) == "def g(y):\r\n\treturn 🙂\npass"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "bad.txt: an empty document"), (b"ab\xff", "bad.txt: not UTF-8 at byte 2"), (None, "bad.txt")],
)
def test_bad_files(tmp_path, content, said):
    """Seen before anything is loaded."""
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        generate_text(GenerateConfig(tmp_path / "absent", "x", (tmp_path / "bad.txt",)))


def test_bad_config(tmp_path):
    with pytest.raises(ValueError, match="chunk_length is 0: give"):
        GenerateConfig(tmp_path, "x", chunk_length=0)
    with pytest.raises((ValueError, FileNotFoundError), match="absent"):
        generate_text(GenerateConfig(tmp_path / "absent", "x"))
