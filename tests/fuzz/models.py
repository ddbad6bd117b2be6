"""Models that are spoiled: in our format, as safetensors and as pickles of Hugging Face's, and as GGUF files."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from support.models import write_home

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.inference.text import read_facts
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.files import SHARD_INDEX
from cepe_jax.weights.gguf import OPTIONAL, REQUIRED, _name_of
from cepe_jax.weights.hf_config import SIZES
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.source import load as load_weights
from cepe_jax.weights.source import open_model, open_ours, save
from fuzz.kind import KINDS, SHARD, Kind, differing, mistyped, spoil_bytes, spoil_json, wrong_config
from fuzz.mutations import (
    Rng,
    change_bytes,
    change_json,
    change_number,
    pick,
)


def make_ours(to: Path) -> None:
    (to / "made").mkdir(parents=True)
    shutil.copytree(write_home(to / "made"), to, dirs_exist_ok=True)
    shutil.rmtree(to / "made")


def make_hf(to: Path) -> None:
    """Write a CEPE as Hugging Face has it, without the encoder's MLM head, and weights that no index may reach."""
    make_ours(to / "made")
    config = open_ours(to / "made").config
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, mlm_head=False))
    save(load_weights(to / "made", config=config), to / "ours", to / "made")
    to_hf(to / "ours", to / "hf")
    shutil.copytree(to / "hf", to, dirs_exist_ok=True)
    for name in ("made", "ours", "hf"):
        shutil.rmtree(to / name)
    (to / "elsewhere").mkdir()
    shutil.copy(to / SHARD, to / "elsewhere" / "x.safetensors")


def make_bin(to: Path) -> None:
    import torch

    make_hf(to)
    torch.save({key: torch.tensor(array) for key, array in load_file(to / SHARD).items()}, to / "pytorch_model.bin")
    (to / SHARD).unlink()
    (to / SHARD_INDEX).unlink()


def convert(source: Path, place: Path) -> dict:
    """Return what `to_jax` writes of a source, and what text generation goes by."""
    facts = read_facts(source) if source.is_dir() else None
    to_jax(source, place / "out")
    return contents(place / "out") | ({"window": facts.window, "stop_ids": facts.stop_ids} if facts else {})


def contents(place: Path) -> dict:
    """Return what a directory of ours holds."""
    facts, ours = read_facts(place), open_ours(place)
    tensors = {name: ours.read(name) for name in ours.files.tensors}
    tokenizer = facts.tokenizer.fingerprint()
    result = {"config": facts.config, "facts": ours.facts, "tensors": tensors, "tokenizer": tokenizer}
    return result | {"window": facts.window, "stop_ids": facts.stop_ids}


def wrong_tensors(tensors: dict, expected: dict) -> str:
    if tensors.keys() != expected.keys():
        return "other tensors"
    for name, array in expected.items():
        if tensors[name].dtype != array.dtype or tensors[name].shape != array.shape:
            return f"{name} is {tensors[name].dtype}{tensors[name].shape}"
        if tensors[name].tobytes() != array.tobytes():
            return f"{name} has other bits"
    return ""


def infinite(tensors: dict) -> str:
    names = [name for name, array in tensors.items() if not np.isfinite(array.astype(np.float32)).all()]
    return f"numbers that are not finite in {', '.join(names)}" if names else ""


def wrong_contents(place: Path, result: dict, whole: dict) -> str:
    if wrong := wrong_tensors(result["tensors"], whole["tensors"]):
        return wrong
    keys = "config", "tokenizer", "window", "stop_ids"
    return "".join(f"another {key}: {result[key]}" for key in keys if result[key] != whole[key])


def stored(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by the format's own description."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
    header = {key: entry for key, entry in json.loads(data[8:start]).items() if key != "__metadata__"}
    parts = {
        key: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]] for key, entry in header.items()
    }
    return {key: np.frombuffer(parts[key], kinds[e["dtype"]]).reshape(e["shape"]) for key, e in header.items()}


ROPES = [
    {},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
]


def spoil_hf_config(place: Path, rng: Rng) -> list[str]:
    path = place / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": None} | pick(rng, ROPES)
    path.write_text(json.dumps(config))
    return spoil_json(path, rng)


