"""Low-rank factors on disk: PEFT's directories against PEFT itself, merged weights, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import DECODER, bits, filled, relative_error

from cepe_jax.config import LoraConfig, with_lora
from cepe_jax.model.llama import Llama
from cepe_jax.weights.convert import merge, to_hf, to_jax
from cepe_jax.weights.factors import to_peft
from cepe_jax.weights.source import load, open_ours, save

LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS = np.random.default_rng(0).integers(0, DECODER.vocab_size, (2, 12))
run = jax.jit(Llama.__call__)


@pytest.fixture
def tuned(tmp_path):
    """The directory of a decoder with factors; `base` beside it holds the decoder alone."""
    model = filled(lambda: Llama(with_lora(DECODER, "decoder", LORA), key=jax.random.key(0)), seed=1)
    save(model, tmp_path / "tuned")
    save(model.parts["decoder"], tmp_path / "base")
    return tmp_path / "tuned"


@pytest.fixture
def adapter(tuned):
    """A directory of PEFT's with the same factors, whose base is in our format."""
    to_peft(open_ours(tuned), str(tuned.with_name("base")), tuned.with_name("adapter"))
    return tuned.with_name("adapter")


def configure(adapter, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_of_peft_is_the_model_that_it_was_written_from(tuned, adapter):
    assert bits(load(adapter)) == bits(load(tuned))
    to_jax(adapter, tuned.with_name("again"))
    assert open_ours(tuned.with_name("again")).hashes.all == open_ours(tuned).hashes.all


def test_merged_weights_give_the_same_logits(tuned):
    wanted = run(load(tuned), TOKENS)
    merge(tuned, tuned.with_name("merged"))
    to_hf(tuned, tuned.with_name("hf"))
    for name in ("merged", "hf"):
        model = load(tuned.with_name(name))
        assert model.config == DECODER
        assert relative_error(run(model, TOKENS), wanted) < 1e-5
    assert relative_error(run(load(tuned.with_name("base")), TOKENS), wanted) > 1e-2
    with pytest.raises(ValueError, match="base has no low-rank factors"):
        merge(tuned.with_name("base"), tuned.with_name("none"))


@pytest.mark.parametrize("product", ["q", "o", "down"])
def test_peft_gives_the_same_logits(tuned, tmp_path, product):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = with_lora(DECODER, "decoder", dataclasses.replace(LORA, products=(product, "v")))
    model = filled(lambda: Llama(config, key=jax.random.key(0)), seed=2)
    save(model, tmp_path / "ours")
    save(model.parts["decoder"], tmp_path / "plain")
    to_hf(tmp_path / "plain", tmp_path / "hf")
    to_peft(open_ours(tmp_path / "ours"), str(tmp_path / "hf"), tmp_path / "factors")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "factors")
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert relative_error(run(model, TOKENS), wanted) < 1e-5
    theirs.save_pretrained(tmp_path / "saved")
    assert relative_error(run(load(tmp_path / "saved"), TOKENS), wanted) < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": True}, "use_rslora True"),
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"base_model_name_or_path": "nowhere"}, "base_model_name_or_path is nowhere"),
        ({"r": 4}, r"is \[3, .*\[4, .*another base"),
        ({"r": "x"}, "adapter_config.json: r"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
)
def test_factors_that_are_not_ours(adapter, changes, said):
    configure(adapter, **changes)
    with pytest.raises(ValueError, match=said):
        load(adapter)


def test_factors_of_another_base(tuned, adapter):
    other = dataclasses.replace(DECODER, mlp_width=DECODER.mlp_width + 8)
    save(filled(lambda: Llama(other, key=jax.random.key(0)), seed=1), tuned.with_name("wider"))
    configure(adapter, base_model_name_or_path=str(tuned.with_name("wider")))
    with pytest.raises(ValueError, match=r"gate_proj.lora_B.weight is \[40, 3\].*\[48, 3\].*another base"):
        load(adapter)
    save(filled(lambda: Llama(DECODER, key=jax.random.key(0)), seed=7), tuned.with_name("equal"))
    configure(adapter, base_model_name_or_path=str(tuned.with_name("equal")))
    with pytest.raises(ValueError, match="belong to another decoder than .*equal"):
        load(adapter)
    configure(adapter, base_model_name_or_path=str(tuned))
    with pytest.raises(ValueError, match="tuned has factors of its own: merge them"):
        load(adapter)


def test_factors_that_lack_some(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(key for key in tensors if "layers.1.mlp.up" in key)
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"lacks {gone}"):
        load(adapter)


def test_a_model_without_factors_is_no_directory_of_peft(tuned):
    with pytest.raises(ValueError, match="base has no decoder_lora"):
        to_peft(open_ours(tuned.with_name("base")), "x", tuned.with_name("none"))
    assert not tuned.with_name("none").exists()
