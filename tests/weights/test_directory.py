"""Our directories: round trips bit for bit, whole or absent, each process reading only its slices."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support.models import flip, forget
from support.refusals import one_line

from cepe_jax.config import Compute, CrossLayers
from cepe_jax.directories import staged_path
from cepe_jax.exits import FAULT, REFUSED, status_of
from cepe_jax.weights import files
from cepe_jax.weights.build import tensors_of
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.directory import write
from cepe_jax.weights.source import load, open_ours, save


def same(a, b) -> None:
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stored(path) -> dict:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("kind", ["cepe", "llama"])
def test_to_jax_load_to_hf(kind, tmp_path, request):
    source = request.getfixturevalue(f"{kind}_source")
    for name in ("tokenizer.model", "chat_template.jinja"):
        (source.path / name).write_text(name)
    to_jax(source.path, tmp_path / "ours")
    same(load(tmp_path / "ours"), load(source.path))
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = source.tensors(), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    same(load(tmp_path / "back"), load(source.path))
    for directory in ("ours", "back"):
        for name in ("tokenizer.model", "chat_template.jinja"):
            assert (tmp_path / directory / name).read_text() == name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    for key, value in json.loads((source.path / "config.json").read_text()).items():
        if key != "encoder_config":
            assert written[key] == value


def test_bfloat16_and_several_shards(cepe_source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    to_jax(cepe_source.path, tmp_path / "ours", "bfloat16")
    shards = sorted(tmp_path.glob("ours/*.safetensors"))
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert all(shard.stat().st_mode == (tmp_path / "ours" / "config.json").stat().st_mode for shard in shards)
    with safe_open(shards[0], "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    same(load(tmp_path / "ours", Compute("bfloat16")), load(cepe_source.path, Compute("bfloat16")))
    to_hf(tmp_path / "ours", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    same(load(tmp_path / "back", Compute("bfloat16")), load(cepe_source.path, Compute("bfloat16")))


@pytest.mark.parametrize("kind", ["cepe", "decoder", "encoder"])
def test_save_and_load(kind, tmp_path, request):
    model = request.getfixturevalue(kind)
    save(model, tmp_path / "ours")
    same(load(tmp_path / "ours"), model)
    open_ours(tmp_path / "ours").verify()
    if kind != "cepe":  # this one's encoder has an MLM head
        to_hf(tmp_path / "ours", tmp_path / "hf")
        same(load(tmp_path / "hf"), model)


def test_an_mlm_head_has_no_place_in_a_cepe_checkpoint(cepe, tmp_path):
    save(cepe, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"PyTorch.* encoder\.mlm_head\.bias"):
        to_hf(tmp_path / "ours", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_encoder_without_its_head_has_no_class(cepe_source, tmp_path):
    save(load(cepe_source.path).encoder, tmp_path / "ours")
    assert not load(tmp_path / "ours").config.mlm_head
    with pytest.raises(ValueError, match="PyTorch.*MLM head"):
        to_hf(tmp_path / "ours", tmp_path / "hf")


def test_base_hash_is_that_of_the_decoder_alone(cepe, decoder, tmp_path):
    save(cepe, tmp_path / "cepe")
    save(decoder, tmp_path / "decoder")
    base = open_ours(tmp_path / "decoder").base_hash
    assert base == open_ours(tmp_path / "cepe").base_hash
    changed = jax.tree.map(lambda a: a.at[(0,) * a.ndim].add(1e-3), decoder)
    save(changed, tmp_path / "changed")
    assert open_ours(tmp_path / "changed").base_hash != base


def test_facts_and_tokenizer_of_the_base_travel(llama_source, tmp_path):
    (llama_source.path / "tokenizer.model").write_text("pieces")
    llama_source.configure(max_position_embeddings=777, bos_token_id=5)
    to_jax(llama_source.path, tmp_path / "base")
    for assets in (llama_source.path, tmp_path / "base"):
        save(load(tmp_path / "base"), tmp_path / assets.name / "again", assets)
        to_hf(tmp_path / assets.name / "again", tmp_path / assets.name / "hf")
        written = json.loads((tmp_path / assets.name / "hf" / "config.json").read_text())
        assert (written["max_position_embeddings"], written["bos_token_id"]) == (777, 5)
        assert (tmp_path / assets.name / "hf" / "tokenizer.model").read_text() == "pieces"


@pytest.mark.parametrize("convert", [to_jax, to_hf])
def test_never_half_written(convert, cepe_source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    source = cepe_source.path
    if convert is to_hf:
        to_jax(source, tmp_path / "ours")
        source = tmp_path / "ours"
    real, calls = files.save_file, []

    def fails_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", fails_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "target")
    assert set(tmp_path.iterdir()) == before
    # What a killed process leaves has another name, is no model, and is removed by the next run.
    place = staged_path(tmp_path / "target")
    place.mkdir()
    (place / "1.safetensors").write_text("half")
    with pytest.raises(ValueError, match="no config"):
        load(place)
    convert(source, tmp_path / "target")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "target"}
    assert not list((tmp_path / "target").glob("[0-9]*"))


def test_existing_target_is_kept(cepe_source, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="target exists"):
        to_jax(cepe_source.path, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize(("code", "status"), [(errno.ENOSPC, FAULT), (errno.EACCES, REFUSED)])
def test_a_disk_that_refuses_is_no_bad_input(cepe_source, tmp_path, monkeypatch, code, status):
    def refuse(*_, **__):
        raise files.SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr(files, "save_file", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as refused:
        to_jax(cepe_source.path, tmp_path / "target")
    assert refused.value.errno == code
    assert status_of(refused.value) == status
    assert not (tmp_path / "target").exists()


def test_wrong_direction(cepe_source, tmp_path):
    with pytest.raises(ValueError, match=r"format.*scripts/convert\.py to-jax"):
        to_hf(cepe_source.path, tmp_path / "target")
    to_jax(cepe_source.path, tmp_path / "ours")
    with pytest.raises(ValueError, match="already.*format"):
        to_jax(tmp_path / "ours", tmp_path / "target")


@pytest.fixture
def ours(cepe_source, tmp_path):
    to_jax(cepe_source.path, tmp_path / "ours")
    return tmp_path / "ours"


def test_flipped_bit_is_found(ours):
    open_ours(ours).verify()
    flip(ours)
    with pytest.raises(ValueError, match=r"encoder\.norm\.scale changed"):
        open_ours(ours).verify()


def test_layers_that_read_are_kept_and_the_reference_has_the_last_alone(ours, tmp_path):
    """A directory of before, which has the number of last layers, is the same model."""
    forget(ours)
    model, written = load(ours), json.loads((ours / "config.json").read_text())
    assert written["cross_layers"] == {"kind": "last", "count": 2}
    before = {key: value for key, value in written.items() if key != "cross_layers"} | {"num_cross_layers": 2}
    (ours / "config.json").write_text(json.dumps(before))
    same(load(ours), model)
    (ours / "config.json").write_text(json.dumps(written | {"cross_layers": {"kind": "first", "count": 2}}))
    assert load(ours).config.cross_layers == CrossLayers("first", 2)
    with pytest.raises(ValueError, match="cross_layers first"):
        to_hf(ours, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_chunks_with_positions_are_ours_alone(ours, tmp_path):
    """A directory of before, which does not know of them, has none."""
    forget(ours)
    written = json.loads((ours / "config.json").read_text())
    assert written["encoder"].pop("chunk_positions") == 0
    (ours / "config.json").write_text(json.dumps(written))
    assert not load(ours).encoder.config.chunk_positions
    written["encoder"]["chunk_positions"] = 4
    (ours / "config.json").write_text(json.dumps(written))
    assert load(ours).encoder.config.chunk_positions == 4
    with pytest.raises(ValueError, match="chunk_positions"):
        to_hf(ours, tmp_path / "hf")


def edit(path: Path, change) -> None:
    """Let `change` change the value in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


