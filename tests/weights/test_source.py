"""A model at a path is opened once, whatever its format."""

import dataclasses
import io

import pytest
from support.models import DECODER, make_decoder

import cepe_jax
from cepe_jax.weights.convert import to_hf
from cepe_jax.weights.source import load, open_model, save


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that are opened through `Path`."""
    names, opening = [], io.open

    def watched(file, *arguments, **options):
        names.append(str(file).rpartition("/")[2])
        return opening(file, *arguments, **options)

    monkeypatch.setattr(io, "open", watched)
    return names


@pytest.mark.parametrize("format", ["ours", "pytorch"])
def test_config_is_read_once(home, tmp_path, reads, format):
    path = home
    if format == "pytorch":
        save(make_decoder(dataclasses.replace(DECODER, vocab_size=332)), tmp_path / "decoder", assets=home)
        to_hf(tmp_path / "decoder", path := tmp_path / "exported")
    reads.clear()
    load(path)
    assert reads.count("config.json") == 1
    reads.clear()
    model = cepe_jax.load(path)
    assert reads.count("config.json") == 1
    assert model.window == open_model(path).facts["max_position_embeddings"]


def test_weights_are_not_looked_at_before_they_are_read(home, tmp_path):
    (tmp_path / "config.json").write_text((home / "config.json").read_text())
    source = open_model(tmp_path)
    assert source.config == open_model(home).config
    with pytest.raises(ValueError, match="hash.json|no weights"):
        source.read("decoder.embed")
