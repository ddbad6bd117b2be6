"""A decoder of 128 tokens that reads 1,024 with another RoPE base, and the controls that do not; two seeds.

6 CPU-minutes: these say what `rope_theta` is for, on a decoder that was trained from random weights.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from support import datasets

from cepe_jax.config import DecoderConfig, RopeConfig
from cepe_jax.data.conversations import features_of
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.records import CONVERSATIONS
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.caches import FULL, new_cache
from cepe_jax.inference.generate import GREEDY, Draws, read
from cepe_jax.model.llama import Llama
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import load, save

pytestmark = pytest.mark.slow
SHORT, LONG = 128, 1024  # tokens of a text
OLD, NEW = 1e3, 1e5  # bases of RoPE
STEPS, MORE = 400, 40  # steps of the first training, and of each that goes on from it
BATCH = 16  # texts of a step of the first training; then half as many
KINDS, DIGITS, NOISE = 4, 16, 64  # a passkey has a digit of each kind
ASKED, DIGIT, OTHER = 4, 4 + KINDS, 4 + KINDS + KINDS * DIGITS  # first ids of questions, digits and other tokens
MUON = OptimizerConfig(kind="muon", learning_rate=3e-3)
TEXTS = 50  # in which passkeys are looked for
TOY = DecoderConfig(
    vocab_size=300,  # as many as the tokenizer of the datasets has
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_width=64,
    rope=RopeConfig(theta=OLD),
)


@pytest.fixture(autouse=True)
def optimized():
    """The tests' environment turns LLVM's optimisations off, without which a step takes two to three times as long."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def texts(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Return texts of random tokens, in which a digit of each kind stands anywhere, and is asked for at the end.

    The last 2 x KINDS tokens are the questions in random order, each with its answer.
    """
    tokens, body = OTHER + rng.integers(0, NOISE, (count, length)), length - 2 * KINDS
    places = rng.permuted(np.tile(np.arange(body), (count, 1)), axis=1)[:, :KINDS]
    passkeys = DIGIT + DIGITS * np.arange(KINDS) + rng.integers(0, DIGITS, (count, KINDS))
    np.put_along_axis(tokens, places, passkeys, axis=1)
    order = rng.permuted(np.tile(np.arange(KINDS), (count, 1)), axis=1)
    tokens[:, body::2], tokens[:, body + 1 :: 2] = ASKED + order, np.take_along_axis(passkeys, order, axis=1)
    return tokens


def write_texts(path: Path, seed: int, count: int, length: int, tokenizer: Tokenizer) -> None:
    """Write a dataset of conversations of which the digits that are asked for are learnt."""
    targets = np.zeros(length, np.uint8)
    targets[length - 2 * KINDS + 1 :: 2] = 1
    shared = {"targets": targets, "documents": np.zeros(0), "document_lengths": np.zeros(0), "domain": "d"}
    drawn = texts(np.random.default_rng(seed), count, length)
    records = [shared | {"tokens": tokens, "name": str(number)} for number, tokens in enumerate(drawn)]
    datasets.write(path, CONVERSATIONS, features_of(tokenizer), [records], tokenizer, lengths=[length] * count)


def passkeys_read(model: Path, length: int) -> float:
    """Return the share of the texts, new to the model, of which it gives all digits, each asked for alone."""
    tokens, body = texts(np.random.default_rng(length), TEXTS, length), length - 2 * KINDS
    decoder, right = load(model), np.ones(TEXTS, bool)
    for at in range(body, length, 2):
        prompts = np.concatenate([tokens[:, :body], tokens[:, at : at + 1]], axis=1)
        cache = new_cache(decoder, FULL, TEXTS, length + 1)
        drawn_B1, _ = read(decoder, prompts.tolist(), None, cache, Draws.of([GREEDY] * TEXTS), FULL)
        right &= np.asarray(drawn_B1)[:, 0] == tokens[:, at + 1]
    return float(right.mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_another_base_extends_what_a_decoder_reads(seed, tmp_path):
    """Against as many steps of short texts, and of long ones with the old base."""
    tokenizer = datasets.make_tokenizer(tmp_path)
    save(jax.jit(lambda key: Llama(TOY, key=key))(jax.random.key(seed)), tmp_path / "start", tmp_path)
    write_texts(tmp_path / "short", seed, STEPS * BATCH, SHORT, tokenizer)
    write_texts(tmp_path / "long", seed, 512, LONG, tokenizer)

    def trained(name: str, start: Path, length: int, steps: int = MORE, **settings) -> Path:
        data = tmp_path / ("short" if length == SHORT else "long")
        examples, optimizer = ExampleConfig(window=length - 1), dataclasses.replace(MUON, learning_rate=1e-3)
        settings = {"examples": examples, "optimizer": optimizer, "save_every": STEPS, "seed": seed} | settings
        return run_stage(TrainConfig("sft", data, tmp_path / name, steps, BATCH if steps == STEPS else BATCH // 2,
                                     decoder=str(start), **settings))  # fmt: skip

    models = {"base": trained("base", tmp_path / "start", SHORT, STEPS, optimizer=MUON)}
    models["short texts"] = trained("control", models["base"], SHORT)
    models["old base"] = trained("old", models["base"], LONG)
    models["new base"] = trained("new", models["base"], LONG, rope_theta=NEW)
    rebased = dataclasses.replace(TOY, rope=RopeConfig(theta=NEW))
    models["new base, no step"] = tmp_path / "rebased"
    save(load(models["base"], config=rebased), models["new base, no step"], tmp_path)
    shares = {name: (passkeys_read(path, SHORT), passkeys_read(path, LONG)) for name, path in models.items()}
    print(seed, shares)
    assert shares["base"][0] > 0.9
    assert shares["base"][1] < 0.05
    assert shares["short texts"][1] < 0.05
    assert shares["old base"][1] < 0.2
    assert min(shares["new base"]) > 0.9
