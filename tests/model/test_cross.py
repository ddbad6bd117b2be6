"""Cross-attention in its two forms, in blocks and over a split memory, against fp64 loops and the program's own text.

Run as a script it is a process of 8 devices that compares every split of the memory with one device.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.models import DECODER, ENCODER, relative_error

from cepe_jax.benchmarks.hlo import arrays, collectives
from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig
from cepe_jax.cost import ReadFlops, read_flops
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.model import cross
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import CrossAttention, Memory
from cepe_jax.sharding import constrain, make_mesh

B, T, M, D, E, H = 2, 3, 300, 20, 16, 6
FORMS = "materialised", "absorbed"


def layer(N: int, K: int, seed: int = 0, width: int = E, head_dim: int = H) -> CrossAttention:
    """One layer of cross-attention, in fp64 numpy."""
    rng = np.random.default_rng(seed)
    shapes = (D, N, head_dim), (width, K, head_dim), (width, K, head_dim), (N, head_dim, D)
    weights = [nnx.Param(rng.standard_normal(shape) * shape[0] ** -0.5) for shape in shapes]
    sizes = {"vocab_size": 1, "num_layers": 1, "num_heads": N, "num_kv_heads": K, "head_dim": head_dim, "mlp_width": 1}
    config = CepeConfig(DecoderConfig(width=D, **sizes), EncoderConfig(width=width, **sizes))
    cross = CrossAttention(config, key=jax.random.key(0))
    cross.q, cross.k, cross.v, cross.o = weights
    cross.norm.scale = nnx.Param(rng.standard_normal(D))
    return cross


def inputs(rows: int = B, queries: int = T, memory: int = M, width: int = E, seed: int = 1):
    """x, the states of a memory of `rows` rows, and its mask, with holes; the last row is wholly masked."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, memory)) < 0.7
    mask[-1, : memory // 2] = False
    mask[-1, 5] = True
    return rng.standard_normal((B, queries, D)), 2 * rng.standard_normal((rows, memory, width)), mask


def oracle(weights: CrossAttention, x, memory, mask) -> np.ndarray:
    """What is added to x, by the book: keys and values, one softmax, head n reads kv head n // (N / K)."""
    q, k, v, o = (np.asarray(w[...], np.float64) for w in (weights.q, weights.k, weights.v, weights.o))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weights.norm.scale[...], np.float64)
    out = np.zeros(x.shape)
    for b, t, n in np.ndindex(x.shape[0], x.shape[1], q.shape[1]):
        row = min(b, len(memory) - 1)
        real, head = memory[row, mask[row]], n // (q.shape[1] // k.shape[1])
        if len(real):
            scores = (real @ k[:, head]) @ (normed[b, t] @ q[:, n]) / np.sqrt(H)
            share = np.exp(scores - scores.max())
            out[b, t] += share / share.sum() @ (real @ v[:, head]) @ o[n]
    return out


def reading(weights: CrossAttention, form: str) -> CrossAttention:
    """The same weights, which read in this form."""
    made = jax.tree.map(lambda a: a, weights)
    read = {
        "absorbed": lambda q, memory, *rest: made.absorbed(q, memory),
        "materialised": made.materialised,
    }
    made.read = read[form]
    return made


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


@partial(jax.jit, static_argnames=("form", "backend"))
def run(weights, x, memory, mask, form: str, backend: str = "xla"):
    return reading(weights, form)(x, Memory(memory, mask), backend, differentiable=False)