def fields_of(hf: dict) -> dict:
    """Return our fields of a Hugging Face config with transformers' defaults."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    hf = hf | {key: value for key, value in defaults.items() if hf.get(key) is None}
    rope = {"rope_theta": hf["rope_theta"]} | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    ours = {"factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers = {name: default if rope.get(name) is None else rope[name] for name, default in ours.items()}
    fields = {"theta": rope["rope_theta"], "scaling": scaling} | numbers
    return {ours: hf[key] for key, ours in SIZES.items()} | {"norm_eps": hf["rms_norm_eps"], "rope": fields}


def wrong_hf(place: Path, result: dict, whole: dict) -> str:
    hf, config = json.loads((place / "config.json").read_text()), result["config"]
    if wrong := wrong_config(config) or wrong_tensors(result["tensors"], whole["tensors"]):
        return wrong
    for part, written in (("decoder", hf), ("encoder", hf["encoder_config"])):
        if differing(fields_of(written), dataclasses.asdict(getattr(config, part))):
            return f"{part} is {getattr(config, part)}, and the file has {fields_of(written)}"
    positions = hf.get("max_position_embeddings")
    if result["window"] != positions or type(positions) not in (int, type(None)) or positions in (0, -1, -5):
        return f"a window of {result['window']!r} tokens"
    return ""


def spoil_safetensors(path: Path, rng: Rng) -> list[str]:
    """Change the header as JSON, its length, or bytes of all; or let all numbers be no numbers."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    draw = rng.random()
    if draw < 0.4:
        header, words = change_json(data[8:start].decode(), rng)
        path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data[start:])
        return words
    if draw < 0.5:
        path.write_bytes(change_number(data, rng, 0))
    elif draw < 0.55:
        path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    elif draw < 0.75:
        path.write_bytes(data[:start] + change_bytes(data[start:], rng))
    else:
        path.write_bytes(change_bytes(data, rng))
    return []


def wrong_safetensors(place: Path, result: dict, whole: dict) -> str:
    """The data have no checksum: each tensor must have the bytes that lie where the header says."""
    entries, data = table(result["config"]), stored(place / SHARD)
    expected = {name: entry.to_ours(data[entry.key]) for name, entry in entries.items()}
    return (
        wrong_tensors(result["tensors"], expected)
        or infinite(expected)
        or wrong_contents(place, result | {"tensors": {}}, whole | {"tensors": {}})
    )


def spoil_bin(place: Path, rng: Rng) -> list[str]:
    """Change bytes of a torch file, or what it holds: some of it is allowed, and some runs code when unpickled."""
    import torch

    path = place / "pytorch_model.bin"
    if rng.random() < 0.5:
        return spoil_bytes(path, rng)
    tensors = torch.load(path)
    key = pick(rng, sorted(tensors))
    tensor, whole = tensors[key], dict(tensors)
    changes = [
        lambda: {name: torch.nn.Parameter(one) for name, one in tensors.items()},
        lambda: whole | {key: tensor.to_sparse()},
        lambda: whole | {key: tensor.to("meta")},
        lambda: whole | {key: torch.view_as_complex(torch.zeros(3, 2)).conj()},
        lambda: whole | {key: torch._neg_view(-tensor)},
        lambda: whole | {key: tensor.T.contiguous().T},
        lambda: whole | {key: tensor * math.nan},
        lambda: whole | {key: tensor.to(torch.float64)},
        lambda: whole | {key: tensor.numpy().tolist()},
        lambda: whole | {key: Ran()},
        lambda: dict(enumerate(tensors.values())),
        lambda: whole | {5: tensor},
        lambda: list(tensors.values()),
        lambda: {"state_dict": tensors},
        lambda: {},
    ]
    torch.save(pick(rng, changes)(), path)
    return [key]


class Ran:
    """An object whose pickle makes a directory when it is read."""

    def __reduce__(self):
        import os

        return os.mkdir, ("ran",)


