"""A small corpus whose texts the test says, its index, and an encoder of sentences."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np

from cepe_jax.data.corpus import features_of
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.llama import Llama
from cepe_jax.tracing.index import Index, IndexConfig, build_index
from support.datasets import write
from support.models import ENCODER, make_cepe, make_encoder
from support.tokenizers import byte_level

HASHED = "support.tracing:hashed"


def hashed(texts: list[str]) -> np.ndarray:
    """Vectors (N, 64) of texts: counts of their letters' trigrams, by hash."""
    vectors_NE = np.zeros((len(texts), 64))
    for vector, text in zip(vectors_NE, texts, strict=True):
        for start in range(len(text) - 2):
            vector[zlib.crc32(text[start : start + 3].encode()) % 64] += 1
    return vectors_NE


def write_tokenizer(home: Path) -> Tokenizer:
    """Write a tokenizer of 330 ids or fewer into a directory."""
    home.mkdir(parents=True, exist_ok=True)
    byte_level(home / "tokenizer.json", ("<s>", "</s>"), 330)
    (home / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer(home)


def write_corpus(home: Path, texts: list[str]) -> Path:
    """Write a dataset of documents, called doc 0, doc 1, ..., of which every second one is in the second shard."""
    tokenizer = write_tokenizer(home)
    records = [
        {"tokens": np.array(tokenizer.encode(text, bos=True, eos=True)), "name": f"doc {n}", "domain": "d"}
        for n, text in enumerate(texts)
    ]
    return write(home / "documents", "documents", features_of(tokenizer), [records[::2], records[1::2]], tokenizer)


def write_index(home: Path, texts: list[str]) -> Index:
    """Write a corpus and its index below `home`."""
    build_index(IndexConfig(data=write_corpus(home, texts), out=home / "index"))
    return Index(home / "index")


def write_task(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write a file of prompts and answers."""
    lines = (json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows)
    path.write_text("".join(lines))
    return path


def in_torch(decoder: Llama):
    """Return the decoder in torch, as that of a CEPE: called with ids (B, T) it gives logits (B, T, V)."""
    from support.torch_cepe import copy_of

    size = decoder.config.vocab_size
    encoder = make_encoder(dataclasses.replace(ENCODER, vocab_size=size + 1, mlm_head=False))
    return copy_of(Cepe(decoder, encoder, make_cepe(vocab_size=size).cross))
