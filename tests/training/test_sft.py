"""Stage sft from lines of conversations to a model that chats: a decoder with factors, and a CEPE with documents."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import CROSS_LAYERS, DECODER, ENCODER, bits, filled
from support.tokenizers import write_chatml

import cepe_jax
from cepe_jax.config import CepeConfig, LoraConfig
from cepe_jax.data.conversations import ConversationConfig, prepare_conversations
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.model.cepe import Cepe
from cepe_jax.settings import decode, read_yaml
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.run import dry_run, run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import load, save

VOCABULARY = 334
EXAMPLES = ExampleConfig(window=64, num_chunks=2, chunk_length=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Conversations whose answers repeat the question; a decoder and a CEPE that have a chat template."""
    home = tmp_path_factory.mktemp("sft")
    write_chatml(home)
    sizes = {"vocab_size": VOCABULARY}
    encoder = dataclasses.replace(ENCODER, vocab_size=VOCABULARY + 1, mlm_head=False)
    config = CepeConfig(dataclasses.replace(DECODER, **sizes), encoder, CROSS_LAYERS)
    cepe = filled(lambda: Cepe.create(config, key=jax.random.key(0)), seed=3)
    save(cepe, home / "cepe", assets=home)
    save(cepe.decoder, home / "decoder", assets=home)
    for name in ("plain", "read"):
        (home / name).mkdir()
        with open(home / name / "chats.jsonl", "w") as file:
            for word in (f"{a}{b}" for a in "abcdef" for b in "uvwxyz"):
                turns = [("system", "Say it."), ("user", word), ("assistant", word)]
                line = {"messages": [{"role": role, "content": content} for role, content in turns]}
                file.write(json.dumps(line | ({"documents": ["it is " + word]} if name == "read" else {})) + "\n")
        out, tokenizer = home / "data" / name, str(home / "decoder")
        prepare_conversations(
            ConversationConfig(input=home / name, out=out, tokenizer=tokenizer, test_fraction=0.3, workers=1)
        )
    return home


def config_of(home, out, data: str, **settings) -> TrainConfig:
    return TrainConfig("sft", home / "data" / data, out, 3, 4, examples=EXAMPLES, **settings)


def test_a_decoder_learns_answers_by_factors_alone(home, tmp_path):
    settings = {"decoder": str(home / "decoder"), "train": ("decoder_lora",), "lora": LoraConfig(2, 4.0)}
    settings |= {"evaluation": EvalConfig(data=home / "data/plain", every=3, batches=1)}
    config = config_of(home, tmp_path / "out", "plain", **settings)
    trained = load(run_stage(config))
    assert bits(trained.parts["decoder"]) == bits(load(home / "decoder"))
    assert all(leaf.any() for leaf in jax.tree.leaves(trained.parts["decoder_lora"]))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["nll"]) for line in lines if "nll" in line)
    assert any("eval" in name for line in lines for name in line)
    model = cepe_jax.load(tmp_path / "out/model", window=64)
    assert isinstance("".join(model.chat().say("au", max_new_tokens=3)), str)


def test_the_published_config_runs_with_tiny_sizes(home, tmp_path):
    values = read_yaml(Path(__file__).parents[2] / "configs/tune_sft.yaml")
    tiny = {"steps": 2, "batch_size": 4, "dtype": "float32", "loss_chunk": 5, "examples": {"window": 64}}
    tiny |= {"data": str(home / "data/plain"), "out": str(tmp_path / "out"), "decoder": str(home / "decoder")}
    trained = load(run_stage(decode(TrainConfig, values | tiny))).parts
    assert trained["decoder_lora"].config == LoraConfig(rank=16, alpha=32.0)
    assert all(leaf.any() for leaf in jax.tree.leaves(trained["decoder_lora"]))
    assert bits(trained["decoder"]) == bits(load(home / "decoder"))


def test_a_cepe_reads_the_documents(home, tmp_path):
    """Both kinds of data in one run; what the encoder reads matters to the loss of those with documents."""
    config = config_of(home, tmp_path / "out", "", cepe=str(home / "cepe"), mix={"plain": 1.0, "read": 1.0})
    trained, start = load(run_stage(config)).parts, load(home / "cepe").parts
    assert bits(trained["decoder"]) == bits(start["decoder"])
    for part in ("encoder", "cross"):
        assert all(a != b for a, b in zip(bits(trained[part]), bits(start[part]), strict=True))


def test_a_plain_decoder_reads_no_documents(home, tmp_path):
    config = config_of(home, tmp_path / "out", "read", decoder=str(home / "decoder"))
    with pytest.raises(ValueError, match="chats.jsonl:[0-9]+ has documents, which an encoder reads"):
        run_stage(config)


def test_a_dry_run_counts_windows(home, tmp_path):
    config = config_of(home, tmp_path / "out", "plain", decoder=str(home / "decoder"), dry_run=True)
    said = "\n".join(dry_run(config))
    assert "12 sequences" not in said
    assert "256 tokens in windows" in said
    assert "plain: " in said
