"""Weight files: which tensors a directory holds, reading one of them, writing them in shards.

A shard is opened anew for each tensor: pages of a mapped file count as resident until it is closed, and a process
that converts a large directory must stay small.
"""

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cepe_jax.directories import download_hint, write_json
from cepe_jax.parsing import read_json, shortened, typed

# safetensors' names of the stored types that we read
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DOWNLOAD = "download it again"  # the mend of a file that is not as it was written
SHARD_BYTES = 1 << 30  # held in memory while a shard is collected; a larger tensor has a shard of its own
SHARD_INDEX = "model.safetensors.index.json"
# What transformers looks for, in its order.
CANDIDATES = ("model.safetensors", SHARD_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def existing(path: Path) -> Path:
    """Return the path of a file of a model; ValueError if there is none."""
    if not path.is_file():
        mend = download_hint(path.parent) or ": give a directory that holds a model"
        raise ValueError(f"no {path.name} in {path.parent}{mend}")
    return path


class Description(TypedDict):
    """The words of hash.json on a tensor."""

    shape: list[int]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor, and its type."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class WeightFiles:
    """The tensors of a directory, by key: single file or sharded with an index, safetensors or torch pickles."""

    def __init__(self, directory: Path, candidates: tuple[str, ...] = CANDIDATES):
        self.directory = directory
        found = next((directory / name for name in candidates if (directory / name).is_file()), None)
        if found is None:
            raise ValueError(f"no weights in {directory}: it has none of {', '.join(candidates)}")
        self.tensors: dict[str, StoredTensor] = {}
        if found.suffix != ".json":
            self.tensors.update(_contents(found))
            return
        index = typed(read_json(found, mend=DOWNLOAD).get("weight_map"), dict[str, str], f"{found}: weight_map")
        for name in sorted(set(index.values())):
            if Path(name).name != name:  # a link is not looked through: the hub's cache has its files elsewhere
                raise ValueError(f"{found} names shard {shortened(name)}: give the name of a file beside it")
            shard = directory / name
            if not shard.is_file():
                raise ValueError(f"{found} names shard {name}, which is missing: download it again")
            contents = _contents(shard)
            for key in contents:
                if key not in index:
                    raise ValueError(f"{shard} holds {key}, which {found.name} does not name: download both again")
                if index[key] != name:
                    raise ValueError(f"{found}: {key} is in two shards, {index[key]} and {name}: one of them is wrong")
            for key, shard_name in index.items():
                if shard_name == name and key not in contents:
                    raise ValueError(f"{found.name} puts {key} in {name}, which lacks it: download both again")
            self.tensors.update(contents)

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or a slice of it; of a safetensors file only the pages of the slice are read."""
        stored = self.tensors[key]
        if stored.file.suffix == ".safetensors":
            with _open(stored.file) as file:
                return file.get_slice(key)[index] if index else file.get_tensor(key)
        return np.array(_numpy_of(_load_pickle(stored.file)[key])[index])  # a copy: a view would keep the file mapped


@contextmanager
def _open(path: Path):
    try:
        with safe_open(path, "np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def _contents(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        with _open(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            found = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    else:
        tensors = _load_pickle(path)
        import torch

        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        for key, value in tensors.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                held = f"{type(value).__name__} {shortened(key)}"
                raise ValueError(f"{path} holds {held}: give a file of tensors by name")
            if value.is_meta or value.is_nested or value.layout is not torch.strided:
                kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout)
                raise ValueError(f"{path}: {key} is {kind}: only plain tensors are read")
        _check_zip(path)
        found = {key: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for key, t in tensors.items()}
    for key, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {key} is {dtype}: only {', '.join(DTYPES)} are read")
    return {key: StoredTensor(path, shape, DTYPES[dtype]) for key, (shape, dtype) in found.items()}


def _load_pickle(path: Path) -> dict:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a torch pickle: pip install '.[parity]' in the checkout reads it") from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others for a bad file
        raise ValueError(
            f"{path} is not a whole torch file of tensors ({' '.join(str(error).split())[:80]}...): download it again"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    return tensors


def _check_zip(path: Path) -> None:
    """Raise ValueError if an entry of a torch file is not what its CRC says, which torch itself does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole torch file ({error}): {DOWNLOAD}") from error
    if entry is not None:
        raise ValueError(f"{path}: {entry} is not what its CRC says: {DOWNLOAD}")


def _numpy_of(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg()  # numpy takes no nn.Parameter, and no view that is only marked as negative
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def write_shards(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, Description]:
    """Safetensors shards and, last, their index, in `directory`; {name: {shape, dtype, sha256}} of what was written.

    Arrays are consumed one by one: at most `SHARD_BYTES` are held beside the one at hand. Every name once.
    """
    written: dict[str, Description] = {}
    shard_of: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    size = count = 0

    def flush():
        nonlocal count
        count += 1
        save_tensors(shard, directory / f"{count}.safetensors", {"format": "pt"})  # transformers wants this word
        shard_of.update(dict.fromkeys(shard, count))
        shard.clear()

    for name, array in tensors:
        if name in written:
            raise ValueError(f"{name} is written twice to {directory}")
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > SHARD_BYTES:
            flush()
        shard[name] = np.ascontiguousarray(array)
        written[name] = describe(shard[name])
        size += array.nbytes
        del array  # else it lives on while the next one is read
    flush()
    final = {n: f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)}
    for number, file in final.items():
        (directory / f"{number}.safetensors").rename(directory / file)
    weight_map = {name: final[number] for name, number in shard_of.items()}
    write_json(directory / SHARD_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return written


def save_tensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file; OSError if there is no room for it."""
    mode = path.parent.stat().st_mode & 0o666  # as any new file's: safetensors makes files that only their owner reads
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


def check_finite(where: Path | str, name: str, array: np.ndarray) -> None:
    """Raise ValueError if one of the numbers is infinite or NaN."""
    # As whole numbers: a maximum needs no second array of this size, and NumPy's of bfloat16 takes 50 times as long.
    infinities, size = np.array([np.inf, -np.inf], array.dtype), array.dtype.itemsize
    for sign, kind in enumerate((f"i{size}", f"u{size}")):  # after each infinity come the NaNs of its sign
        if array.view(kind).max(initial=0) >= infinities.view(kind)[sign]:
            raise ValueError(f"{where}: {name} has values that are not finite: {DOWNLOAD}, or train it again")


def describe(array: np.ndarray) -> Description:
    """{shape, dtype, sha256 of the bytes in C order}."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": hashlib.sha256(data).hexdigest()}


def digest(descriptions: dict[str, Description]) -> str:
    """One sha256 over names, shapes, dtypes and the tensors' own hashes, whatever their order."""
    return hashlib.sha256(json.dumps(descriptions, sort_keys=True).encode()).hexdigest()