@pytest.mark.parametrize("rows", [B, 1])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_exact(form, heads, rows):
    """fp64 to 1e-10, fp32 to 1e-5: grouped heads, holes, and a memory of one row that both rows read."""
    weights, given = layer(*heads), inputs(rows)
    wanted = oracle(weights, *given)
    with jax.enable_x64(True):
        assert relative_error(run(weights, *given, form), wanted) < 1e-10
    narrow = run(cast(weights, jnp.float32), *cast(given[:2], jnp.float32), given[2], form)
    assert relative_error(narrow, wanted) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_wholly_masked_read_nothing(form):
    x, memory, mask = inputs()
    mask[1] = False
    out = run(cast(layer(4, 2), jnp.float32), *cast((x, memory), jnp.float32), mask, form)
    assert out[0].all()
    assert not out[1].any()


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("memory", [300, 384])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_change_nothing(monkeypatch, form, memory, mask):
    """The last block is filled up, or whole; the first, or all of a row, may be masked. Gradients too."""
    weights, given = layer(4, 2), inputs(memory=memory)
    given[2][0, :140] = False
    if not mask:
        given = *given[:2], np.ones_like(given[2])
    weights, x, held = cast((weights, *given[:2]), jnp.float32)

    def loss(weights, x, held):
        out = reading(weights, form)(x, Memory(held, given[2] if mask else None), "xla")
        return (out**2).sum(), out

    both = []
    for pairs in (1 << 21, 1):
        monkeypatch.setitem(cross.BLOCK_PAIRS, "xla", pairs)
        both.append(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(weights, x, held))
    assert relative_error(both[1][1], oracle(weights, *given)) < 1e-5
    for whole, blocks in zip(*map(jax.tree.leaves, both), strict=True):
        assert relative_error(blocks, whole) < 1e-5


def test_absorbed_rounds_no_worse_in_bfloat16():
    """Against fp64, over twenty draws: its error is at most 1.2 times the materialised one."""
    error = dict.fromkeys(FORMS, 0.0)
    for seed in range(20):
        weights, given = cast((layer(4, 2, seed, width=64), *inputs(width=64, seed=seed)[:2]), jnp.bfloat16), ()
        weights, *given = weights
        mask = inputs(width=64, seed=seed)[2]
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (weights, *given))
        wanted = oracle(*wide, mask)
        for form in FORMS:
            error[form] += ((np.asarray(run(weights, *given, mask, form), np.float64) - wanted) ** 2).mean()
    assert 0 < error["absorbed"] <= 1.2**2 * error["materialised"]


