"""Encoded contexts: what the encoder wrote of each passage, kept on the host, and put on the devices to be read.

Nothing of a layer is kept, and of the encoder's output real tokens alone: cross-attention has no positions, so a token
that is masked is one that is not there. Chunk positions, if the model has them, are added when a memory is assembled:
only then is it known how many chunks follow each chunk.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from weakref import WeakKeyDictionary

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from cepe_jax.checks import check_chunk_length, check_tokens
from cepe_jax.cost import gib
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.devices import free_bytes
from cepe_jax.directories import one_writer_of, staged_directory
from cepe_jax.inference.generate import bucket, check_reads_contexts, one_ahead, power_of_two
from cepe_jax.model.cepe import Cepe, chunk_positions
from cepe_jax.model.cross import Memory
from cepe_jax.model.llama import Llama
from cepe_jax.parsing import parse_json
from cepe_jax.progress import track
from cepe_jax.sharding import num_shards, partition_spec
from cepe_jax.weights.files import describe, digest, save_tensors

BATCH_TOKENS = 1 << 12  # that each device encodes at once
SHORTEST = 32  # tokens that a short chunk is filled up to

AGAIN = "encode its contexts again"
Count = Annotated[int, Meta(ge=0)]

encode_chunks = jax.jit(Cepe.encode_chunks)


@dataclass(frozen=True, eq=False)
class Passage:
    digest: str  # sha256 of the chunks' length and the tokens
    states_LE: np.ndarray  # what the encoder wrote of each token, chunk after chunk
    chunk_length: int = 0  # tokens
    chunk_positions: int = 0  # of the encoder's config. The states do not contain them


@dataclass(frozen=True)
class Facts:
    """The facts in a file of contexts."""

    identity: dict[str, str]
    passages: list[str]  # their digests, which are the names of their states
    chunks: list[tuple[Count, Count]] | None = None  # of each passage; older files lack them


@dataclass(frozen=True, eq=False)
class ContextCache:
    """Encoded passages, in order; `a + b` appends those of b.

    `identity`, from `encoder_identity`, says what wrote them. Caches never change, and share passages that they have in
    common.
    """

    identity: dict[str, str]
    passages: tuple[Passage, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def num_tokens(self) -> int:
        return sum(len(passage.states_LE) for passage in self.passages)

    @property
    def nbytes(self) -> int:
        """The bytes of the host's memory; a passage that comes twice is held once."""
        return sum(states_LE.nbytes for states_LE in self._states().values())

    def __add__(self, other: "ContextCache") -> "ContextCache":
        other.check_is_of(self.identity, "the second context")
        return ContextCache(self.identity, self.passages + other.passages)

    def select(self, indices: Sequence[int]) -> "ContextCache":
        """These passages, in this order."""
        self._check_indices(indices)
        return ContextCache(self.identity, tuple(self.passages[index] for index in indices))

    def drop(self, indices: Sequence[int]) -> "ContextCache":
        """The other passages."""
        self._check_indices(indices)
        dropped = set(indices)
        return self.select([index for index in range(len(self)) if index not in dropped])

    def check_is_of(self, identity: dict[str, str], name: str) -> None:
        """ValueError where the cache called `name` was written by something else than `identity` says."""
        for key, value in identity.items():
            if (there := self.identity.get(key)) != value:
                raise ValueError(f"{name} was encoded with another {key} ({there}, not {value}): encode it anew")

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; where that fails, what was at `path` is still there and nothing else."""
        with one_writer_of(Path(path)):
            self._write(Path(path))

    def add_to(self, path: Path) -> None:
        """Add to the file at `path`, which is made if absent, the passages that it lacks."""
        with one_writer_of(path):
            kept = self.load(path, self.identity) if path.exists() else ContextCache(self.identity)
            known = {passage.digest for passage in kept.passages}
            new = {passage.digest: passage for passage in self.passages if passage.digest not in known}
            ContextCache(self.identity, (*kept.passages, *new.values()))._write(path)

    def _write(self, path: Path) -> None:
        states = self._states()
        passages = [passage.digest for passage in self.passages]
        chunks = [(passage.chunk_length, passage.chunk_positions) for passage in self.passages]
        facts = json.dumps({"identity": self.identity, "passages": passages, "chunks": chunks})
        with staged_directory(path) as place:  # safetensors has a temporary file of its own
            save_tensors(states, place / path.name, {"facts": facts, "sha256": _sha256(facts, states)})
            (place / path.name).rename(path)

    @classmethod
    def load(cls, path: Path | str, identity: dict[str, str]) -> "ContextCache":
        """Return what `save` wrote; ValueError if it is damaged, or written by something else than `identity` says."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of contexts")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole file of contexts ({error}): {AGAIN}") from None
        if not {"facts", "sha256"} <= metadata.keys():
            raise ValueError(f"{path} is no file of contexts: give one that was saved as such")
        if _sha256(metadata["facts"], states) != metadata["sha256"]:
            raise ValueError(f"{path} is damaged, its sha256 differs from the stored one: {AGAIN}")
        facts = parse_json(metadata["facts"], str(path), Facts, AGAIN)
        names = facts.passages
        chunks = [(0, 0)] * len(names) if facts.chunks is None else facts.chunks
        widths = {states_LE.shape[1:] for states_LE in states.values()}
        are_states = len(widths) <= 1 and all(len(width) == 1 for width in widths)
        if {*names} != states.keys() or len(chunks) != len(names) or not are_states:
            raise ValueError(f"{path} has facts of {len(names)} passages that its tensors do not fit: {AGAIN}")
        passages = (Passage(name, states[name], *of_passage) for name, of_passage in zip(names, chunks, strict=True))
        cache = cls(facts.identity, tuple(passages))
        cache.check_is_of(identity, str(path))
        return cache

    def _states(self) -> dict[str, np.ndarray]:
        return {passage.digest: passage.states_LE for passage in self.passages}

    def _check_indices(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < len(self):
                raise ValueError(f"there is no passage {index}: the cache has {len(self)}, the first is 0")


def _sha256(facts: str, states: dict[str, np.ndarray]) -> str:
    described = digest({name: describe(states_LE) for name, states_LE in states.items()})
    return hashlib.sha256(f"{facts}{described}".encode()).hexdigest()


def encoder_identity(model: Cepe, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what a passage's states depend on beside its tokens. It reads the whole encoder: ask once a model."""
    encoder = model.encoder
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(encoder)))
    # Of copies: what numpy reads of an array stays on the host as long as the array does.
    weights = digest({jax.tree_util.keystr(path): describe(np.asarray(leaf.copy())) for path, leaf in leaves})
    numbers = f"{weights}{encoder.config.norm_eps}{encoder.config.rope}"
    if encoder.config.chunk_positions:
        numbers += f"{encoder.config.chunk_positions} chunk positions"
    return {  # in the order in which they are compared: another dtype is another encoder too
        "dtype": encoder.compute.dtype,
        "tokenizer": tokenizer.fingerprint(),
        "encoder": hashlib.sha256(numbers.encode()).hexdigest(),
    }


