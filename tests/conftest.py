"""How every test computes, and the tiny models of support/models.py, made once."""

import logging
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of what tests compute is compiling: without LLVM's optimisations and MLIR's fusions it takes a fifth of the time,
# here and in the processes that tests start. Collectives and what is frozen are the same; fusions differ a little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest
from flax import nnx
from support.models import DECODER, ENCODER, make_cepe, make_decoder, make_encoder, write_home

from cepe_jax.model.cepe import Cepe
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama

if os.environ["JAX_PLATFORMS"] == "cpu" and jax.__version_info__ < (0, 12):  # else the first flag is not known
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def notices(caplog):
    """The package's notices reach `caplog`, whatever a script has set in a test before."""
    ours = logging.getLogger("cepe_jax")
    ours.handlers.clear()
    ours.propagate = True
    caplog.set_level(logging.INFO, "cepe_jax")


@pytest.fixture(scope="session")
def decoder() -> Llama:
    return make_decoder()


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return make_encoder()


@pytest.fixture(scope="session")
def cepe() -> Cepe:
    return make_cepe()


@pytest.fixture(scope="session")
def forward():
    """`Cepe.__call__`, compiled once per kind of call. Under jit ids are not checked."""
    return jax.jit(Cepe.__call__)


@pytest.fixture(scope="session")
def plain():
    """`Llama.__call__`, compiled once per kind of call."""
    return jax.jit(Llama.__call__)


@pytest.fixture(scope="session")
def tokens_BT() -> np.ndarray:
    return np.random.default_rng(4).integers(0, DECODER.vocab_size, (2, 7))


@pytest.fixture(scope="session")
def context_BCL() -> np.ndarray:
    context = np.random.default_rng(5).integers(0, ENCODER.vocab_size, (2, 3, 5))
    context[0, 1, 2] = ENCODER.vocab_size - 1
    return context


@pytest.fixture(scope="session")
def context_mask_BCL() -> np.ndarray:
    """Holes, left padding, right padding, one chunk absent, one row with a single token."""
    mask = np.ones((2, 3, 5), bool)
    mask[0, 0, :2] = False
    mask[0, 1, [1, 3]] = False
    mask[0, 2, 3:] = False
    mask[1, 0] = False
    mask[1, 1, 1:] = False
    return mask


@pytest.fixture(scope="session")
def token_mask_BT() -> np.ndarray:
    """Rows padded on the left by 0 and 3."""
    mask = np.ones((2, 7), bool)
    mask[1, :3] = False
    return mask


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A directory of a tiny CEPE with a tokenizer and a chat template."""
    return write_home(tmp_path_factory.mktemp("assets"))
