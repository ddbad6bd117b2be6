"""GGUF files, llama.cpp's format: config, weights in float32, tokenizer.

The metadata become the Hugging Face config.json that says the same, and torch's keys get GGUF's names: the config is
made, and each tensor put in our layout, by what reads Hugging Face's directories.
"""

import math
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from msgspec import Meta

from cepe_jax.config import RopeConfig
from cepe_jax.data import tokenizer_gguf
from cepe_jax.data.tokenizer import file_in
from cepe_jax.model.rope import inverse_frequencies
from cepe_jax.parsing import shortened, typed
from cepe_jax.weights.directory import check_names, copy_assets
from cepe_jax.weights.files import DOWNLOAD
from cepe_jax.weights.hf_config import LLAMA, OF_MODEL_TYPE, ROPE_FIELDS, facts_of, read_decoder
from cepe_jax.weights.huggingface import table
from cepe_jax.weights.torch_keys import Entry

SUFFIX = ".gguf"  # of a file in this format: everything else that holds a model is a directory

# The families as which the files of an architecture are read; `llama` is Mistral's too.
ARCHITECTURES = {"llama": LLAMA, "qwen2": OF_MODEL_TYPE["qwen2"], "qwen3": OF_MODEL_TYPE["qwen3"]}
# Metadata after the architecture's name: config.json's key.
REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
WIDTHS = "rope.dimension_count", "attention.value_length"  # must be a head's
# Keys, each with the value that changes nothing; llama.cpp (0.5.0) reads no beta of YaRN, whatever a Llama's file says.
HARMLESS = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.yarn_beta_fast": RopeConfig.beta_fast,
    "rope.scaling.yarn_beta_slow": RopeConfig.beta_slow,
}
NOTES = {"tensor_data_layout", "rope.scaling.finetuned"}  # change nothing
# What ends a text for llama.cpp: ids after `tokenizer.ggml.`, and tokens of these names, which many files name nowhere.
ENDS = "eos_token_id", "eot_token_id", "eom_token_id"
IDS = {*ENDS, *(f"{role}_token_id" for role in tokenizer_gguf.ROLES)}
END_NAMES = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}
END_NAMES |= {"<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}

# Torch's key: the tensor's name; of a layer after `model.layers.N.` and `blk.N.`.
KEYS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
TURNED = "attn_q.weight", "attn_k.weight"  # what rotary positions turn: in `llama` files rows in llama.cpp's order
DIVISORS = "rope_freqs.weight"  # of the rotary frequencies, in files of Llama 3.1 and later
AGAIN = "convert the model to GGUF again"
LONGEST_ARRAY = 1 << 22  # values in the metadata: several times the merges of any tokenizer
TokenType = Annotated[int, Meta(ge=0, le=tokenizer_gguf.BYTE)]
# The metadata that are read; `_as_hf` refuses others of the architecture.
OF_MODEL = dict.fromkeys((*REQUIRED, *OPTIONAL, *WIDTHS, "rope.scaling.original_context_length"), int)
OF_MODEL |= dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"), float)
OF_MODEL |= {"rope.scaling.type": str}
Metadata = TypedDict(
    "Metadata",
    {"general.architecture": str, "split.count": int}
    | {f"{name}.{key}": kind for name in ARCHITECTURES for key, kind in OF_MODEL.items()}
    | {f"tokenizer.{key}": str for key in ("ggml.model", "ggml.pre", "chat_template")}
    | {f"tokenizer.ggml.{key}": list[str] for key in ("tokens", "merges")}
    | {"tokenizer.ggml.token_type": list[TokenType], "tokenizer.ggml.scores": list[float]}
    | {f"tokenizer.ggml.{key}": int for key in IDS}
    | {f"tokenizer.ggml.{key}": bool for key in ("add_bos_token", "add_space_prefix", "remove_extra_whitespaces")},
    total=False,
)
PIECE = 1 << 24  # numbers that are dequantised at once: the library takes several times their room


class GgufTensor(NamedTuple):
    """The place of a tensor in the file, and its type; `kind` is the library's GGMLQuantizationType."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int  # bytes


class Gguf:
    """A GGUF file of a Llama; tensors are read under our names, in our layout."""

    def __init__(self, path: Path):
        self.path = path
        metadata, self.tensors = _contents(self.path)
        self.metadata = metadata | typed(metadata, Metadata, str(path), AGAIN)
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: architecture {shortened(self.architecture)}: {known} are read")
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one of {self.metadata['split.count']} parts: llama-gguf-split --merge them")
        hf = self._as_hf()
        self.config = read_decoder(ARCHITECTURES[self.architecture], hf, str(path))
        self.facts = facts_of(hf, str(path))
        width = self.config.head_dim
        for key in WIDTHS:
            if (stored := self.metadata.get(name := f"{self.architecture}.{key}", width)) != width:
                raise ValueError(f"{path}: {name} {stored} is not computed here: only a head's width, {width}, is")
        if DIVISORS in self.tensors and (shape := self.tensors[DIVISORS].shape) != (width // 2,):
            raise ValueError(f"{path}: {DIVISORS} is {list(shape)}, by its metadata [{width // 2}]: {AGAIN}")

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries by our names. All names and shapes of the file are checked."""
        entries = {name: replace(entry, key=_name_of(entry.key)) for name, entry in table(self.config).items()}
        check_names(self.path, {entry.key for entry in entries.values()}, set(self.tensors) - {DIVISORS})
        for entry in entries.values():
            if (shape := list(self.tensors[entry.key].shape)) != list(entry.shape):
                raise ValueError(
                    f"{self.path}: {entry.key} is {shape}, by its metadata {list(entry.shape)}: one of them is wrong"
                )
        return entries

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor in float32, or a slice of it; all of it is dequantised."""
        entry = self.entries[name]
        rows = self._dequantized(entry.key)
        if entry.key.endswith(TURNED) and self.architecture == "llama":
            # llama.cpp turns the pairs (2i, 2i + 1), where we turn (i, i + H/2): in its files each head's rows are so.
            pairs = rows.reshape(-1, self.config.head_dim // 2, 2, rows.shape[1])
            rows = pairs.swapaxes(1, 2).reshape(rows.shape)
        return entry.to_ours(rows)[index]

    def write_assets(self, to: Path) -> None:
        """The tokenizer is in directory `to`: from the metadata, or the files beside this one where that cannot be."""
        found = self._after("tokenizer.ggml.")
        kind, cuts = found.get("model"), found.get("pre")
        if tokenizer_gguf.is_known(kind, cuts):
            tokenizer_gguf.write(found, self.metadata.get("tokenizer.chat_template"), to, str(self.path))
        elif file_in(self.path.parent) is not None:
            copy_assets(self.path.parent, to)
        else:
            mend = "put the model's own tokenizer.json beside it"
            raise ValueError(f"{self.path}: its tokenizer, {kind!r} with {cuts!r}, is of no kind read here: {mend}")

    def _after(self, prefix: str) -> dict[str, Any]:
        """The metadata whose names begin so, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def _as_hf(self) -> dict:
        """The config.json that says the same; ValueError for what is missing, and what it has no words for."""
        own, of_tokenizer = self._after(f"{self.architecture}."), self._after("tokenizer.ggml.")
        if missing := set(REQUIRED) - set(own):
            raise ValueError(f"{self.path} lacks {self.architecture}.{min(missing)}: {AGAIN}")
        for key, value in HARMLESS.items():
            if own.get(key, value) != value:
                stored = shortened(own[key])
                raise ValueError(
                    f"{self.path}: {self.architecture}.{key} {stored} is not computed here: only {value!r} is"
                )
        if unknown := set(own) - {*REQUIRED, *OPTIONAL, *ROPE, *WIDTHS, *HARMLESS, *NOTES}:
            key = shortened(f"{self.architecture}.{min(unknown)}", quoted=False)
            raise ValueError(f"{self.path}: {key} is unknown here, and may change the model")
        hf = {theirs: own[key] for key, theirs in (REQUIRED | OPTIONAL).items() if key in own}
        hf.setdefault("num_key_value_heads", hf["num_attention_heads"])  # as llama.cpp does, whatever the family
        hf.setdefault("head_dim", hf["hidden_size"] // max(hf["num_attention_heads"], 1))
        if "bos_token_id" in of_tokenizer:
            hf["bos_token_id"] = of_tokenizer["bos_token_id"]
        self._check_tokenizer(of_tokenizer)
        ends = {of_tokenizer[key] for key in ENDS if key in of_tokenizer}
        ends |= {i for i, name in enumerate(of_tokenizer.get("tokens", ())) if name in END_NAMES}
        if ends:
            hf["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
        if "tokens" in of_tokenizer:
            hf.setdefault("vocab_size", len(of_tokenizer["tokens"]))
        rope = {"rope_theta": RopeConfig.theta, "rope_type": "none"}
        rope |= {theirs: own[key] for key, theirs in ROPE.items() if key in own}
        if rope["rope_type"] == "none":
            rope["rope_type"] = "default"
        if DIVISORS in self.tensors:
            rope = self._llama3(rope)
        tied = KEYS["lm_head.weight"] not in self.tensors
        family = ARCHITECTURES[self.architecture]
        return hf | {"model_type": family.model_type, "tie_word_embeddings": tied, "rope_parameters": rope}

    def _check_tokenizer(self, tokenizer: dict) -> None:
        """Raise ValueError for an id without a token, and for a list that has no value for each token."""
        if (tokens := tokenizer.get("tokens")) is None:
            return
        for key, value in tokenizer.items():
            if key in IDS and not 0 <= value < len(tokens):
                raise ValueError(f"{self.path}: tokenizer.ggml.{key} {value} is not one of {len(tokens)} ids: {AGAIN}")
            if key in ("token_type", "scores") and (len(value) != len(tokens) or not np.isfinite(value).all()):
                raise ValueError(f"{self.path}: tokenizer.ggml.{key} has no number for each of its tokens: {AGAIN}")

    def _llama3(self, rope: dict) -> dict:
        """Rope parameters of Llama 3.1 and later, of which a file has only what each frequency is divided by."""
        divisors = self._dequantized(DIVISORS)
        fields = {"theta": rope["rope_theta"], "factor": float(divisors.max()), "original_length": 8192}
        config = typed(fields | {"scaling": "llama3"}, RopeConfig, f"{self.path}: {DIVISORS}", AGAIN)
        plain, slowed = (inverse_frequencies(c, 2 * len(divisors))[0] for c in (RopeConfig(config.theta), config))
        if rope["rope_type"] != "default" or not np.allclose(plain / slowed, divisors, rtol=1e-4):
            raise ValueError(f"{self.path}: {DIVISORS} is not computed here: only Llama 3.1's, 3.2's and 3.3's are")
        fields = {key: getattr(config, ours) for key, ours in ROPE_FIELDS["llama3"].items()}
        return {"rope_theta": config.theta, "rope_type": "llama3"} | fields

    def _dequantized(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        stored = self.tensors[name]
        count = math.prod(stored.shape[:-1])
        width = stored.size // count  # of a row, in bytes
        out = np.empty((count, stored.shape[-1]), np.float32)
        step = max(PIECE // out.shape[1], 1)
        for start in range(0, count, step):
            rows = out[start : start + step]
            packed = np.fromfile(self.path, np.uint8, len(rows) * width, offset=stored.offset + start * width)
            try:
                rows[...] = dequantize(packed.reshape(-1, width), stored.kind)
            except NotImplementedError as error:
                kind = stored.kind.name
                raise ValueError(f"{self.path}: {name} is {kind}: the gguf library cannot read it") from error
        return out.reshape(stored.shape)


def _name_of(key: str) -> str:
    """GGUF's name of torch's key."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", key):
        return f"blk.{layer[1]}.{BLOCK[layer[2]]}"
    return KEYS[key]


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata, and where the tensors are. The file is closed again: its mapped pages would count as resident."""
    if not path.is_file():
        raise ValueError(f"no file {path}: give a GGUF file")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a GGUF file: pip install '.[gguf]' in the checkout, to read it") from error

    class Reader(gguf.GGUFReader):
        """The library's reader, which would believe any length of an array and read on after the file's end."""

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == gguf.GGUFValueType.ARRAY and (n := self._get(orig_offs + 4, np.uint64)[0]) > LONGEST_ARRAY:
                raise ValueError(f"an array of {n} values")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        reader = Reader(path)
        metadata = {key: _value_of(field) for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        reason = shortened(" ".join(str(error).split()), quoted=False)
        raise ValueError(f"{path} is not a whole GGUF file ({reason}): {DOWNLOAD}") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{path} is a big-endian file: convert the model again for this machine")
    tensors, end, padded, alignment = {}, reader.data_offset, reader.data_offset, int(reader.alignment)
    for t in reader.tensors:
        name, shape = shortened(t.name, quoted=False), tuple(t.shape.tolist()[::-1])  # the last axis comes first there
        if not shape or 0 in shape:
            raise ValueError(f"{path}: {name} is {list(shape)}, without a number: {DOWNLOAD}")
        if t.data_offset != padded:
            raise ValueError(f"{path}: {name} is at {t.data_offset:,}, by its neighbours at {padded:,}: {DOWNLOAD}")
        tensors[t.name] = GgufTensor(shape, t.tensor_type, t.data_offset, int(t.n_bytes))
        end = t.data_offset + int(t.n_bytes)
        padded = -(-end // alignment) * alignment
    if (size := path.stat().st_size) not in (end, padded):
        raise ValueError(f"{path} has {size:,} bytes, and its last tensor ends at {end:,}: {DOWNLOAD}")
    return metadata, tensors


def _value_of(field: Any) -> Any:
    value = field.contents()  # of 32 bits the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06
    return float(str(np.float32(value))) if field.types[0].name == "FLOAT32" else value
