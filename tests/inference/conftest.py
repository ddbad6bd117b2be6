"""The tiny text model, loaded, and what a fresh model says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import CHUNK, LLAMA_2, as_llama_2

import cepe_jax
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.text import TextModel
from cepe_jax.weights.source import save

MOST_CHUNKS = 24


@pytest.fixture(scope="session")
def llama_2(home, text_model, tmp_path_factory) -> TextModel:
    """The same model with a tokenizer that puts a space before every text, and a template that strips what is said."""
    beside = tmp_path_factory.mktemp("llama_2")
    tokenizer = Tokenizer(as_llama_2(beside / "tokenizer.model"))
    (beside / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA_2}))
    return dataclasses.replace(text_model, tokenizer=tokenizer, stop_ids=(tokenizer.eos_id,))


@pytest.fixture(scope="session")
def text_model(home) -> TextModel:
    return cepe_jax.load(home)


@pytest.fixture(scope="session")
def plain_home(home, text_model, tmp_path_factory) -> Path:
    """A directory of its decoder alone."""
    path = tmp_path_factory.mktemp("plain") / "model"
    save(text_model.model.decoder, path, home)
    return path


@pytest.fixture(scope="session")
def plain_model(text_model) -> TextModel:
    return dataclasses.replace(text_model, model=text_model.model.decoder)


@pytest.fixture(scope="session")
def fresh(text_model, forward):
    """Logits (V,) after these tokens beside these chunks, by the whole model: no cache, no kept memory."""

    def fresh(tokens: list[int], chunks: list[list[int]] = []) -> np.ndarray:  # noqa: B006 (never changed)
        tokens_BT = np.zeros((1, 64), np.int32)
        tokens_BT[0, : len(tokens)] = tokens
        context_BCL = np.zeros((1, MOST_CHUNKS, CHUNK), np.int32)
        mask_BCL = np.zeros(context_BCL.shape, bool)
        for row, chunk in enumerate(chunks):
            context_BCL[0, row, : len(chunk)], mask_BCL[0, row, : len(chunk)] = chunk, True
        logits_BTV = forward(text_model.model, tokens_BT, context_BCL, mask_BCL, np.arange(64)[None] < len(tokens))
        return np.asarray(logits_BTV)[0, len(tokens) - 1]

    return fresh
