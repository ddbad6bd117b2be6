"""The loop of the training README, on a tiny model and data in the places that it names."""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from support.datasets import make_tokenizer, write_sequences
from support.models import make_cepe

from cepe_jax.config import Compute, CrossLayers
from cepe_jax.weights.source import load, save

README = Path(__file__).parents[2] / "cepe_jax" / "training" / "README.md"


def test_readme_loop_trains_encoder_and_cross(tmp_path, monkeypatch, capsys):
    """As it stands there, in Flax's own modes; the decoder comes out as it went in.

    Most of its time compiles the step, which is what a user would run first.
    """
    (program,) = (
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "nnx.Optim" in block
    )
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(tmp_path)
    save(make_cepe(CrossLayers(), tokenizer.vocab_size), "cepe-7b", tmp_path)
    tokens = [np.arange(start, start + 257) % 251 for start in range(40)]
    write_sequences(tmp_path / "data/filtered", tokens, 256, tokenizer)
    with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
        exec(program, {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    before, after = (load(path, Compute("bfloat16"), ("encoder", "cross")).parts for path in ("cepe-7b", "my-cepe"))
    for part, moves in ("decoder", False), ("encoder", True), ("cross", True):
        leaves = zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True)
        changed = [not np.array_equal(a, b) for a, b in leaves]
        assert any(changed) == moves, part
