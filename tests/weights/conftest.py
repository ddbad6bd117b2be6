"""Directories of PyTorch weights to convert, and to spoil."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"


class Source:
    """A Hugging Face directory on disk that a test may change."""

    def __init__(self, path: Path):
        self.path = path

    def configure(self, inside: str | None = None, **changes) -> None:
        """Changes keys of config.json (or of an object in it); ... removes one."""
        config = json.loads((self.path / "config.json").read_text())
        target = config[inside] if inside else config
        target.update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del target[key]
        (self.path / "config.json").write_text(json.dumps(config))

    def tensors(self) -> dict:
        return load_file(self.path / "model.safetensors")

    def store(self, tensors: dict) -> None:
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})

    def shard(self, *shards: dict) -> None:
        """In place of the single file these shards and their index."""
        (self.path / "model.safetensors").unlink()
        weight_map = {}
        for number, tensors in enumerate(shards):
            save_file(tensors, self.path / f"shard-{number}.safetensors")
            weight_map.update(dict.fromkeys(tensors, f"shard-{number}.safetensors"))
        self.index(weight_map)

    def index(self, weight_map: dict) -> None:
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def cepe_source(tmp_path) -> Source:
    """The small CEPE with cross-attention in the last 2 of 3 layers."""
    shutil.copytree(GOLDEN / "tiny_edge", tmp_path / "cepe", ignore=shutil.ignore_patterns("*.npz"))
    return Source(tmp_path / "cepe")


@pytest.fixture
def llama_source(tmp_path) -> Source:
    """The plain decoder of a small CEPE."""
    shutil.copytree(GOLDEN / "tiny_mha", tmp_path / "llama", ignore=shutil.ignore_patterns("*.npz"))
    source = Source(tmp_path / "llama")
    kept = {k: v for k, v in source.tensors().items() if not k.startswith("encoder.") and "cross_attn" not in k}
    source.store(kept)
    source.configure(
        architectures=["LlamaForCausalLM"],
        encoder_config=...,
        encoder_hidden_size=...,
        do_cross_attention=...,
        num_cross_attn_layers=...,
        num_cross_attn_hidden_states=...,
        encode_mode=...,
        encoder_is_model=...,
    )
    return source