def spoil_ours(place: Path, rng: Rng) -> list[str]:
    path = place / pick(rng, sorted(path.name for path in place.iterdir()) + ["config.json", "hash.json"])
    if path.suffix == ".json":
        return spoil_json(path, rng, 0.3)
    return spoil_safetensors(path, rng)


def spoil_our_config(place: Path, rng: Rng) -> list[str]:
    """Change config.json, which hash.json no longer describes, as of a file that was changed on purpose."""
    hashes = json.loads((place / "hash.json").read_text())
    del hashes["files"]["config.json"]
    (place / "hash.json").write_text(json.dumps(hashes))
    return spoil_json(place / "config.json", rng)


def wrong_ours(place: Path, result: dict, whole: dict) -> str:
    """Loading reads no hashes of weights: what is there must be exactly what the files say."""
    written = json.loads((place / "config.json").read_text())
    if wrong := wrong_config(result["config"]):
        return wrong
    config = {key: value for key, value in written.items() if key not in ("format", "kind", "huggingface")}
    if differing(config, dataclasses.asdict(result["config"])):
        return f"{result['config']} for {config}"
    positions = written.get("huggingface", {}).get("max_position_embeddings")
    if result["window"] != positions or mistyped(positions, int | None):
        return f"a window of {result['window']!r} tokens"
    return wrong_tensors(result["tensors"], stored(place / SHARD))


def verify(place: Path) -> None:
    open_ours(place).verify()


def wrong_whole(place: Path, result: None, whole: None) -> str:
    """A directory that was called whole must hold what the sound one does; all of its files have hashes."""
    return wrong_contents(place, contents(place), sound_contents(place))


@functools.cache
def _sound_contents(path: Path) -> dict:
    return contents(path)


def sound_contents(place: Path) -> dict:
    return _sound_contents(place.parents[1] / make_ours.__name__)


