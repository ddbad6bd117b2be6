"""Speed and memory of inference against the length of the context, by how the decoder reads it.

Four ways, side by side, on random weights and tokens: `absorbed`, what this package does; `stored`, keys and values of
the memory made once and kept for every layer; `recomputed`, made anew for every token, as the reference does; and
`full`, the same decoder with full attention to all tokens in its own cache.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cepe_jax.benchmarks import beside, caches
from cepe_jax.benchmarks.compiled import memory_of
from cepe_jax.benchmarks.training import filled
from cepe_jax.config import DECODERS, ENCODERS, CepeConfig, Compute, Dtype
from cepe_jax.cost import encoder_flops, gib, inference_flops, step_bytes
from cepe_jax.devices import describe
from cepe_jax.directories import write_json, write_text
from cepe_jax.identity import as_json
from cepe_jax.inference.caches import CacheConfig
from cepe_jax.inference.caches.full import FullCache
from cepe_jax.inference.context import ContextCache, encode, free_bytes, stacked
from cepe_jax.inference.generate import Draws, Sampling, bucket, next_token, power_of_two
from cepe_jax.model.attention import Mask, attend_to_cache, merge
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import CrossAttention, Memory
from cepe_jax.progress import track
from cepe_jax.weights.build import abstract_parts

Array = jax.Array
WAYS = "absorbed", "stored", "recomputed", "full"
FORMS = {"absorbed": "absorbed", "stored": "stored", "recomputed": "materialised", "full": "full"}  # in cost.py
PIECE = 512  # tokens of the context that `full` reads at once


@dataclass(frozen=True)
class InferenceBenchmarkConfig:
    decoder: Literal[*DECODERS] = "tiny_512"  # a preset, with random weights
    encoder: Literal[*ENCODERS] = "tiny_512"  # a preset, with random weights
    contexts: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536, 131_072)  # tokens of each context
    chunk_length: int = 64  # tokens that the encoder reads at once
    prompt: int = 128  # tokens that the decoder reads after the context
    new_tokens: int = 48  # tokens that are timed, until limit_seconds; the median counts
    limit_seconds: float = 40.0  # seconds; a run that would take longer, by the speed at the length before, is left out
    dtype: Dtype = "float32"  # type of weights and activations
    beside: Literal["", "torch"] = ""  # torch: this package and the tests' oracle in turn, instead of the four ways
    cache: CacheConfig | None = None  # a policy beside the full and the rolling cache, after `contexts` tokens each
    out: Path = Path("out/benchmark")  # gets inference.json, .md, .png; or beside.json, .md; or caches.json, .md

    def __post_init__(self):
        for name in ("chunk_length", "prompt", "limit_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens is {self.new_tokens}: give 2 or more")
        if min(self.contexts, default=0) < 1 or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts is {list(self.contexts)}: give rising numbers above 0")
        if self.beside and self.cache is not None:
            raise ValueError("give beside or cache, one at a time")
        if self.cache is not None and self.cache.kind in ("full", "rolling"):
            raise ValueError(f"cache.kind is {self.cache.kind}, which is measured anyway: give another one")


class Recomputed(CrossAttention):
    """Keys and values of the memory made anew in every call, however few the queries."""

    def __init__(self, cross: CrossAttention):
        for name, value in vars(cross).items():
            if not name.startswith("_"):
                setattr(self, name, value)

    def read(self, *given) -> Array:
        return self.materialised(*given)


class Stored(Recomputed):
    """Cross-attention whose keys and values of one memory are at hand for every layer."""

    def __init__(self, cross: CrossAttention, k_ZBKMH: Array, v_ZBKMH: Array):
        super().__init__(cross)
        self.k, self.v = nnx.Param(k_ZBKMH), nnx.Param(v_ZBKMH)

    def read(self, q_BTNH: Array, memory: Memory, *_) -> Array:
        return merge(attend_to_cache(q_BTNH, self.k[...], self.v[...], Mask(valid_BS=memory.valid_BM)))


Result = TypeVar("Result")


@jax.jit
def _kv(cross: CrossAttention, states_BME: Array) -> tuple[Array, Array]:
    weights = (jnp.asarray(weight[...], states_BME.dtype) for weight in (cross.k, cross.v))
    return tuple(jnp.einsum("BME,ZEKH->ZBKMH", states_BME, weight) for weight in weights)


class _LeftOut(Exception):
    """A way that is not measured at a length, and why."""


@dataclass
class _Clock:
    """FLOPs a second of what was measured before, by name, to foresee what takes too long."""

    limit: float
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, flops: float, run: Callable[[], Result]) -> tuple[Result, float]:
        """Return the result of `run` and its seconds, if under one the least of three: the first run loads programs."""
        if (foreseen := flops / self.speeds.get(name, np.inf)) > self.limit:
            raise _LeftOut(f"{name} would take {foreseen:,.0f} s")
        seconds, result = np.inf, None
        for _ in range(3):
            del result  # else there would be two at once
            begun = time.monotonic()
            result = jax.block_until_ready(run())
            seconds = min(seconds, time.monotonic() - begun)
            if seconds > 1:
                break
        self.speeds[name] = flops / seconds
        return result, seconds


def benchmark_inference(config: InferenceBenchmarkConfig) -> None:
    """All ways at all lengths, printed and in `config.out` as JSON, a table and a plot."""
    decoder, encoder = DECODERS[config.decoder], ENCODERS[config.encoder]
    parts = abstract_parts(CepeConfig(decoder, encoder), Compute(config.dtype))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype), parts)
    model = Cepe.from_parts(filled(shapes, 0.02))
    if config.beside:
        rows = beside.measure_beside(model, config.contexts, config.chunk_length, config.prompt)
        return _write_rows(config, "beside", rows, beside.table, f"minimum of {beside.NUMBER} in turn.")
    if config.cache is not None:
        rows = caches.measure_caches(model.decoder, config.cache, config.contexts)
        return _write_rows(config, "caches", rows, caches.table, "random weights, keys and values; medians.")
    clock, rows = _Clock(config.limit_seconds), []
    _encoded(model, config.contexts[0], config.chunk_length)  # compiled before it is timed
    for length in track(config.contexts, "benchmark"):
        context, encoding = _encoded(model, length, config.chunk_length)
        for way in WAYS:
            row = {"way": way, "context": length} | (encoding if way != "full" else {})
            try:
                row |= _read(way, model, context, config, clock)
            except _LeftOut as reason:
                row["left_out"] = str(reason)
            rows.append(row)
    result = _facts(config) | {
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(model)),
        "rows": rows,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "inference.json", as_json(result))
    write_text(config.out / "inference.md", page := table(result))
    plot(result, config.out / "inference.png")
    print(page)


def _facts(config: InferenceBenchmarkConfig) -> dict:
    return {
        "device": describe(),
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "config": dataclasses.asdict(config),
    }


def _write_rows(
    config: InferenceBenchmarkConfig, name: str, rows: list[dict], table: Callable[[list[dict], str], str], how: str
) -> None:
    result = _facts(config) | {"rows": rows}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / f"{name}.json", as_json(result))
    head = f"{result['device']}, jax {result['jax']}, {result['date']}; {how}"
    write_text(config.out / f"{name}.md", page := table(rows, head))
    print(page)


def _tokens(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count, np.int32)


def _encoded(model: Cepe, length: int, chunk_length: int) -> tuple[ContextCache, dict]:
    """A context of so many tokens, and what it took."""
    tokens = _tokens(length, model.decoder.config.vocab_size).tolist()
    begun = time.monotonic()
    context = encode(model, [tokens], {}, chunk_length)
    flops = encoder_flops(model.encoder.config, -(-length // chunk_length), chunk_length).forward
    return context, {"encode_seconds": time.monotonic() - begun, "encode_flops": flops}


def _read(way: str, model: Cepe, context: ContextCache, config: InferenceBenchmarkConfig, clock: _Clock) -> dict:
    """Prefill and decoding of one way: seconds, memory, and FLOPs and bytes by formula."""
    sizes, length = model.config, context.num_tokens
    decoder, itemsize = sizes.decoder, jnp.dtype(config.dtype).itemsize
    tokens = _tokens(length + config.prompt if way == "full" else config.prompt, decoder.vocab_size)
    piece = min(PIECE, len(tokens)) if way == "full" else len(tokens)
    slots = bucket(-(-len(tokens) // piece) * piece + config.new_tokens)  # the last piece is filled up
    _check_room(way, sizes, slots if way == "full" else length, itemsize)
    reader, memory, building = model.decoder, None, 0.0
    if way != "full":
        memory, cross = stacked([context]), model.cross
        if way == "stored":
            build = _kv.lower(cross, memory.states_BME).compile()
            kv, building = clock("keys and values", 4 * length * cross.k.size, lambda: build(cross, memory.states_BME))
            cross = Stored(cross, *kv)
        elif way == "recomputed":
            cross = Recomputed(cross)
        reader = Cepe(model.decoder, model.encoder, cross)
    draws = Draws.of([Sampling()])

    def new_cache(slots: int, empty: bool = way != "full") -> FullCache:  # in pieces: one program for all of them
        return dataclasses.replace(FullCache.create(decoder, config.dtype, 1, slots), empty=empty)

    def compiled(count: int, cache: FullCache):
        inputs = jax.ShapeDtypeStruct((1, count), jnp.int32), jax.ShapeDtypeStruct((1, count), bool)
        return next_token.lower(reader, *inputs, memory, cache, draws).compile()

    # Each piece attends to a cache of its own length: full attention is not charged for slots that are empty yet.
    lengths = [min(power_of_two(first + piece), slots) for first in range(0, len(tokens), piece)]
    lengths = [*lengths[:-1], slots]
    prefill = {length: compiled(piece, jax.eval_shape(partial(new_cache, length))) for length in set(lengths)}

    def read_prompt() -> tuple[Array, FullCache]:
        cache = new_cache(lengths[0])
        for first, length in zip(range(0, len(tokens), piece), lengths, strict=True):
            some = tokens[first : first + piece]
            filled = np.pad(some, (0, piece - len(some)))[None]
            if cache.slots < length:
                cache = _longer(cache, length)
            real = np.arange(piece)[None] < len(some)
            next_B1, cache = prefill[length](reader, filled, real, memory, cache, draws)
        return next_B1, cache

    config_of = decoder if way == "full" else sizes
    of_forms = inference_flops(config_of, len(tokens), 0, length)
    first = min(of_forms["absorbed"], of_forms["materialised"]) if way == "absorbed" else of_forms[FORMS[way]]
    (next_B1, cache), prefill_seconds = clock(f"{way}, prefill", first, read_prompt)
    decode, one = compiled(1, cache), np.ones((1, 1), bool)
    flops = inference_flops(config_of, 1, len(tokens), length)[FORMS[way]]
    seconds, generated = [], [int(next_B1[0, 0])]
    while len(seconds) < config.new_tokens and sum(seconds) < config.limit_seconds:
        begun = time.monotonic()
        next_B1, cache = decode(reader, next_B1, one, memory, cache, draws)
        jax.block_until_ready(next_B1)
        seconds.append(time.monotonic() - begun)
        generated.append(int(next_B1[0, 0]))
    token_seconds = float(np.median(seconds[1:] or seconds))
    return {
        "prefill_seconds": prefill_seconds + building,
        "token_seconds": token_seconds,
        "tokens_per_second": 1 / token_seconds,
        "memory": (memory := {"prefill": memory_of(prefill[slots]), "decode": memory_of(decode)}),
        "memory_bytes": max(map(_held, memory.values())),
        "prefill_flops": first,
        "token_flops": flops,
        "token_bytes": step_bytes(config_of, slots, length, itemsize)[FORMS[way]],
        "tokens": generated,
    }


def _longer(cache: FullCache, slots: int) -> FullCache:
    """Return the cache with room for `slots`. Keys move before values, so that only one of them exists twice."""
    more = slots - cache.slots

    def longer(x_ZBKSH: Array) -> Array:
        moved = jax.block_until_ready(jnp.pad(x_ZBKSH, [(0, 0)] * 3 + [(0, more), (0, 0)]))
        x_ZBKSH.delete()
        return moved

    k, v = map(longer, (cache.k_ZBKSH, cache.v_ZBKSH))
    return dataclasses.replace(cache, k_ZBKSH=k, v_ZBKSH=v, valid_BS=jnp.pad(cache.valid_BS, [(0, 0), (0, more)]))


def _held(memory: dict[str, int]) -> int:
    """Bytes that a program holds: arguments, temporaries, and results that are not in an argument's place."""
    return memory["arguments"] + memory["temporaries"] + memory["results"] - memory["aliases"]


