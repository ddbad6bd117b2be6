"""The kinds of input that are spoiled: how each is made, spoiled and read, and what makes an accepted result right.

An accepted result must be what the sound input gives or, where a value was changed, exactly the file's value in its
declared type. Bytes without a checksum may change: then the result must be what an independent reading says.
"""

import dataclasses
import functools
import json
import math
import re
import shlex
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import load_file
from support import datasets
from support.models import write_home
from support.scripts import FOLDER, SCRIPTS, SETTINGS
from support.tokenizers import CHATML, CHATML_TOKENS, CHUNK, as_llama_2, byte_level

from cepe_jax.commands import command_in
from cepe_jax.data.corpus import PrepareConfig, documents_of, no_counts
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import Sequences
from cepe_jax.data.recipes import Windows
from cepe_jax.data.sources import BYTE_ORDER_MARK, plan
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.evaluation.tasks import layouts
from cepe_jax.inference import context as contexts
from cepe_jax.inference.generate import Sampling
from cepe_jax.inference.template import Template
from cepe_jax.inference.text import TextModel, load, read_facts
from cepe_jax.model.rope import inverse_frequencies
from cepe_jax.settings import group_class_of, is_by_name, parse
from cepe_jax.weights.checkpoint import Checkpoints
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.files import SHARD_INDEX
from cepe_jax.weights.gguf import OPTIONAL, REQUIRED, _name_of
from cepe_jax.weights.hf_config import SIZES
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.source import load as load_weights
from cepe_jax.weights.source import open_model, open_ours, save
from fuzz.mutations import (
    TEXTS,
    Rng,
    change_bytes,
    change_json,
    change_lines,
    change_number,
    change_template,
    compressed_bomb,
    packed,
    pick,
    zstd,
)

SHARD = "model-00001-of-00001.safetensors"
KINDS: dict[str, "Kind"] = {}


@dataclass(frozen=True)
class Kind:
    """A kind of input. `make` fills a directory, and `spoil` changes it: one of the words it returns names the change.

    `act` reads it as the scripts do. `wrong` says what is wrong with a result, given the directory, the result and what
    the sound directory gives.
    """

    make: Callable[[Path], None]
    spoil: Callable[[Path, Rng], list[str]]
    act: Callable[[Path], Any]
    wrong: Callable[[Path, Any, Any], str]
    needs: tuple[str, ...] = ()  # packages


def spoil_bytes(path: Path, rng: Rng) -> list[str]:
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    return []


def spoil_json(path: Path, rng: Rng, share: float = 0.15) -> list[str]:
    """Change the content of a JSON file or, in this share of cases, its bytes."""
    if rng.random() < share:
        return spoil_bytes(path, rng)
    text, words = change_json(path.read_text(), rng)
    path.write_text(text)
    return [word for word in words if not word.isdecimal()]


def same(place: Path, result: Any, whole: Any) -> str:
    """Return "" for what the sound directory gives."""
    return "" if result == whole else "not what the sound one gives"


# Types that are declared


def mistyped(value: Any, kind: Any) -> bool:
    """Return True unless the value has the declared type: no bool for a number, no number that is not finite."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(value) if isinstance(value, kind) else ()
        return not fields or any(mistyped(getattr(value, field.name), field.type) for field in fields)
    if origin in (types.UnionType, typing.Union):
        return all(mistyped(value, one) for one in inner)
    if origin is typing.Literal:
        return value not in inner or isinstance(value, bool)
    if origin is tuple:
        return not isinstance(value, tuple) or any(mistyped(one, inner[0]) for one in value)
    if origin is dict:
        return not isinstance(value, dict) or any(mistyped(one, inner[1]) for one in value.values())
    if kind in (int, bool, str, type(None), None):
        return type(value) is not (type(None) if kind is None else kind)
    if kind is float:
        return type(value) not in (int, float) or not math.isfinite(value)
    return isinstance(kind, type) and not isinstance(value, kind if issubclass(kind, Path) else Path)


def wrong_config(config: Any) -> str:
    """Return what is wrong with a model's config: a type, or rotary frequencies that are no numbers."""
    if mistyped(config, type(config)):
        return f"a value of another type: {config}"
    for part in (config.decoder, config.encoder):
        numbers = [*inverse_frequencies(part.rope, part.head_dim)[0], inverse_frequencies(part.rope, part.head_dim)[1]]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            return f"frequencies are no numbers above 0: {part.rope}"
    return ""


