"""From files and strings to generated text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.context import encode_chunks
from cepe_jax.inference.generate import Sampling, generate
from cepe_jax.model.cepe import flat_mask
from cepe_jax.weights.huggingface import load


@dataclass(frozen=True)
class GenerateConfig:
    model: Path  # a model directory with its tokenizer
    prompt: str
    context: tuple[Path, ...] = ()  # files of text that the encoder reads
    chunk_length: int = 256  # tokens per chunk; the length of training
    max_new_tokens: int = 100
    sampling: Sampling = Sampling()
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length is {self.chunk_length}: give a number above 0")


def chunks_of(texts: list[str], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(C, L) chunks of the texts' tokens and their mask. No BOS; a text starts a chunk, its last one is padded."""
    chunks: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        chunks += [ids[start : start + length] for start in range(0, len(ids), length)]
    context, mask = np.zeros((len(chunks), length), np.int32), np.zeros((len(chunks), length), bool)
    for row, chunk in enumerate(chunks):
        context[row, : len(chunk)], mask[row, : len(chunk)] = chunk, True
    return context, mask


def read_text(path: Path) -> str:
    text = path.read_bytes()
    if not text:
        raise ValueError(f"{path}: an empty document: leave it out")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: convert it") from None


def generate_text(config: GenerateConfig) -> str:
    """What the model writes after the prompt, reading the context files."""
    texts = [read_text(path) for path in config.context]
    tokenizer = Tokenizer(config.model)
    model = load(config.model, config.dtype)
    context, mask = chunks_of(texts, tokenizer, config.chunk_length)
    memory = (encode_chunks(model, context[None], mask[None]), flat_mask(mask[None])) if texts else ()
    prompt = tokenizer.encode(config.prompt, bos=True)
    limits = {"max_new_tokens": config.max_new_tokens, "stop_ids": [tokenizer.eos_id]}
    (new,) = generate(model, [prompt], *memory, sampling=config.sampling, **limits)
    return tokenizer.decode(new)
