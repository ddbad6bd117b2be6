"""The paper's configs, tiny: each file but for its sizes, from its start to a model; its first loss by hand."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.datasets import make_data
from support.models import SIZES, bits

from cepe_jax.config import DECODERS, ENCODERS
from cepe_jax.data.examples import IGNORE
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.model.llama import Llama
from cepe_jax.settings import decode, read_yaml
from cepe_jax.training import run
from cepe_jax.training.run import run_stage, starting_model
from cepe_jax.training.settings import TrainConfig, recipe_of
from cepe_jax.weights.source import load, save

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB = 400
STARTS = {  # of each config, in the order in which they are run
    "mlm": {},
    "warmup": {"decoder": "decoder", "encoder": "mlm/model"},
    "cepe": {"cepe": "warmup/model"},
    "ceped": {"cepe": "warmup/model"},
    "random_encoder": {"decoder": "decoder"},
}
EXAMPLES = {  # the context is as long as the window, as in the paper
    "mlm": {"window": 8},
    "warmup": {"window": 8, "num_chunks": 4, "chunk_length": 2},
    "cepe": {"window": 16, "num_chunks": 4, "chunk_length": 4},
    "ceped": {"window": 12, "num_chunks": 2, "chunk_length": 6},
    "random_encoder": {"window": 16, "num_chunks": 4, "chunk_length": 4},
}


def tiny(name: str, data: Path, root: Path) -> TrainConfig:
    values = read_yaml(CONFIGS / f"train_{name}.yaml")
    sizes = {"steps": 2, "log_every": 1, "batch_size": 4, "micro_batch": min(values["micro_batch"], 2)}
    sizes |= {"loss_chunk": 5, "dtype": "float32"}
    values["examples"] |= EXAMPLES[name]
    starts = {part: str(root / place) for part, place in STARTS[name].items()}
    return decode(TrainConfig, values | sizes | starts | {"data": str(data), "out": str(root / name)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory with a run of each config; beside them its configurations and first batches."""
    root, data = tmp_path_factory.mktemp("paper"), make_data(tmp_path_factory.mktemp("paper_data"), VOCAB)
    decoder = dataclasses.replace(DECODERS["llama2_7b"], vocab_size=VOCAB, num_layers=2, **SIZES)
    save(Llama(decoder, key=jax.random.key(1)), root / "decoder", assets=data / "docs")
    configs, starts, firsts = {}, {}, {}

    def watched(config: TrainConfig, *given):
        model = starting_model(config, *given)
        starts[config.out.name] = jax.tree.map(jnp.copy, model)  # what trains is donated
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "starting_model", watched)
        encoder = dataclasses.replace(ENCODERS["mlm_large"], vocab_size=1, num_layers=1, **SIZES)
        patch.setitem(ENCODERS, "mlm_large", encoder)
        for name in STARTS:
            configs[name] = config = tiny(name, data, root)
            sources = open_mix(data, config.mix, recipe_of(config))
            drawn = examples(sources, list(config.mix.values()), recipe_of(config), config.seed)
            firsts[name] = next(batches(drawn, config.batch_size))
            run_stage(config)
    return root, configs, starts, firsts


def log_softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def nll_of(log_prob: np.ndarray, labels: np.ndarray) -> float:
    rows, places = np.nonzero(labels != IGNORE)
    return -log_prob[rows, places, labels[rows, places]].mean()


@pytest.mark.parametrize("name", STARTS)
def test_the_first_loss_is_that_of_the_start(runs, name):
    """Of all logits of the whole batch at once.

    20 CPU-seconds, with the fixture: every published config runs from its start to a model.
    """
    root, _, starts, firsts = runs
    model, batch = starts[name], firsts[name]
    if name == "mlm":
        log_prob = log_softmax(model.mlm_logits(model(batch["tokens"])))
    else:
        log_prob = log_softmax(model(batch["tokens"], batch["context"], batch["context_mask"]))
    first = json.loads((root / name / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["nll"] == pytest.approx(nll_of(log_prob, batch["labels"]), rel=1e-5)
    if name == "random_encoder":
        plain = log_softmax(model.decoder(batch["tokens"]))
        assert first["nll"] == pytest.approx(nll_of(plain, batch["labels"]), rel=1e-5)
    assert ("kl" in first) == (name == "ceped")
    if name == "ceped":
        whole = jnp.concatenate([batch["context"].reshape(len(batch["tokens"]), -1), batch["tokens"]], axis=1)
        log_teacher = log_softmax(model.decoder(whole))[:, -batch["tokens"].shape[1] :]
        best = np.argsort(-log_teacher, axis=-1)[..., :50]
        log_p, log_q = (np.take_along_axis(x, best, -1) for x in (log_teacher, log_prob))
        assert first["kl"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
        assert first["loss"] == pytest.approx(first["nll"] + 2 * first["kl"], rel=1e-5)


@pytest.mark.parametrize("name", STARTS)
def test_what_trains(runs, name):
    """Every array of encoder and cross-attention moves and no bit of the decoder does; the sizes are the config's."""
    root, configs, starts, _ = runs
    trained, start = load(root / name / "model").parts, starts[name].parts
    assert set(trained) == ({"encoder"} if name == "mlm" else {"decoder", "encoder", "cross"})
    for part, model in trained.items():
        before, after = bits(start[part]), bits(model)
        assert len(before) == len(after)
        assert all((a == b) == (part == "decoder") for a, b in zip(before, after, strict=True)), part
    assert trained["encoder"].config.vocab_size == VOCAB + 1
    assert trained["encoder"].config.mlm_head == (name == "mlm")


def test_the_starts(runs):
    """The warm-up has MLM's encoder, the ablation nobody's; both main stages go on from the warm-up."""
    root, _, starts, _ = runs
    mlm, warmup = (load(root / name / "model") for name in ("mlm", "warmup"))
    assert bits(starts["warmup"].encoder.layers) == bits(mlm.layers)
    assert bits(starts["cepe"]) == bits(starts["ceped"]) == bits(warmup)
    random = starts["random_encoder"]
    assert set(bits(random.encoder.layers.attention)).isdisjoint(bits(mlm.layers.attention))
    assert not np.any(random.cross.o[...])
    assert np.any(starts["warmup"].cross.o[...])
    assert bits(random.cross.q) == bits(random.decoder.layers.attention.q)