@pytest.mark.parametrize(
    ("shape", "even"),
    [((1024, 32, 128, 32), 146), ((1024, 8, 128, 32), 36)],  # (E, K, H, N): of Llama-2-7B, and of Llama-3-8B
)
def test_the_form_follows_from_the_number_of_queries(monkeypatch, shape, even):
    """Keys and values cost 4 M E K H once; absorbed, a query costs 4 M N (E - H) more (facts: 146 for the 7B)."""
    E, K, H, N = shape
    for queries in (1, even, even + 1, 4096):
        flops = read_flops(queries, N, 1 << 40, (E, K, H))
        assert (flops.absorbed < flops.materialised) == (queries <= even)
    chosen = []
    for form in FORMS:
        monkeypatch.setattr(CrossAttention, form, lambda self, q, *rest, form=form: chosen.append(form) or q)
    monkeypatch.setattr(cross, "read_flops", lambda queries, *rest: ReadFlops(even + 0.5, queries, 0))
    for rows, batch, queries in ((2, 2, even), (2, 2, even + 1), (1, 2, even // 2), (1, 2, even // 2 + 1)):
        layer(4, 2).read(jnp.zeros((batch, queries, 4, 6)), Memory(jnp.zeros((rows, 9, 16))), "xla", True)
    assert chosen == ["absorbed", "materialised", "absorbed", "materialised"]


def decode_program(cepe: Cepe, tokens: int, memory: int) -> jax.stages.Compiled:
    """The decoder reading `tokens` tokens after 8 others, with a memory of `memory` tokens for each of two rows."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    cache = jax.eval_shape(lambda: FullCache.create(DECODER, "float32", 2, 8 + tokens))
    cache = dataclasses.replace(cache, empty=False)
    read = Memory(shape((2, memory, ENCODER.width)), jax.ShapeDtypeStruct((2, memory), bool))
    given = jax.ShapeDtypeStruct((2, tokens), jnp.int32), read, cache
    return jax.jit(Cepe.decode).lower(cepe, *given).compile()


def test_no_key_or_value_of_the_memory_exists_in_decoding(cepe):
    """E = 16 < K x H = 20. What is looked for is found where many tokens are read."""
    size = 2 * 4096 * DECODER.num_kv_heads * DECODER.head_dim

    def largest(program) -> int:
        return max(np.prod(shape) for _, shape in arrays(program.as_text()) if 4096 in shape or 2 * 4096 in shape)

    assert largest(decode_program(cepe, 1, 4096)) < size
    assert largest(decode_program(cepe, 64, 4096)) >= size


def test_memory_of_prefill_does_not_grow_with_the_context(cepe, monkeypatch):
    """Beside the context itself, which is an argument: with scores of 64 queries it would grow by 2 MiB and more."""
    monkeypatch.setitem(cross.BLOCK_PAIRS, "xla", 1 << 15)
    short, long = (decode_program(cepe, 64, memory).memory_analysis().temp_size_in_bytes for memory in (2048, 8192))
    assert long - short < 2 * (8192 - 2048) * ENCODER.width * 4  # a copy of the memory at most


@pytest.fixture(scope="module")
def split() -> dict:
    tests = str(Path(__file__).parents[1])  # for support
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_memory_over_eight_devices_is_one_memory(split):
    """Every form and back end, its own and a shared memory, some devices with nothing but masked tokens; in fp32.

    Splash reads in blocks, also where the memory is not cut.

    10 CPU-seconds, with the process of 8 devices that all tests of `split` read.
    """
    assert len(split["errors"]) == 2 * (2 + 1) * 3
    assert max(split["errors"].values()) < 1e-5, split["errors"]


def test_only_sums_cross_the_network(split):
    """Per head and query a sum of values (H numbers), of weights, and a peak: never keys, values or the memory."""
    assert set(split["collectives"]) == {"all-reduce"}
    assert split["collectives"]["all-reduce"]["bytes"] == B * T * 4 * (H + 2) * 4


def test_chunks_are_encoded_without_communication(split):
    assert split["encode"] == []
    assert split["encode error"] < 1e-5
    assert split["memory"] == ["None", "memory"]


def test_gpus_encode_the_chunks_they_hold(split):
    """cuDNN's rows of a device: 1 of 1 row, 2 of 16 chunks; each with its own mask."""
    assert split["encode for GPUs"] == ["2x6x4x8xbf16", "2x1x6x6xbf16"]


def test_cudnn_is_chosen_by_rows_of_a_device(split):
    """With 2 of 16 rows on each of 8 devices cuDNN's mask fits; with half the pairs allowed it does not."""
    assert split["calls of cuDNN"] == [1, 0]


def test_weights_cross_the_network_before_blocks(split):
    """Keys' and values' weights, cut over 8 devices, are gathered once for 8 blocks; so are sums of their gradients."""
    weights = {"number": 2, "bytes": 2 * E * 2 * 8 * 4}
    assert split["forward"]["all-gather"] == split["gradient"]["all-gather"] == weights
    assert split["gradient"]["all-reduce"]["number"] <= 4


def main() -> None:
    """Prints what splitting the memory over 8 devices gives."""
    from jax._src.cudnn import fused_attention_stablehlo
    from support.models import computed, make_cepe

    kernels = splash_attention_kernel
    kernels.make_splash_mha = partial(kernels.make_splash_mha, interpret=True)
    jax.config.update("jax_default_matmul_precision", "highest")
    found: dict = {"errors": {}}
    cross.KERNEL_BLOCK = 96  # of 128 and 256 tokens of a device
    for rows in (B, 1):
        x, memory, mask = inputs(rows, memory=1024)
        mask[:, :256] = False  # two of eight devices
        weights = layer(4, 2)
        wanted = oracle(weights, x, memory, mask)
        given = *cast((weights, x, memory), jnp.float32), mask
        for sizes in ({"memory": 8}, {"memory": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}):
            with jax.set_mesh(make_mesh(**sizes)):
                for form, backend in (("materialised", "xla"), ("materialised", "splash"), ("absorbed", "xla")):
                    error = relative_error(run(*given, form, backend), wanted)
                    found["errors"][f"{rows} {sizes} {form} {backend}"] = error
    cepe, rng = make_cepe(), np.random.default_rng(3)
    context = rng.integers(0, ENCODER.vocab_size, (1, 16, 5))
    real = rng.random(context.shape) < 0.8
    alone = Cepe.encode(cepe, context, real)
    with jax.set_mesh(make_mesh(memory=8)):
        x, memory, mask = inputs(memory=1024)

        def read(weights, x, memory, mask):
            memory = Memory(constrain(memory, "batch", "memory", None), constrain(mask, "batch", "memory"))
            return reading(weights, "absorbed")(x, memory, "xla")

        given = *cast((layer(4, 2), x, memory), jnp.float32), mask
        found["collectives"] = collectives(jax.jit(read).lower(*given).compile().as_text())
        encode = jax.jit(Cepe.encode).lower(cepe, context, real).compile()
        memory = encode(cepe, context, real)
        kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
        found["encode"] = re.findall(kinds, encode.as_text())
        found["encode error"] = relative_error(memory.states_BME, alone.states_BME)
        found["memory"] = [str(axes) for axes in memory.states_BME.sharding.spec]
        fused_attention_stablehlo.check_cudnn_version = lambda: 92501
        cepe.encoder = computed(cepe.encoder, attention="cudnn", dtype="bfloat16")
        lowered = jax.jit(Cepe.encode).trace(cepe, context, real).lower(lowering_platforms=("cuda",)).as_text()
        found["encode for GPUs"] = [kernels_of(lowered)[0][0], kernels_of(lowered)[0][-1]]
    mesh, rows = make_mesh(fsdp=8), 16
    with jax.set_mesh(mesh):
        x, (_, memory, mask) = np.ones((rows, T, D)), inputs(rows, memory=1024)
        weights, given = cast(layer(4, 2, head_dim=8), jnp.float32), (*cast((x, memory), jnp.float32), mask)
        for name in "kv":  # as a layer of a stack is cut
            setattr(
                weights, name, nnx.Param(jax.device_put(getattr(weights, name)[...], NamedSharding(mesh, P("fsdp"))))
            )

        def loss(weights, *given):
            x, *memory = (constrain(x, "batch", *[None] * (x.ndim - 1)) for x in given)
            return reading(weights, "materialised")(x, Memory(*memory), "xla").sum()

        cross.BLOCK_PAIRS["xla"] = rows // 8 * T * 128  # 8 blocks
        for name, function in (("forward", loss), ("gradient", jax.value_and_grad(loss))):
            found[name] = collectives(jax.jit(function).lower(weights, *given).compile().as_text())
        found["calls of cuDNN"] = []
        for pairs in (rows // 8 * T * 1024, rows // 8 * T * 1024 // 2):
            cross.BLOCK_PAIRS["cudnn"] = pairs
            read = jax.jit(lambda weights, x, *memory: reading(weights, "materialised")(x, Memory(*memory), "cudnn"))
            lowered = read.trace(weights, *cast(given[:2], jnp.bfloat16), mask).lower(lowering_platforms=("cuda",))
            found["calls of cuDNN"].append(len(kernels_of(lowered.as_text())))
    print(json.dumps(found))


def kernels_of(lowered: str) -> list[list[str]]:
    """The shapes of the operands of each call of cuDNN."""
    calls = re.findall(r"custom_call @__cudnn.* : \((.*?)\) ->", lowered)
    return [re.findall(r"tensor<(.*?)>", call) for call in calls]


if __name__ == "__main__":
    main()