DEEP = "[" * 100_000
DECODER, ROPE = ("decoder",), ("decoder", "rope")


@pytest.mark.parametrize(
    ("file", "place", "change", "message"),
    [
        ("config.json", DECODER, {"mlp_width": 95}, r"mlp\.down .*\[96, 48\].*\[95, 48\]"),
        ("config.json", DECODER, {"surprise": 1}, "decoder.surprise"),
        ("config.json", ROPE, {"surprise": 1}, "decoder.rope.surprise"),
        ("config.json", ("encoder",), {"width": ...}, "encoder .*width"),
        ("config.json", DECODER, {"norm_eps": {}}, "decoder.norm_eps is an object"),
        ("config.json", DECODER, {"norm_eps": 1e30}, "norm_eps is 1e"),
        ("config.json", DECODER, {"num_layers": 2**31}, "num_layers is 2147483648"),
        ("config.json", DECODER, {"tied_head": 1}, "decoder.tied_head is 1"),
        ("config.json", DECODER, {"rope": None}, "decoder.rope is None"),
        ("config.json", ROPE, {"theta": True}, "decoder.rope.theta is True"),
        ("config.json", ROPE, {"theta": float("nan")}, "NaN"),
        ("config.json", ROPE, {"beta_fast": "x"}, "decoder.rope.beta_fast is 'x'"),
        ("config.json", ROPE, {"beta_fast": []}, "decoder.rope.beta_fast is a list"),
        ("config.json", ROPE, {"beta_fast": float("inf")}, "Infinity"),
        ("config.json", ROPE, {"beta_slow": 0.0}, "beta_slow is 0.0"),
        ("config.json", ROPE, {"original_length": {}}, "decoder.rope.original_length is an object"),
        ("config.json", ("encoder",), {"chunk_positions": -1}, "chunk_positions is -1"),
        ("config.json", ("cross_layers",), {"count": 1}, r"unknown cross\.1\.k"),
        ("config.json", ("cross_layers",), {"count": 3}, r"lacks cross\.2\.k"),
        ("config.json", ("cross_layers",), {"kind": "middle"}, "cross_layers.kind is 'middle'"),
        ("config.json", (), {"decoder": 5}, "decoder is 5"),
        ("config.json", (), {"kind": "other"}, "kind 'other'"),
        ("config.json", (), {"kind": ["cepe"]}, "kind: holds a list"),
        ("config.json", (), {"kind": "llama"}, "kind llama .*needs decoder"),
        ("config.json", (), {"huggingface": None}, "huggingface: holds None"),
        ("config.json", ("huggingface",), {"max_position_embeddings": True}, "max_position_embeddings is True"),
        ("config.json", ("huggingface",), {"eos_token_id": -5}, "eos_token_id is -5"),
        ("config.json", (), DEEP, "config.json .*deep"),
        ("hash.json", ("tensors", "cross.0.q"), {"dtype": "bfloat16"}, r"cross\.0\.q .*hash\.json"),
        ("hash.json", ("tensors",), {"cross.0.q": ...}, r"cross\.0\.q .*hash\.json"),
        ("hash.json", ("tensors",), {"cross.0.q": None}, "hash.json: tensors"),
        ("hash.json", ("tensors",), {"cross.0.q": "x"}, "hash.json: tensors"),
        ("hash.json", (), {"tensors": None}, "hash.json: tensors is None"),
        ("hash.json", (), {"tensors": []}, "hash.json: tensors is a list"),
        ("hash.json", (), {"base": ...}, "hash.json: .*base"),
        ("hash.json", (), {"files": {"config.json": 3}}, "hash.json: files"),
        ("hash.json", (), DEEP, "hash.json .*deep"),
        ("model.safetensors.index.json", (), DEEP, "index.json .*deep"),
    ],
)
def test_spoiled_directories_are_named(ours, file, place, change, message):
    def spoil(value: dict) -> None:
        for key in place:
            value = value[key]
        value.update(change)
        for key in [key for key, new in change.items() if new is ...]:
            del value[key]

    forget(ours)
    if change is DEEP:
        (ours / file).write_text(DEEP)
    else:
        edit(ours / file, spoil)
    with pytest.raises(ValueError, match=message) as refused:
        load(ours)
    assert str(ours) in one_line(refused)


