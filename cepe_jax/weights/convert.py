"""Models from PyTorch's formats to ours, and back."""

from pathlib import Path

from cepe_jax.config import Dtype
from cepe_jax.directories import new_directory, write_json
from cepe_jax.progress import track
from cepe_jax.weights.build import Source, shapes
from cepe_jax.weights.directory import Directory, write
from cepe_jax.weights.factors import Merged
from cepe_jax.weights.files import check_finite, write_shards
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.kinds import to_hf_config
from cepe_jax.weights.source import open_model, open_ours


def to_jax(source: Path | str, target: Path | str, dtype: Dtype | None = None) -> None:
    """Write `source`, of Hugging Face, PEFT or GGUF, to `target` in our format, with its tokenizer.

    Tensors are as stored, those of a GGUF file in float32; or in `dtype`.
    """
    model = open_model(source)
    if isinstance(model, Directory):
        raise ValueError(f"{source} is already in our format: copy it")
    _write(model, target, f"converting {source}", dtype)


def merge(source: Path | str, target: Path | str) -> None:
    """Write the model at `source`, in our format, to `target` in it, its low-rank factors added to its weights."""
    model = open_ours(source)
    merged = Merged(model)
    if merged.config == model.config:
        raise ValueError(f"{source} has no low-rank factors: nothing is to be merged")
    _write(merged, target, f"merging {source}")


def _write(model: Source, target: Path | str, doing: str, dtype: Dtype | None = None) -> None:
    def tensors():
        for name in track(list(shapes(model.config)), doing):
            array = model.read(name)
            array = array if dtype is None else array.astype(dtype, copy=False)
            check_finite(model.path, name, array)
            yield name, array

    write(target, model.config, tensors(), model.facts, model.write_assets)


def to_hf(source: Path | str, target: Path | str) -> None:
    """Write the model at `source`, in our format, to `target` as transformers or the CEPE reference reads it.

    Low-rank factors are added to its weights.
    """
    model = Merged(open_ours(source))
    embedding = next(name for name in shapes(model.config) if name.endswith(".embed"))  # the decoder's if it has one
    stored = model.read(embedding, (slice(1),)).dtype.name
    config = to_hf_config(model.config, model.facts, stored)
    entries = table(model.config)

    def tensors():
        for entry in track(list(entries.values()), f"converting {source}"):
            array = model.read(entry.name)
            check_finite(source, entry.name, array)
            yield entry.key, entry.to_torch(array)

    with new_directory(Path(target)) as partial:
        model.write_assets(partial)
        write_shards(partial, tensors())
        write_json(partial / "config.json", config)
