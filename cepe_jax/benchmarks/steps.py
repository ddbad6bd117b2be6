"""The steps of inference by shape and place, and all steps compiled ahead of time by name."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cepe_jax.benchmarks.caches import stand_in
from cepe_jax.benchmarks.compiled import CompileConfig, Make, Step, check_fits, compile_step, placed, table, train_step
from cepe_jax.config import CepeConfig, Compute, DecoderConfig, Dtype
from cepe_jax.cost import encoder_flops, inference_flops
from cepe_jax.inference.caches import FULL, Policy
from cepe_jax.inference.context import encode_chunks
from cepe_jax.inference.generate import Draws, Sampling, next_token
from cepe_jax.model.cache import Cache
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import partition_spec
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.kinds import Config, kind_of


def _array(shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), partition_spec(axes)))


def _model(config: TrainConfig, sizes: Config, compute: Compute, needed: tuple[type, ...]) -> Cepe | Llama:
    if not isinstance(sizes, needed):
        raise ValueError(f"stage {config.stage} has no model for this step: give the config of a CEPE")
    return kind_of(sizes).model.from_parts(placed(abstract_parts(sizes, compute), jnp.dtype(compute.dtype)))


def encode_step(config: CompileConfig, sizes: Config, compute: Compute) -> Step:
    """All chunks of a batch."""
    model = _model(config, sizes, compute, (CepeConfig,))
    B, C, L = config.batch_size, config.examples.num_chunks, config.examples.chunk_length
    contexts = [_array((B, C, L), dtype, "batch", "memory", None) for dtype in (jnp.int32, bool)]
    flops = B * encoder_flops(sizes.encoder, C, L).forward
    return Step(encode_chunks, (model, *contexts), flops, flops)


def _cache(policy: Policy, decoder: DecoderConfig, dtype: Dtype, rows: int, slots: int, empty: bool) -> Cache:
    """Return a cache by shape and place: the letters that end an array's name say what its axes are."""
    cache = jax.eval_shape(lambda: policy.create(decoder, dtype, rows, slots))
    arrays = {
        name: _array(x.shape, x.dtype, *({"B": "batch", "K": "kv_heads"}.get(axis) for axis in name.rpartition("_")[2]))
        for name, x in vars(cache).items()
        if isinstance(x, jax.ShapeDtypeStruct)
    }
    has_two_states = "empty" in cache.__dataclass_fields__
    return dataclasses.replace(cache, **arrays, **({"empty": empty} if has_two_states else {}))


def _read(config: CompileConfig, sizes: Config, compute: Compute, tokens: int, cached: bool) -> Step:
    model = _model(config, sizes, compute, (CepeConfig, DecoderConfig))
    B, window, decoder, M, memory = config.batch_size, config.examples.window, model.decoder.config, 0, None
    if isinstance(sizes, CepeConfig):
        M = config.examples.num_chunks * config.examples.chunk_length
        states = _array((B, M, sizes.encoder.width), compute.dtype, "batch", "memory", None)
        memory = Memory(states, _array((B, M), bool, "batch", "memory"))
    policy = stand_in(config.cache, decoder, window)
    cache = _cache(policy, decoder, compute.dtype, B, window, empty=not cached)
    given = _array((B, tokens), jnp.int32, "batch", None), None if cached else _array((B, tokens), bool, "batch", None)
    draws = jax.tree.map(lambda x: _array(x.shape, x.dtype, *("batch",)[: x.ndim]), Draws.of([Sampling()] * B))
    arguments = model, *given, memory, cache, draws
    of_forms = inference_flops(sizes, tokens, cached * window, M)
    flops = min(flops for form, flops in of_forms.items() if form != "stored")  # which keeps keys and values
    lengths = range(window) if not cached else (window,)
    flops += sum(policy.cost(decoder, length).flops - FULL.cost(decoder, length).flops for length in lengths)
    flops *= B
    return Step(next_token, arguments, flops, flops)


def prefill_step(config: CompileConfig, sizes: Config, compute: Compute) -> Step:
    """A window of tokens read into an empty cache, and the token after them."""
    return _read(config, sizes, compute, config.examples.window, cached=False)


def decode_step(config: CompileConfig, sizes: Config, compute: Compute) -> Step:
    """One token, from a cache as long as the window."""
    return _read(config, sizes, compute, 1, cached=True)


STEPS: dict[str, Make] = {
    "train": train_step,
    "encode": encode_step,
    "prefill": prefill_step,
    "decode": decode_step,
}


def compile_and_print(config: CompileConfig) -> None:
    """Compile the configured step and print what it takes; ValueError if a chip's memory does not hold it."""
    result = compile_step(config, STEPS[config.step])
    check_fits(result)
    print(table(result))