def differing(written: Any, value: Any) -> bool:
    """Return True unless each number and text of the JSON stands in the value too, and nothing is taken for another."""
    if isinstance(written, dict):
        return not isinstance(value, dict) or any(k not in value or differing(v, value[k]) for k, v in written.items())
    if isinstance(written, list):
        return not isinstance(value, list | tuple) or list(map(repr, written)) != list(map(repr, value))
    return isinstance(written, bool) != isinstance(value, bool) or written != value


# Models: ours, Hugging Face's as safetensors and as pickles, GGUF


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
        if not np.isfinite(array.astype(np.float32)).all():
            return f"{name} has numbers that are not finite"
    return ""


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
    return wrong_tensors(result["tensors"], expected) or wrong_contents(
        place, result | {"tensors": {}}, whole | {"tensors": {}}
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
    return spoil_json(place / "config.json", rng)


def wrong_ours(place: Path, result: dict, whole: dict) -> str:
    """Loading reads no hashes: what is there must be exactly what the files say, and numbers be finite."""
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
    if wrong := wrong_tensors(result["tensors"], tensors):
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


# Settings: files and the command line


def shown_arguments() -> list[tuple[str, str, list[str]]]:
    """Return script, command and arguments of each example in the scripts' help."""
    shown = []
    for script, module in SCRIPTS.items():
        for example in re.findall(rf"python scripts/{script} (.*)", module.__doc__.replace("\\\n", " ")):
            word, arguments = command_in(module.COMMANDS, shlex.split(example))
            words = [re.sub(r"^configs/", f"{FOLDER.parent}/configs/", argument) for argument in arguments]
            if all(argument.startswith("--") or argument.endswith(".yaml") for argument in words):
                shown.append((script, word, words))
    return shown


SHOWN = shown_arguments()


def settings_in(config_class: Any, group: str = "") -> list[tuple[str, Any]]:
    """Return name and type of every setting of a class, those of groups by their dotted names."""
    settings = []
    for field in config_class.__dataclass_fields__.values():
        inner = group_class_of(field.type)
        if inner is not None and is_by_name(field.type):
            settings += settings_in(inner, f"{group}{field.name}.a.")
        elif inner is not None:
            settings += settings_in(inner, f"{group}{field.name}.")
        else:
            settings.append((f"{group}{field.name}", field.type))
    return settings


def spoil_setting(place: Path, rng: Rng) -> list[str]:
    """Choose an example, one of its command's settings and a text for it, on the command line or in a file."""
    script, word, arguments = pick(rng, SHOWN)
    name, kind = pick(rng, settings_in(SETTINGS[script, word]))
    case = {"script": script, "word": word, "arguments": arguments, "name": name, "text": pick(rng, TEXTS)}
    (place / "case.json").write_text(json.dumps(case))
    return [part for part in (name, *name.split(".")) if len(part) > 1]


def spoil_yaml(place: Path, rng: Rng) -> list[str]:
    """Write a setting into a file, or change bytes of a file that we show."""
    words = spoil_setting(place, rng)
    case = json.loads((place / "case.json").read_text())
    path = place / "settings.yaml"
    files = [argument for argument in case["arguments"] if argument.endswith(".yaml")]
    if files and rng.random() < 0.5:
        path.write_bytes(change_bytes(Path(files[0]).read_bytes(), rng))
        case, words = case | {"name": "", "text": ""}, re.findall(r"[\w-]{3,}", path.read_text(errors="replace"))
    else:
        groups = case["name"].split(".")
        lines = [f"{'  ' * depth}{group}:" for depth, group in enumerate(groups)]
        path.write_text("\n".join(lines) + f" {case['text']}\n", "utf-8", "surrogatepass")
    kept = [one for one in case["arguments"] if not one.endswith(".yaml") and not one.startswith(f"--{case['name']}=")]
    case["arguments"] = [*(one for one in kept if one != "--config"), f"--config={path}"]
    (place / "case.json").write_text(json.dumps(case | {"yaml": True}))
    return words


def parse_case(place: Path) -> Any:
    if not (place / "case.json").exists():
        return None
    case = json.loads((place / "case.json").read_text())
    more = [] if "yaml" in case else [f"--{case['name']}={case['text']}"]
    return parse(SETTINGS[case["script"], case["word"]], [*case["arguments"], *more])


NOTHING = object()


def meant(kind: Any, text: str, in_file: bool) -> Any:
    """Return the value that a person means by the text of a setting; NOTHING for a text that has no such meaning."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if text in ("", "~", "null") and (in_file or str not in inner and Path not in inner):
            return None
        return meant(next(one for one in inner if one is not type(None)), text, in_file)
    if kind in (str, Path):
        return kind(text)
    if kind is bool:
        return {"true": True, "on": True, "yes": True, "false": False, "no": False, "off": False}.get(
            text.lower(), NOTHING
        )
    if kind is int:
        digits = text.replace("_", "")
        return int(digits, 16 if "x" in digits else 10) if re.fullmatch(r"[+-]?(0x)?\d+", digits) else NOTHING
    if kind is float:
        number = float(text.replace("_", "")) if re.fullmatch(r"[+-]?[\d_]*\.?\d+(e\d+)?", text) else math.nan
        number = 16.0 if text == "0x10" else number
        return number if math.isfinite(number) else NOTHING
    if origin is tuple:
        items = re.fullmatch(r"\[(.*)\]", text)
        parts = [part.strip() for part in (items[1].split(",") if items else [text]) if part.strip()]
        values = tuple(meant(inner[0], part, True) for part in parts)
        return NOTHING if NOTHING in values else values
    return NOTHING


def wrong_setting(place: Path, result: Any, whole: Any) -> str:
    if not (place / "case.json").exists():
        return ""
    case = json.loads((place / "case.json").read_text())
    if mistyped(result, type(result)):
        return f"{case['name']}={case['text'][:40]!r}: a value of another type in {result}"
    kinds = dict(settings_in(SETTINGS[case["script"], case["word"]]))
    kind = kinds.get(case["name"])
    if typing.get_origin(kind) is dict or not case["name"]:  # the user's own names, or changed bytes: types alone
        return ""
    value = NOTHING
    for prefix in (
        "",
        "models.",
        "perplexity.perplexity.",
        "tasks.task.",
    ):  # where runs of one model put their settings
        names = f"{prefix}{case['name']}".replace("models.model.", "models.model.").split(".")
        found = result
        for step in names:
            found = found.get(step, NOTHING) if isinstance(found, dict) else getattr(found, step, NOTHING)
        value = found if value is NOTHING else value
    text, in_file = case["text"], "yaml" in case
    if isinstance(value, str | Path) or kind in (str, Path, str | None, Path | None):
        texts = [text, yaml.safe_load(text)] if in_file else [text]
        return (
            "" if value in texts or str(value) in map(os_path, texts) else f"{case['name']}={text[:40]!r} is {value!r}"
        )
    expected = meant(kind, text, in_file)
    if expected is NOTHING or repr(value) != repr(type(value)(expected) if type(value) is float else expected):
        return f"{case['name']}={text[:40]!r} is {value!r}"
    return ""


def os_path(text: Any) -> str:
    return str(Path(text)) if isinstance(text, str) else ""


def make_nothing(to: Path) -> None:
    """Settings are chosen when they are spoiled."""


KINDS["YAML"] = Kind(make_nothing, spoil_yaml, parse_case, wrong_setting)
KINDS["command line"] = Kind(make_nothing, spoil_setting, parse_case, wrong_setting)


# Tokenizers and chat templates

PROBES = ["Hello, is it a test?\n  007 naïve 🙂", " <|im_start|>user </s>", ""]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "</s><|im_end|> a"}]


def make_tokenizer_json(to: Path) -> None:
    byte_level(to / "tokenizer.json", ("<s>", "</s>", *CHATML_TOKENS), 330)
    added = {str(i): {"content": name, "special": True} for i, name in enumerate(("<s>", "</s>", *CHATML_TOKENS))}
    settings = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    settings |= {"chat_template": [{"name": "default", "template": CHATML}], "legacy": False, "add_bos_token": True}
    (to / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    (to / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(CHATML_TOKENS)}))
    (to / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3}))


def make_tokenizer_model(to: Path) -> None:
    make_tokenizer_json(to)
    as_llama_2(to / "tokenizer.model")
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (to / name).unlink()


def read_tokenizer(place: Path) -> tuple[Tokenizer, list[list[int]], list[str]]:
    tokenizer = Tokenizer(place)
    ids = [tokenizer.encode(text, bos=True, eos=True) for text in PROBES]
    ids += [tokenizer.encode_special(text) for text in PROBES]
    return tokenizer, ids, [tokenizer.decode(row) for row in ids]


def read_chat(place: Path) -> tuple[Tokenizer, list[list[int]], list[str]]:
    """Read the tokenizer and a conversation by its template."""
    tokenizer, ids, texts = read_tokenizer(place)
    template = Template(tokenizer)
    escape = template.escape_for(MESSAGES)
    text = template.render(MESSAGES, escape)
    return tokenizer, [*ids, tokenizer.encode_special(text, escape)], [*texts, text]


def wrong_ids(place: Path, result: tuple, whole: tuple) -> str:
    """Check that ids are ids, and the ends of texts those that the settings name."""
    tokenizer, ids, texts = result
    for i in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.begin, *tokenizer.special.values(), *sum(ids, [])):
        if type(i) is not int or not 0 <= i < tokenizer.vocab_size:
            return f"an id is {i!r}, and there are {tokenizer.vocab_size}"
    if not all(isinstance(text, str) for text in texts):
        return "no texts"
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    for role, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        name = settings.get(role)
        name = name.get("content", name) if isinstance(name, dict) else name
        if name not in (None, "") and tokenizer.special.get(name if isinstance(name, str) else None) != i:
            return f"{role} is {name!r} and its id {i}"
    return ""


def wrong_vocabulary(place: Path, result: tuple, whole: tuple) -> str:
    """A tokenizer.json has no checksum: each token must have the id that the file gives it."""
    written, ours = json.loads((place / "tokenizer.json").read_text()), result[0]._impl.vocabulary()
    added = {token["content"]: token["id"] for token in written.get("added_tokens") or []}
    for name, i in (written["model"]["vocab"] | added).items():
        if ours.get(name) != i or type(i) is not int:
            return f"{name!r} is {ours.get(name)!r}, and the file has {i!r}"
    return wrong_ids(place, result, whole)


def wrong_pieces(place: Path, result: tuple, whole: tuple) -> str:
    """A tokenizer.model has no checksum: pieces and scores must be those that protobuf reads."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((place / "tokenizer.model").read_bytes())
    if list(result[0]._impl.table()) != [(piece.piece, piece.score) for piece in model.pieces]:
        return "other pieces than the file's"
    return wrong_ids(place, result, whole)


def spoil_beside(place: Path, rng: Rng) -> list[str]:
    names = ["tokenizer_config.json"] * 4 + ["special_tokens_map.json", "added_tokens.json"]
    return spoil_json(place / pick(rng, names), rng)


def spoil_template(place: Path, rng: Rng) -> list[str]:
    (place / "chat_template.jinja").write_bytes(change_template(CHATML, rng))
    return []


KINDS["tokenizer.model"] = Kind(
    make_tokenizer_model, lambda place, rng: spoil_bytes(place / "tokenizer.model", rng), read_tokenizer, wrong_pieces
)
KINDS["tokenizer.json"] = Kind(
    make_tokenizer_json,
    lambda place, rng: spoil_json(place / "tokenizer.json", rng),
    read_tokenizer,
    wrong_vocabulary,
)
KINDS["tokenizer_config.json"] = Kind(make_tokenizer_json, spoil_beside, read_chat, wrong_ids)
KINDS["chat template"] = Kind(make_tokenizer_json, spoil_template, read_chat, wrong_ids)


# Data: raw documents, tasks, datasets

DOCUMENTS = [{"text": f"document {i} of a\ntale", "meta": {"source": f"s{i % 2}"}} for i in range(8)]
SUFFIXES = "", ".gz", ".zst"


def make_documents(to: Path) -> None:
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()
    for suffix in SUFFIXES:
        (to / f"a.jsonl{suffix}").write_bytes(packed(lines, suffix))
        (to / f"b.txt{suffix}").write_bytes(packed("One naïve text.\n".encode() * 9, suffix))


def spoil_documents(place: Path, rng: Rng) -> list[str]:
    """Change bytes, a line, or let a small file unfold to 4 GiB."""
    path = place / pick(rng, sorted(path.name for path in place.iterdir()))
    if path.suffix in SUFFIXES and rng.random() < 0.1:
        path.write_bytes(compressed_bomb(path.suffix))
        path.rename(path.with_name(f"bomb-{path.name}"))
    elif "jsonl" in path.name and rng.random() < 0.4:
        lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
        path.write_bytes(packed(change_lines(lines, rng).encode("utf-8", "surrogatepass"), path.suffix))
    else:
        spoil_bytes(path, rng)
    return []


def read_documents(place: Path) -> tuple[dict[str, str], list[str]]:
    """Return the documents by name, and what is wrong with others."""
    config = PrepareConfig(input=place, out=place / "out", patterns=("**/*.*",), bad_share=1.0)
    counts, read = no_counts(), {}
    for unit in plan(config.input, config.patterns, (), 1 << 28):
        for _, name, _, content in documents_of(config, unit, counts):
            read[name] = content if len(content) < 1 << 20 else "long"
    return read, counts["faults"]


def wrong_documents(place: Path, result: tuple, whole: tuple) -> str:
    """A document must be what Python's own decompression and JSON read; of the others there must be one line each."""
    expected = {}
    for path in place.iterdir():
        if path.name.startswith("bomb"):
            continue
        data = path.read_bytes()
        if path.suffix == ".gz":
            import gzip

            data = gzip.decompress(data)
        data = zstd().decompress(data) if path.suffix == ".zst" else data
        at = 0
        for line in (
            data.splitlines(keepends=True) if False else [*data.split(b"\n")] if "jsonl" in path.name else [data]
        ):
            name = f"{path.name}:{at}" if "jsonl" in path.name else path.name
            at += len(line) + 1
            try:
                text = line.decode().removeprefix(BYTE_ORDER_MARK)
                expected[name] = json.loads(text)["text"] if "jsonl" in path.name else text
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
    read, faults = result
    for name, text in read.items():
        if text != expected.get(name) and not name.startswith("bomb"):
            return f"{name} is {text[:60]!r}, and the file has {expected.get(name, '')[:60]!r}"
    if lost := [name for name, text in whole[0].items() if expected.get(name) == text and read.get(name) != text]:
        return f"{', '.join(lost)} are sound and lost"
    if any("\n" in fault or str(place) not in fault for fault in faults):
        return f"faults: {faults}"
    return ""


QUESTION = {
    "id": 7,
    "question": "Who?",
    "answers": ["B"],
    "choices": ["A", "B"],
    "contexts": ["one", "two"],
    "scores": [2, 0.5],
}
QUESTION |= {"demonstrations": [{"question": "Q", "answer": "A", "contexts": ["c"]}, {"question": "R", "answer": "B"}]}
PASSAGE = {"title": "T", "text": "one", "score": "1.5"}
RETRIEVED = {"question": "Who?", "answers": ["B"], "ctxs": [PASSAGE, PASSAGE | {"score": 0.5}]}
TASKS = {"records": (layouts.RECORDS, QUESTION), "nq": (layouts.LAYOUTS["nq"], RETRIEVED)}


def make_tasks(to: Path) -> None:
    for name, (_, line) in TASKS.items():
        (to / name).mkdir()
        (to / name / "test.jsonl").write_text("".join(json.dumps(line | {"id": i}) + "\n" for i in range(3)))


def spoil_tasks(place: Path, rng: Rng) -> list[str]:
    path = place / pick(rng, list(TASKS)) / "test.jsonl"
    if rng.random() < 0.3:
        return spoil_bytes(path, rng)
    path.write_text(change_lines(path.read_text(), rng))
    return []


def read_tasks(place: Path) -> dict[str, list]:
    return {name: layouts.load(place / name, layout, False)[0] for name, (layout, _) in TASKS.items()}


def wrong_tasks(place: Path, result: dict, whole: dict) -> str:
    """Each record must have the fields that JSON reads in its line, in their declared types."""
    for name in TASKS:
        lines = [json.loads(line) for line in (place / name / "test.jsonl").read_text().splitlines() if line.strip()]
        for line, record in zip(lines, result[name], strict=True):
            if mistyped(record, type(record)):
                return f"another type in {record}"
            line = {"choices": [], "demonstrations": []} | line
            if "ctxs" in line:
                texts = [f"{one['title']}\n{one['text']}" if one.get("title") else one["text"] for one in line["ctxs"]]
                scores = [one.get("score") for one in line["ctxs"]]
                line = line | {
                    "contexts": texts,
                    "scores": None if None in scores else [float(score) for score in scores],
                }
                answers = line.get("answers", line.get("answer", line.get("possible_answers")))
                line["answers"] = [one for one in ([answers] if isinstance(answers, str) else answers) if one != ""]
            for field in ("question", "answers", "choices", "contexts"):
                if differing(line.get(field, []), getattr(record, field)):
                    return f"{field} is {getattr(record, field)!r} for {line.get(field)!r}"
            if (line.get("scores") and [float(score) for score in line["scores"]]) != (
                record.scores and list(record.scores)
            ):
                return f"scores are {record.scores} for {line.get('scores')}"
            if len(record.demonstrations) != len(line["demonstrations"]):
                return f"{len(record.demonstrations)} demonstrations"
    return ""


def make_dataset(to: Path) -> None:
    tokenizer = datasets.make_tokenizer(to)
    rng = np.random.default_rng(0)
    path = datasets.write_sequences(to / "data", list(rng.integers(3, 290, (12, 17))), 16, tokenizer)
    shutil.copytree(path, to, dirs_exist_ok=True)
    shutil.rmtree(path)


def spoil_dataset(place: Path, rng: Rng) -> list[str]:
    names = [path.name for path in place.iterdir() if path.is_file() and path.name != "report.md"]
    path = place / pick(rng, sorted(names) + ["dataset.json"] * 4)
    return spoil_json(path, rng) if path.suffix == ".json" else spoil_bytes(path, rng)


def read_dataset(place: Path) -> dict:
    sequences = Sequences(place, Windows(ExampleConfig(window=8, num_chunks=1, chunk_length=8)))
    read = [sequences[number] for number in range(len(sequences))]
    rows = [(np.asarray(record["tokens"]).tolist(), record["name"], record["domain"]) for record in read]
    lengths = [sequences.records.lengths(shard) for shard in range(len(sequences.records.facts["shards"]))]
    lengths = [{domain: (a.tolist(), b.tolist()) for domain, (a, b) in of.items()} for of in lengths]
    return {"rows": rows, "lengths": lengths, "tokenizer": sequences.records.tokenizer.fingerprint()}


KINDS["raw documents"] = Kind(make_documents, spoil_documents, read_documents, wrong_documents)
KINDS["task file"] = Kind(make_tasks, spoil_tasks, read_tasks, wrong_tasks)
KINDS["dataset"] = Kind(make_dataset, spoil_dataset, read_dataset, same)


# What runs write and read again: contexts, checkpoints

IDENTITY = {"dtype": "float32", "tokenizer": "t", "encoder": "e"}


def make_contexts(to: Path) -> None:
    states = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    passages = tuple(contexts.Passage(f"{number:064x}", array, 4, 0) for number, array in enumerate(states))
    contexts.ContextCache(IDENTITY, passages).save(to / "contexts")


def spoil_contexts(place: Path, rng: Rng) -> list[str]:
    """Change the file, or its facts under a hash that is right again."""
    path = place / "contexts"
    if rng.random() < 0.5:
        return spoil_safetensors(path, rng)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    facts, words = change_json(header["__metadata__"]["facts"], rng)
    header["__metadata__"] = {"facts": facts, "sha256": contexts._sha256(facts, stored(path))}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    return words


def read_contexts(place: Path) -> list[tuple]:
    cache = contexts.ContextCache.load(place / "contexts", IDENTITY)
    sizes = cache.num_tokens, cache.nbytes
    return [
        sizes,
        *((one.digest, one.chunk_length, one.chunk_positions, one.states_LE.tobytes()) for one in cache.passages),
    ]


def wrong_contexts(place: Path, result: list[tuple], whole: list[tuple]) -> str:
    """The hash that a spoiled file has may be right: then passages must be exactly those of its facts."""
    data = (place / "contexts").read_bytes()
    facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["facts"])
    states, chunks = stored(place / "contexts"), facts.get("chunks", [[0, 0]] * len(facts["passages"]))
    expected = [
        (name, *map(int, chunk), states[name].tobytes()) for name, chunk in zip(facts["passages"], chunks, strict=True)
    ]
    if any(type(number) is not int or number < 0 for chunk in chunks for number in chunk):
        return f"chunks of {chunks}"
    return "" if result[1:] == expected and facts["identity"] == IDENTITY else f"passages of {facts}"