def test_hashes_are_asked_for(ours):
    (ours / "hash.json").unlink()
    with pytest.raises(ValueError, match=r"no hash\.json"):
        load(ours)


FILES = {"tokenizer.json": "pieces", "generation_config.json": '{"eos_token_id": 2}', "chat_template.jinja": "{{ x }}"}


@pytest.fixture
def whole(cepe_source, tmp_path):
    """A directory in our format with files of every sort."""
    for name, content in FILES.items():
        (cepe_source.path / name).write_text(content)
    to_jax(cepe_source.path, tmp_path / "whole")
    open_ours(tmp_path / "whole").verify()
    return tmp_path / "whole"


@pytest.mark.parametrize("name", [*FILES, "config.json", "model.safetensors.index.json"])
def test_changed_and_missing_files_are_refused(whole, name):
    """On every load, even where the file has kept its length and is well formed."""
    content = (whole / name).read_bytes()
    assert b"e" in content or b"x" in content
    for changed in (content.replace(b"e", b"i", 1).replace(b"x", b"y"), content + b" "):
        (whole / name).write_bytes(changed)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refused:
            load(whole)
        one_line(refused)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            open_ours(whole).verify()
    (whole / name).unlink()
    with pytest.raises(ValueError, match=rf"(lacks|no) {name}"):
        load(whole)