def encode(
    model: Cepe | Llama,
    passages: Sequence[Sequence[int]],
    identity: dict[str, str],
    chunk_length: int,
    known: ContextCache | None = None,
) -> ContextCache:
    """The cache of these passages, each cut into chunks of `chunk_length` tokens, with progress on stderr.

    A passage that comes twice, or that `known` holds, is not encoded again.
    """
    check_reads_contexts(model)
    check_chunk_length(chunk_length)
    for number, tokens in enumerate(passages):
        if len(tokens) == 0:
            raise ValueError(f"passage {number} has no tokens: leave it out")
        check_tokens(f"passage {number}", np.asarray(tokens), 1, model.encoder.config.vocab_size)
    width, dtype = model.encoder.config.width, np.dtype(model.encoder.compute.dtype)
    copies = 2 if _on_host() else 0  # what is kept, and what `stacked` makes of it before it is placed
    _check_fits(1, sum(map(len, passages)), width, dtype, copies + 1)
    found = {}
    if known is not None:
        known.check_is_of(identity, "the known context")
        found = {passage.digest: passage for passage in known.passages}
    digests = [_passage_digest(tokens, chunk_length) for tokens in passages]
    new = {name: tokens for name, tokens in zip(digests, passages, strict=True) if name not in found}
    for name, states_LE in zip(new, _encoded(model, list(new.values()), chunk_length), strict=True):
        found[name] = Passage(name, states_LE, chunk_length, model.encoder.config.chunk_positions)
    return ContextCache(identity, tuple(found[name] for name in digests))


def _passage_digest(tokens: Sequence[int], chunk_length: int) -> str:
    return hashlib.sha256(f"{chunk_length}:".encode() + np.asarray(tokens, "<i4").tobytes()).hexdigest()