def make_checkpoints(to: Path) -> None:
    checkpoints = Checkpoints(to, {"run": 1})
    for step in (2, 4):
        checkpoints.save(step, state_of(step))
    checkpoints.close()


def state_of(step: int) -> dict:
    return {"a": np.arange(300, dtype=np.float32) + step, "b": {"c": np.ones(5, ml_dtypes.bfloat16)}}


def spoil_checkpoints(place: Path, rng: Rng) -> list[str]:
    files = sorted(path for path in place.rglob("*") if path.is_file())
    path = pick(rng, files)
    try:
        return [] if rng.random() < 0.5 else spoil_json(path, rng, 0) and []
    except (ValueError, LookupError):
        return spoil_bytes(path, rng)


def read_checkpoints(place: Path) -> tuple[int, list[bytes]]:
    import jax
    import jax.numpy as jnp

    checkpoints = Checkpoints(place, {"run": 1})
    try:
        step, state = checkpoints.restore(jax.tree.map(jnp.asarray, state_of(0)))
    finally:
        checkpoints.close()
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


KINDS["contexts file"] = Kind(make_contexts, spoil_contexts, read_contexts, wrong_contexts)
KINDS["checkpoint"] = Kind(make_checkpoints, spoil_checkpoints, read_checkpoints, same)