def _check_room(way: str, sizes: CepeConfig, tokens: int, itemsize: int) -> None:
    """_LeftOut where keys and values of every layer for so many tokens do not fit."""
    decoder = sizes.decoder
    needed = 2 * tokens * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * itemsize
    if way in ("stored", "full") and needed > (free := free_bytes()):
        raise _LeftOut(f"keys and values take {gib(needed)}, and {gib(free)} are free")


def table(result: dict) -> str:
    """The measurements in lines for people."""
    lines = [
        f"{result['device']}, jax {result['jax']}, {result['date']}; weights {gib(result['weights_bytes'])}. Memory is "
        "what the larger program of prefill and decoding holds by its compiler. First token: context fresh, and kept.",
        "",
        "| context | way | encode | prefill | first token | tokens a second | memory | a token: GFLOP, GB by formula |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        head = f"| {row['context']:,} | {row['way']} "
        if "left_out" in row:
            lines.append(f"{head}| left out: {row['left_out']} | | | | | |")
            continue
        encode, prefill = row.get("encode_seconds", 0.0), row["prefill_seconds"]
        kept = f", {prefill:.3g} s" if encode else ""
        lines.append(
            f"{head}| {f'{encode:.3g} s' if encode else ''} | {prefill:.3g} s | {encode + prefill:.3g} s{kept} "
            f"| {row['tokens_per_second']:.3g} | {gib(row['memory_bytes'])} "
            f"| {row['token_flops'] / 1e9:.3g}, {row['token_bytes'] / 1e9:.3g} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    measures = {
        "tokens a second": lambda row: row["tokens_per_second"],
        "seconds to the first token (dashed: context kept)": lambda row: (
            row.get("encode_seconds", 0) + row["prefill_seconds"]
        ),
        "GiB of weights, context and temporaries": lambda row: row["memory_bytes"] / 2**30,
    }
    for panel, (name, measure) in zip(panels, measures.items(), strict=True):
        for way in WAYS:
            rows = [row for row in result["rows"] if row["way"] == way and "left_out" not in row]
            lengths = [row["context"] for row in rows]
            (line,) = panel.plot(lengths, list(map(measure, rows)), marker="o", label=way)
            if "dashed" in name and way != "full":
                kept = [row["prefill_seconds"] for row in rows]
                panel.plot(lengths, kept, marker=".", linestyle="--", color=line.get_color())
        panel.set(xlabel="tokens of context", title=name, xscale="log", yscale="log")
        panel.title.set_fontsize(10)
        panel.set_xticks(ticks := result["config"]["contexts"], [f"{tick // 1024}K" for tick in ticks])
        panel.minorticks_off()
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
