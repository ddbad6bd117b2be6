"""A stage of one's own, with its objective and a head: a row for the stage, a row for its kind of model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.datasets import make_data
from support.models import DECODER, bits, make_decoder

from cepe_jax.config import FLOAT32, DecoderConfig
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.recipes import Windows
from cepe_jax.model.layers import normal
from cepe_jax.model.llama import Llama
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.training.stages import STAGES, Stage, Start, decoder_config, lm_flops
from cepe_jax.weights import hf_config, torch_keys
from cepe_jax.weights.convert import to_hf
from cepe_jax.weights.kinds import KINDS, Architecture, Kind
from cepe_jax.weights.source import load, open_model, save


@dataclass(frozen=True)
class ScorerConfig:
    decoder: DecoderConfig


class Head(nnx.Module):
    def __init__(self, width: int, *, key):
        self.weight = normal(key, (width, 1), 0.02, ("embed", None))


class Scorer(nnx.Module):
    """A decoder that says how good a text is, by the hidden state of its last token."""

    def __init__(self, decoder: Llama, head: Head):
        self.decoder, self.head = decoder, head

    def __call__(self, tokens_BT):
        return (self.decoder.decode(tokens_BT)[0][:, -1] @ self.head.weight[...])[:, 0]

    @classmethod
    def create(cls, config, compute=FLOAT32, *, key):
        return cls(Llama(config.decoder, compute, key=key), Head(config.decoder.width, key=key))

    @property
    def config(self):
        return ScorerConfig(self.decoder.config)

    @property
    def parts(self):
        return {"decoder": self.decoder, "head": self.head}

    @classmethod
    def from_parts(cls, parts):
        return cls(**parts)


class Ranking:
    """The text is better than the text read backwards."""

    def weights(self, batch):
        return {"loss": jnp.asarray(len(batch["tokens"]))}

    def __call__(self, model, batch, weights):
        margin_B = model(batch["tokens"]) - model(batch["tokens"][:, ::-1])
        loss = -jax.nn.log_sigmoid(margin_B).sum() / weights["loss"]
        return loss, {"accuracy": (margin_B > 0).sum() / weights["loss"]}


def rows(config: ScorerConfig):
    yield from (row for row in torch_keys.decoder_rows(config.decoder) if row[0] != "decoder.head")
    yield "head.weight", "score.weight", "DR", "R D"


PYTORCH = Architecture(
    "LlamaForSequenceClassification",
    lambda hf, where: ScorerConfig(hf_config.read_decoder(hf_config.LLAMA, hf, where)),
    lambda config, facts: hf_config.write_decoder(hf_config.LLAMA, config.decoder, facts) | {"num_labels": 1},
    rows,
)
FROM_DECODER = Start(
    ("decoder",),
    lambda config, vocab_size: ScorerConfig(decoder_config(config, vocab_size)),
    lambda config, sizes, compute, master: Scorer(
        load(config.decoder, compute), Head(sizes.decoder.width, key=jax.random.key(config.seed))
    ),
    ("head",),
)
STAGE = Stage(
    (FROM_DECODER,),
    lambda config: Windows(config.examples),
    lambda config: Ranking(),
    lambda config, sizes, sources: lm_flops(config, sizes.decoder, sources),
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The directories of the decoder and of the trained model."""
    monkeypatch.setitem(STAGES, "scorer", STAGE)
    monkeypatch.setitem(KINDS, "scorer", Kind(ScorerConfig, Scorer, Scorer.create, architectures=(PYTORCH,)))
    data = make_data(tmp_path / "data", 400)
    sizes = {"vocab_size": 400, "tied_head": True}  # PyTorch's class has no head for tokens
    save(make_decoder(DecoderConfig(**vars(DECODER) | sizes)), tmp_path / "decoder", assets=data / "filtered")
    settings = {"decoder": str(tmp_path / "decoder"), "examples": ExampleConfig(window=16), "micro_batch": 2}
    config = TrainConfig("scorer", data / "filtered", tmp_path / "out", 2, 4, **settings)
    return tmp_path / "decoder", run_stage(config), config


def test_a_stage_of_ones_own_trains_saves_loads_and_exports(trained, tmp_path):
    decoder, path, config = trained
    model = load(path)
    assert isinstance(model, Scorer)
    assert bits(model.decoder) == bits(load(decoder))
    start = FROM_DECODER.model(config, model.config, FLOAT32, ()).head
    assert 0 < np.abs(model.head.weight[...] - start.weight[...]).max() < 1e-2
    assert run_stage(config) == path  # finished, and not trained again
    to_hf(path, tmp_path / "pytorch")
    again = open_model(tmp_path / "pytorch")
    assert (again.config, again.read("head.weight").tobytes()) == (model.config, bits(model.head)[0])


def test_the_exported_head_scores_as_transformers_does(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    _, path, _ = trained
    to_hf(path, tmp_path / "pytorch")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pytorch")
    tokens = np.random.default_rng(0).integers(0, 400, (1, 12))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()[:, 0]
    np.testing.assert_allclose(load(path)(jnp.asarray(tokens)), wanted, rtol=1e-4)