# Prompts and sizes

PROMPTS = ["", "a", "Hello there! <a>\n\nWhat is it?", "\x00", "é🙂", "\ud800", "</s><|im_start|>", "x" * 5_000]
PROMPTS += ["".join(map(chr, range(0xE000, 0xF900)))]
SIZES_ASKED = [1, 2, 3, 40, 0, -1, 47, 48, 10**12, 1 << 31, 10**30]


def make_model(to: Path) -> None:
    make_ours(to)


def spoil_prompt(place: Path, rng: Rng) -> list[str]:
    sound = {"prompt": "Hello there! <a>", "chat": False, "max_new_tokens": 3, "stop": [], "overflow": "error"}
    case = sound | {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "chunk_length": CHUNK}
    choices = {
        "prompt": PROMPTS,
        "chat": [True],
        "max_new_tokens": SIZES_ASKED,
        "top_k": SIZES_ASKED,
        "top_p": [0.5, 0.0, 2.0, 1e-40],
        "stop": [["a"], ["", "a"], [""], ["\ud800"], ["a" * 5_000], ["e", "\n"]],
        "overflow": ["truncate_left", "passages"],
        "chunk_length": [0, -1, 10**12],
    }
    for name in rng.choice(list(choices), 2, replace=False):
        case[name] = pick(rng, choices[name])
    (place / "case.json").write_text(json.dumps(case))
    words = ["prompt", "text", "max_new_tokens", "top_k", "top_p", "stop", "overflow", "chunk_length", "conversation"]
    return [*words, "message", "window"]