def _encoded(model: Cepe, passages: list[Sequence[int]], chunk_length: int) -> list[np.ndarray]:
    """(tokens, E) of each passage. Chunks of about one length make a batch, spread over all devices."""
    chunks = [tokens[at : at + chunk_length] for tokens in passages for at in range(0, len(tokens), chunk_length)]
    states: list[np.ndarray | None] = [None] * len(chunks)
    by_length: dict[int, list[int]] = {}
    for index, chunk in enumerate(chunks):
        by_length.setdefault(min(max(power_of_two(len(chunk)), SHORTEST), chunk_length), []).append(index)
    rows, shards = num_shards("batch"), num_shards("batch") * num_shards("memory")
    batches = []  # (indices of chunks, how many they are filled up to, their length)
    for length, indices in by_length.items():
        most = max(BATCH_TOKENS // length, 1)  # on a device
        for first in range(0, len(indices), most * shards):
            batch = indices[first : first + most * shards]
            batches.append((batch, shards * min(most, power_of_two(-(-len(batch) // shards))), length))

    def encoded() -> Iterator[tuple[list[int], int, jax.Array]]:
        for indices, count, length in batches:
            tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
            for row, index in enumerate(indices):
                tokens[row, : len(chunks[index])], mask[row, : len(chunks[index])] = chunks[index], True
            shape = rows, count // rows, length
            yield indices, length, encode_chunks(model, tokens.reshape(shape), mask.reshape(shape))

    results = one_ahead(encoded())
    if len(batches) > 1:
        total = sum(map(len, chunks))
        results = track(results, "encode", total, amount=lambda done: sum(len(chunks[index]) for index in done[0]))
    for indices, length, states_BME in results:
        states_CLE = np.asarray(states_BME).reshape(-1, length, states_BME.shape[-1])
        for index, states_LE in zip(indices, states_CLE, strict=False):  # what filled the batch up is last
            states[index] = states_LE[: len(chunks[index])].copy()
    in_order = iter(states)
    return [np.concatenate([next(in_order) for _ in range(0, len(tokens), chunk_length)]) for tokens in passages]


def stacked(caches: Sequence[ContextCache], length: int | None = None) -> Memory | None:
    """The memory with a row for each cache, padded to `length`, or a bucket, and placed on the mesh.

    None where there is not a token: then the decoder is the plain one.
    """
    for number, cache in enumerate(caches):
        cache.check_is_of(caches[0].identity, f"context {number}")
    longest = max(cache.num_tokens for cache in caches)
    if longest == 0:
        return None
    some = next(cache.passages[0].states_LE for cache in caches if len(cache))
    _check_fits(
        len(caches), longest if length is None else length, some.shape[1], some.dtype, copies=2 if _on_host() else 1
    )
    length = bucket(longest) if length is None else length
    states_BME = np.zeros((len(caches), length, some.shape[1]), some.dtype)
    for row, cache in zip(states_BME, caches, strict=True):
        np.concatenate([p.states_LE for p in cache.passages] or [some[:0]], out=row[: cache.num_tokens])
        if any(passage.chunk_positions for passage in cache.passages):
            _add_positions(row, cache.passages)
    valid_BM = np.arange(length) < np.array([cache.num_tokens for cache in caches])[:, None]
    return Memory(
        jax.device_put(states_BME, _placement(len(caches), None)), jax.device_put(valid_BM, _placement(len(caches)))
    )


class DeviceMemories:
    """The memories of the two contexts that were used last. They stay on the devices between calls.

    A memory is freed together with its context. Two are kept so that contexts can be used in turn; more would hold the
    memories of all earlier states of a context that grows.
    """

    KEPT = 2

    def __init__(self):
        self._placed: WeakKeyDictionary[ContextCache, tuple[Mesh, Memory | None]] = WeakKeyDictionary()

    def of(self, context: ContextCache) -> Memory | None:
        """Return the memory of this context, placed on the mesh in use."""
        mesh = jax.sharding.get_mesh()
        placed = self._placed.pop(context, None)
        if placed is None or placed[0] != mesh:
            placed = None
            while len(self._placed) >= self.KEPT:
                del self._placed[next(iter(self._placed))]  # freed before there is another
            placed = mesh, stacked([context])
        self._placed[context] = placed
        return placed[1]


def _add_positions(row_ME: np.ndarray, passages: Sequence[Passage]) -> None:
    """Add the position vectors of the passages' chunks to their states, in place."""
    lengths = [
        min(passage.chunk_length, len(passage.states_LE) - start)
        for passage in passages
        for start in range(0, len(passage.states_LE), passage.chunk_length)
    ]
    ends = np.cumsum(lengths)
    distinct = passages[0].chunk_positions
    positions_CE = chunk_positions(len(lengths), distinct, row_ME.shape[1]).astype(row_ME.dtype)
    for start, end, position_E in zip(ends - lengths, ends, positions_CE, strict=True):
        row_ME[start:end] += position_E


def _placement(rows: int, *axes: str | None) -> NamedSharding | None:
    """Return the sharding of an array of `rows` memories with these further axes; None without a mesh."""
    mesh = jax.sharding.get_mesh()
    batch = "batch" if rows % num_shards("batch") == 0 else None
    return None if mesh.empty else NamedSharding(mesh, partition_spec((batch, "memory", *axes)))


def _check_fits(rows: int, num_tokens: int, width: int, dtype: np.dtype, copies: int) -> None:
    """ValueError unless each device has room for its share of `copies` of a memory."""
    shards, length = num_shards("memory"), bucket(num_tokens)
    if length % shards:
        raise ValueError(
            f"a memory of {length} tokens does not divide by the {shards} devices of mesh.context: take a power of two"
        )
    shape, placement = (rows, length, width), _placement(rows, None)
    share = math.prod(shape if placement is None else placement.shard_shape(shape))
    needed, free = share * dtype.itemsize * copies, free_bytes()
    if needed > free:
        fits = length * free // needed
        step = power_of_two(max(fits + 1, 1024)) // 8
        raise ValueError(
            f"{rows} x {num_tokens:,} tokens of context need {gib(needed)} on each device and {gib(free)} are free: "
            f"{fits // step * step:,} would fit; give fewer, a larger mesh.context, or dtype bfloat16"
        )


def _on_host() -> bool:
    """Return True if the host's memory is the devices' too."""
    return jax.default_backend() == "cpu"