def test_valid_changes_of_the_config_are_refused(whole):
    edit(whole / "config.json", lambda config: config["decoder"].update(norm_eps=3e-5))
    with pytest.raises(ValueError, match=r"config\.json .*hash\.json"):
        load(whole)
    edit(whole / "hash.json", lambda hashes: hashes["files"].pop("config.json"))  # who changed it says so
    assert load(whole).config.decoder.norm_eps == 3e-5


def test_files_beside_a_model_are_read_and_told_by_verify(whole):
    (whole / "README.md").write_text("mine")
    open_ours(whole).verify()
    (whole / "tokenizer.model").write_text("added")
    load(whole)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        open_ours(whole).verify()


def test_directories_written_before_files_were_noted(whole):
    forget(whole)
    (whole / "tokenizer.json").unlink()
    model = load(whole)
    open_ours(whole).verify()
    edit(whole / "hash.json", lambda hashes: hashes.update(all="0"))
    same(load(whole), model)
    with pytest.raises(ValueError, match=r"hash\.json contradicts"):
        open_ours(whole).verify()


def test_weights_that_are_not_finite(cepe_source, decoder, tmp_path):
    """Neither converted, in any dtype, nor verified."""
    tensors = cepe_source.tensors()
    embed = tensors["model.embed_tokens.weight"]
    for value, dtype in ((np.nan, None), (-np.inf, None), (3.4e38, "bfloat16")):
        embed[3, 4] = value
        cepe_source.store(tensors)
        with pytest.raises(ValueError, match=r"decoder\.embed .*finite") as refused:
            to_jax(cepe_source.path, tmp_path / "ours", dtype)
        assert str(cepe_source.path) in one_line(refused)
        assert not (tmp_path / "ours").exists()
    save(jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), decoder), tmp_path / "ours")
    with pytest.raises(ValueError, match="finite"):
        open_ours(tmp_path / "ours").verify()
    with pytest.raises(ValueError, match="finite"):
        to_hf(tmp_path / "ours", tmp_path / "hf")


def test_save_refuses_tensors_of_another_model(cepe_source, tmp_path):
    model = load(cepe_source.path)
    tensors = dict(tensors_of(model))
    for spoiled, message in (
        ({k: v for k, v in tensors.items() if k != "cross.0.q"}, r"lacks cross\.0\.q"),
        (tensors | {"more": np.zeros(1)}, "unknown more"),
        (tensors | {"cross.0.q": np.zeros((2, 2), np.float32)}, r"cross\.0\.q is \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "target", model.config, spoiled.items())
        assert not (tmp_path / "target").exists()


SHARDED = """
import sys
import jax
import numpy as np
from cepe_jax.sharding import make_mesh
from cepe_jax.weights import files
from cepe_jax.weights.source import save
from cepe_jax.weights.source import load

read, elements = files.WeightFiles.read, []

def counted(self, key, index=()):
    found = read(self, key, index)
    elements.append(found.size)
    return found

files.WeightFiles.read = counted
path, out = sys.argv[1:]
plain = load(path)
total = sum(elements)
assert total == sum(leaf.size for leaf in jax.tree.leaves(plain)), "without a mesh each element is read once"
elements.clear()
with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
    model = load(path)
assert sum(elements) == total, "each slice is read once, whatever the number of devices that hold it"
gate = model.layers.mlp.gate
assert gate[...].sharding.shard_shape(gate.shape) == (gate.shape[0], gate.shape[1] // 2, gate.shape[2] // 2)
assert model.layers.mlp.gate.get_metadata()["axes"] == ("layer", "embed", "mlp")
jax.tree.map(np.testing.assert_array_equal, model, plain)
save(model, out)
"""


def test_sharded(decoder, tmp_path):
    """In a process of 8 devices: born sharded, each slice read once, the same bits, and saved again the same."""
    save(decoder, tmp_path / "ours")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "ours"), str(tmp_path / "again")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert open_ours(tmp_path / "again").hashes == open_ours(tmp_path / "ours").hashes


def test_script_errors_are_one_line(cepe_source, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "convert.py"

    def convert(*arguments):
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = convert("to-jax", cepe_source.path, tmp_path / "ours", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "ours", Compute("bfloat16")).decoder.embed.dtype == jnp.bfloat16
    done = convert("to-jax", cepe_source.path, tmp_path / "ours")
    assert done.returncode == 1
    assert re.fullmatch(f"convert.py: {tmp_path}/ours exists.*\n", done.stderr)
    assert convert("verify", tmp_path / "ours").returncode == 0