@functools.cache
def model_at(path: Path) -> TextModel:
    return load(path)


def answer(place: Path, plain: bool = False) -> str:
    """Return the text that the case asks for; `plain`: without settings that must not change it."""
    if not (place / "case.json").exists():
        return ""
    case = json.loads((place / "case.json").read_text())
    model = model_at(place.parents[1] / make_model.__name__)
    limits = {"max_new_tokens": case["max_new_tokens"]}
    if not plain:
        sampling = Sampling(case["temperature"], case["top_k"], case["top_p"])
        limits |= {"sampling": sampling, "stop": tuple(case["stop"])}
    where = {"overflow": case["overflow"], "chunk_length": case["chunk_length"]}
    if case["chat"]:
        return "".join(model.chat(case["prompt"], **where).say(case["prompt"], **limits))
    return model.generate(case["prompt"], **limits, **where)


def wrong_answer(place: Path, result: str, whole: str) -> str:
    """A greedy answer must be the one without stop strings up to the first of them, whatever else is set."""
    expected = answer(place, plain=True)
    stops = json.loads((place / "case.json").read_text())["stop"] if (place / "case.json").exists() else []
    expected = expected[: min([len(expected), *(expected.find(stop) for stop in stops if stop in expected)])]
    return "" if result == expected else f"{result!r} for {expected!r}"


KINDS["prompts and sizes"] = Kind(make_model, spoil_prompt, answer, wrong_answer)
