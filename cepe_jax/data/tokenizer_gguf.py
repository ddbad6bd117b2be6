"""Tokenizer files from a GGUF file's metadata: tokenizer.json of a byte-level BPE, tokenizer.model of SentencePiece.

The metadata are given by name, without their prefix `tokenizer.ggml.`.
"""

import json
from pathlib import Path
from typing import Any

from cepe_jax.data.tokenizer import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds of tokens: GGUF has taken SentencePiece's numbers
NEEDED = {"gpt2": ("tokens", "token_type", "merges"), "llama": ("tokens", "token_type", "scores")}
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Where a byte-level BPE cuts a text, by llama.cpp's name for it: around each digit and then as GPT-2 does (None), or by
# a pattern. With Llama 3's pattern, a part that is a token is that token, whether merges lead to it or not. Characters
# of Qwen's texts are composed first (NFC).
CUTS = {"smollm": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def is_known(kind: str | None, cuts: str | None) -> bool:
    """Return True if `write` writes tokenizers of this `model` and `pre`."""
    return kind == "llama" or (kind == "gpt2" and cuts in CUTS)


def write(found: dict[str, Any], template: str | None, to: Path, where: str) -> None:
    """The tokenizer of the GGUF file `where`, and its chat template, are in directory `to`."""
    for name in (*NEEDED[found["model"]], "bos_token_id", "eos_token_id"):
        if name not in found:
            raise ValueError(f"{where} lacks tokenizer.ggml.{name}: convert the model to GGUF again")
    ids = {ours: found[f"{role}_token_id"] for role, ours in ROLES.items() if f"{role}_token_id" in found}
    settings = {ours: found["tokens"][i] for ours, i in ids.items()}
    if template is not None:
        settings["chat_template"] = template
    if found["model"] == "llama":
        settings["add_bos_token"] = found.get("add_bos_token", True)
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # which takes tokenizer.json as it is
    try:
        if found["model"] == "llama":
            name, content = "tokenizer.model", _sentencepiece(found)
        else:
            name, content = "tokenizer.json", _byte_level(found).to_str(pretty=True).encode()
        (to / name).write_bytes(content)
        (to / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        Tokenizer(to)
    except Exception as error:  # the library raises bare Exception
        reason = str(error).replace(f"{to}/", "")
        raise ValueError(f"{where}: its tokens are no tokenizer ({reason}): convert it again") from None


def _byte_level(found: dict[str, Any]):
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    pattern = CUTS[found["pre"]]
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    ids = {token: i for i, token in enumerate(found["tokens"])}
    tokenizer = Library(models.BPE(ids, merges, ignore_merges=pattern == LLAMA3))
    if found["pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pattern is None:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens):
        names = [token for token, its in zip(found["tokens"], found["token_type"], strict=True) if its == kind]
        add([AddedToken(name, normalized=False) for name in names])
    if found.get("add_bos_token", found["pre"] == "llama-bpe"):  # llama.cpp's own defaults
        bos = found["tokens"][found["bos_token_id"]], found["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    return tokenizer


def _sentencepiece(found: dict[str, Any]) -> bytes:
    """The SentencePiece model that the file was made from, but for how it was trained."""
    from sentencepiece import sentencepiece_model_pb2

    columns = zip(found["tokens"], found["scores"], found["token_type"], strict=True)
    ids = {"bos": found["bos_token_id"], "eos": found["eos_token_id"], "unk": found["token_type"].index(UNKNOWN)}
    model = sentencepiece_model_pb2.ModelProto(
        pieces=[{"piece": piece, "score": score, "type": kind} for piece, score, kind in columns],
        trainer_spec={"model_type": "BPE", "byte_fallback": BYTE in found["token_type"]}
        | {f"{role}_id": i for role, i in ids.items()}
        | {f"{role}_piece": found["tokens"][i] for role, i in ids.items()},
        normalizer_spec={
            "name": "identity",
            "add_dummy_prefix": found.get("add_space_prefix", True),
            "remove_extra_whitespaces": found.get("remove_extra_whitespaces", False),
        },
    )
    return model.SerializeToString()