def make_gguf(to: Path) -> None:
    import gguf

    make_ours(to / "made")
    ours = open_ours(to / "made")
    decoder = ours.config.decoder
    config = {
        "block_count": decoder.num_layers,
        "context_length": 48,
        "embedding_length": decoder.width,
        "feed_forward_length": decoder.mlp_width,
        "attention.head_count": decoder.num_heads,
        "attention.head_count_kv": decoder.num_kv_heads,
        "attention.key_length": decoder.head_dim,
        "attention.value_length": decoder.head_dim,
        "attention.layer_norm_rms_epsilon": decoder.norm_eps,
        "rope.freq_base": decoder.rope.theta,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
    }
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *names, *"abcdefghijklmnopqrstuvwxyz▁", "ab", "▁a"]
    tokens += [f"[{i}]" for i in range(decoder.vocab_size - len(tokens))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    writer = gguf.GGUFWriter(to / "m.gguf", "llama")
    for key, value in config.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"llama.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, entry in table(decoder).items():
        writer.add_tensor(_name_of(entry.key), entry.to_torch(ours.read(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(to / "made")


def convert_gguf(place: Path) -> dict:
    return convert(place / "m.gguf", place) | {"tokens": Tokenizer(place / "out")._impl.vocabulary()}


@functools.cache
def data_start(path: Path) -> tuple[int, list[int]]:
    """Return where a GGUF file's data begin, and where the sizes, types and offsets of its tensors stand."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = [tensor.field.offset + 8 + len(tensor.name) for tensor in reader.tensors]
    ends = [at + 4 + 8 * len(tensor.shape) for at, tensor in zip(fields, reader.tensors, strict=True)]
    return reader.data_offset, [*fields, *(at + 4 for at in fields), *ends, *(at + 4 for at in ends)]


def spoil_gguf(place: Path, rng: Rng) -> list[str]:
    """Change a number before the data, one of those that place a tensor, or bytes before the data or in them."""
    path, data = place / "m.gguf", (place / "m.gguf").read_bytes()
    start, numbers = data_start(sound_gguf(place))
    draw = rng.random()
    if draw < 0.3:
        data = change_number(data, rng, pick(rng, numbers))
    elif draw < 0.5:
        data = change_number(data, rng, int(rng.integers(start)))
    elif draw < 0.8:
        data = change_bytes(data[:start], rng) + data[start:]
    else:
        data = data[:start] + change_bytes(data[start:], rng)
    path.write_bytes(data)
    return []


def sound_gguf(place: Path) -> Path:
    return place.parents[1] / make_gguf.__name__ / "m.gguf"


def wrong_gguf(place: Path, result: dict, whole: dict) -> str:
    """Neither data nor metadata have checksums: changed numbers, names and weights must be exactly the file's."""
    import gguf

    data, sound = (place / "m.gguf").read_bytes(), sound_gguf(place).read_bytes()
    start, _ = data_start(sound_gguf(place))
    tensors = dict(whole["tensors"])
    if data[:start] == sound[:start] and len(data) >= len(sound):
        reader, entries = gguf.GGUFReader(sound_gguf(place)), table(result["config"])
        places = {t.name: (t.data_offset, t.shape.tolist()[::-1]) for t in reader.tensors}
        for name, entry in entries.items():
            at, shape = places[_name_of(entry.key)]
            rows = np.frombuffer(data, np.float32, math.prod(shape), at).reshape(shape)
            if _name_of(entry.key).endswith(("attn_q.weight", "attn_k.weight")):  # pairs of rows, in llama.cpp's order
                pairs = rows.reshape(-1, result["config"].head_dim // 2, 2, rows.shape[1])
                rows = pairs.swapaxes(1, 2).reshape(rows.shape)
            tensors[name] = entry.to_ours(rows)
    if wrong := wrong_tensors(result["tensors"], tensors) or infinite(tensors):
        return wrong
    fields = {key: field.contents() for key, field in gguf.GGUFReader(place / "m.gguf").fields.items()}
    config = result["config"]
    if mistyped(config, type(config)):
        return f"a value of another type: {config}"
    ours = {**SIZES, "rms_norm_eps": "norm_eps"}
    for key, theirs in (REQUIRED | OPTIONAL).items():
        written = fields.get(f"llama.{key}")
        if theirs in ours and written is not None and np.float32(getattr(config, ours[theirs])) != np.float32(written):
            return f"{key} is {written} and {ours[theirs]} {getattr(config, ours[theirs])}"
    rope = fields.get("llama.rope.freq_base", 1e4), fields.get("llama.rope.scaling.factor", 1.0)
    if [np.float32(config.rope.theta), np.float32(config.rope.factor)] != [np.float32(number) for number in rope]:
        return f"{config.rope} for {rope}"
    names = fields["tokenizer.ggml.tokens"]
    if result["tokens"] != {name: i for i, name in enumerate(names)}:
        return "other tokens than the file's"
    ends = fields.get("tokenizer.ggml.eos_token_id")
    return "" if ends in result["stop_ids"] else f"texts end at {result['stop_ids']}, and the file says {ends}"


for name, spoil, wrong in (
    ("config.json", spoil_hf_config, wrong_hf),
    ("safetensors", lambda place, rng: spoil_safetensors(place / SHARD, rng), wrong_safetensors),
    ("index", lambda place, rng: spoil_json(place / SHARD_INDEX, rng), wrong_contents),
):
    KINDS[name] = Kind(make_hf, spoil, lambda place: convert(place, place), wrong)
KINDS["index"] = dataclasses.replace(
    KINDS["index"],
    wrong=lambda place, result, whole: (
        wrong_contents(place, result, whole)
        or "".join(
            f"reads {tensor.file}"
            for tensor in list(open_model(place).files.tensors.values())[:1]
            if tensor.file.parent.resolve() != place
        )
    ),
)
KINDS["pickle"] = Kind(make_bin, spoil_bin, lambda place: convert(place, place), wrong_contents, ("torch",))
KINDS["our config.json"] = Kind(make_ours, spoil_our_config, contents, wrong_ours)
KINDS["our directory, load"] = Kind(make_ours, spoil_ours, contents, wrong_ours)
KINDS["our directory, verify"] = Kind(make_ours, spoil_ours, verify, wrong_whole)
KINDS["GGUF"] = Kind(make_gguf, spoil_gguf, convert_gguf, wrong_gguf, ("gguf",))
