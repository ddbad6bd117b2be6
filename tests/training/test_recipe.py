"""ChatQA 2's recipe from raw texts to a model that chats about a document: its own configs, with tiny sizes."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import DECODER, bits, filled
from support.tokenizers import TEXTS, as_llama_2

import cepe_jax
from cepe_jax.config import RopeConfig
from cepe_jax.data.conversations import ConversationConfig, prepare_conversations
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.loader import names_in, open_mix
from cepe_jax.data.records import Records
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.model.llama import Llama
from cepe_jax.settings import decode, read_yaml
from cepe_jax.training.run import dry_run, run_stage
from cepe_jax.training.settings import TrainConfig, recipe_of
from cepe_jax.weights.hf_config import window_of
from cepe_jax.weights.source import load, open_model, save

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT, LONG = 320, 400  # tokens of the windows in place of 4,096 and 131,072
TINY = {"dtype": "float32", "loss_chunk": 40, "steps": 1, "batch_size": 4}


def config_of(name: str, window: int, **settings) -> TrainConfig:
    values = read_yaml(CONFIGS / f"chatqa2_{name}.yaml") | TINY | {"examples": {"window": window}, "mesh": {}}
    return decode(TrainConfig, values | {key: str(value) for key, value in settings.items()})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model of 64 positions with a tokenizer of Llama 2's kind, sequences of LONG tokens, conversations."""
    home = tmp_path_factory.mktemp("recipe")
    as_llama_2(home / "tokenizer.model")
    sizes = dataclasses.replace(DECODER, vocab_size=Tokenizer(home).vocab_size)
    (home / "config.json").write_text(json.dumps({"format": "cepe_jax", "kind": "llama", "decoder":
        dataclasses.asdict(sizes), "huggingface": {"max_position_embeddings": 64}}))  # fmt: skip
    save(filled(lambda: Llama(sizes, key=jax.random.key(0)), 1), home / "base", home)
    (home / "raw/book").mkdir(parents=True)
    for number in range(12):
        (home / f"raw/book/{number}.txt").write_text("".join(TEXTS)[: 60 * 2 ** (number % 5)] + f"It is {number}.")
    prepare(PrepareConfig(input=home / "raw", out=home / "documents", tokenizer=str(home / "base"), test_fraction=0.1,
                          retrieval_fraction=0.0, seed=1, workers=1))  # fmt: skip
    for number, (name, count) in enumerate({"sft1": 40, "sft2": 30, "sft3": 20}.items()):
        (home / f"raw-{name}").mkdir()
        with open(home / f"raw-{name}/chats.jsonl", "w") as file:
            for n in range(count):
                turns = [("user", f"what is {n}?"), ("assistant", f"It is {number}.")]
                line = {"messages": [{"role": role, "content": content} for role, content in turns]}
                documents = [] if name == "sft1" else ["the quick brown fox " * number]
                file.write(json.dumps(line | {"documents": documents}) + "\n")
        prepare_conversations(ConversationConfig(
            input=home / f"raw-{name}", out=home / "data" / name, tokenizer=str(home / "base"), template="chatqa2",
            context="prompt", test_fraction=0.2, workers=1,
        ))  # fmt: skip
    return home


def test_the_recipe_runs_with_tiny_sizes(home, monkeypatch):
    """16 CPU-seconds: its five commands, one from the other's output, and a chat about a document at the end."""
    values = read_yaml(CONFIGS / "chatqa2_sample.yaml") | {"length": LONG, "shares": {"0": 0.5, "200": 0.5}}
    values |= {"budget": {"book": 16 * LONG}, "separator_as_text": True, "workers": 1}
    sample(decode(SampleConfig, values | {"data": str(home / "documents"), "out": str(home / "long")}))
    records = Records(home / "long", "train")
    text = records.tokenizer.decode(np.concatenate([record["tokens"] for record in records]))
    assert len(records) == 16
    assert text.count("<s>") >= 8
    assert not any(records.tokenizer.bos_id in record["tokens"] for record in records)

    models = {"": home / "base"}
    models["extend"] = run_stage(config_of("extend", LONG, data=home / "long", out=home / "extend", decoder=models[""]))
    for name, before in ("sft1", "extend"), ("sft2", "sft1"):
        settings = {"data": home / "data" / name, "out": home / name, "decoder": models[before]}
        models[name] = run_stage(config_of(name, SHORT, **settings))
    last = config_of("sft3", LONG, data=home / "data", out=home / "sft3", decoder=models["sft2"])
    models["sft3"] = run_stage(last)
    for name in ("extend", "sft1", "sft2", "sft3"):
        assert open_model(models[name]).config.rope == RopeConfig(theta=1.5e8)
        assert window_of(open_model(models[name]).facts) == LONG
    weights = [bits(load(path)) for path in models.values()]
    assert all(before != after for before, after in itertools.pairwise(weights))

    chat = cepe_jax.load(models["sft3"]).chat(documents=["It is 7."])
    assert isinstance("".join(chat.say("what is it?", max_new_tokens=2)), str)
    assert "the user's questions based on the context" in chat._template.tokenizer.decode(chat.session.ids)


def test_the_last_tuning_reads_all_conversations_once(home):
    """Of three datasets of different sizes: each window of theirs once in a pass, as the dry run says."""
    config = config_of("sft3", LONG, data=home / "data", out=home / "none", decoder=home / "base")
    sources = open_mix(config.data, config.mix, recipe_of(config))
    windows = {source.path.name: len(source) for source in sources}
    total = sum(windows.values())
    assert len(set(windows.values())) > 1
    names = names_in(sources, list(config.mix.values()), 0, total, 0, by_size=True)
    assert Counter(name.split("/")[0] for name in names) == windows
    assert len(set(names)) == total
    told = "\n".join(dry_run(dataclasses.replace(config, steps=3 * total, batch_size=4)))
    for name, count in windows.items():
        assert f"{name}: 12.00 times each of its {count} examples" in told
