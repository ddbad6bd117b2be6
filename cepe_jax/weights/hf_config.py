"""Hugging Face's config.json <-> our config, for each of PyTorch's classes. What we do not compute is refused by name.

Read: Llama (transformers 4 and 5), and the two classes of the CEPE reference. Keys that change nothing about the
arithmetic (special ids, `max_position_embeddings`, ...) are kept as `facts` and written back on export.
"""

import dataclasses

from cepe_jax.config import CepeConfig, CrossLayers, DecoderConfig, EncoderConfig, RopeConfig

# Keys, each with the values under which it changes nothing; another value is refused. A missing key is such a value.
HARMLESS = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
}
OF_PLAIN = {"do_cross_attention": (False, None)}
OF_ENCODER = {"is_decoder": (False, None)}
OF_CEPE = {
    "do_cross_attention": (True,),
    "encode_mode": ("context_only", None),
    "encoder_is_model": (False, None),
    "num_cross_attn_hidden_states": (1, None),
}
HARMLESS_IN_ROPE = {
    "partial_rotary_factor": (1, None),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (True, None),
    "finetuned": (True, False, None),  # a note of YaRN's first checkpoints
}
# Hugging Face's names of RopeConfig's fields, per scaling.
YARN = {"factor": "factor", "original_max_position_embeddings": "original_length", "beta_fast": "beta_fast"}
YARN |= {"beta_slow": "beta_slow", "attention_factor": "attention_factor"}
LLAMA3 = {"factor": "factor", "original_max_position_embeddings": "original_length"}
LLAMA3 |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
ROPE_FIELDS = {"default": {}, "linear": {"factor": "factor"}, "yarn": YARN, "llama3": LLAMA3}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
}
# Facts of a model that never had a Hugging Face config: ids as in the Llama-2 tokenizer.
DEFAULT_FACTS = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 4096}


def read_llama(hf: dict, where: str) -> DecoderConfig:
    """Return our config of a Hugging Face config.json; so do the other readers."""
    _refuse(hf, HARMLESS | OF_PLAIN, where)
    return _decoder(hf, where)


def read_mlm(hf: dict, where: str) -> EncoderConfig:
    _refuse(hf, HARMLESS | OF_PLAIN | OF_ENCODER | {"tie_word_embeddings": (True, None)}, where)
    return EncoderConfig(**_transformer(hf, where), mlm_head=True)


def read_cepe(hf: dict, where: str) -> CepeConfig:
    _refuse(hf, HARMLESS | OF_CEPE, where)
    encoder = _get(hf, "encoder_config", dict, where)
    inside = f"{where}: encoder_config"
    _refuse(encoder, HARMLESS | OF_PLAIN | OF_ENCODER, inside)
    if (readers := _get(hf, "num_cross_attn_layers", int, where)) < 1:
        raise ValueError(f"{where}: num_cross_attn_layers is {readers}: a CEPE has one or more")
    layers = CrossLayers("last", readers)
    config = CepeConfig(_decoder(hf, where), EncoderConfig(**_transformer(encoder, inside)), layers)
    if hf.get("encoder_hidden_size", config.encoder.width) != config.encoder.width:
        raise ValueError(
            f"{where}: encoder_hidden_size {hf['encoder_hidden_size']} is not encoder_config's hidden_size "
            f"{config.encoder.width}: one of them is wrong"
        )
    return config


def _refuse(hf: dict, harmless: dict[str, tuple], where: str) -> None:
    for key, values in harmless.items():
        if key in hf and hf[key] not in values:
            raise ValueError(f"{where}: {key} {hf[key]!r} is not computed here: only {values[0]!r} is")


def _get(hf: dict, key: str, kind: type | tuple[type, ...], where: str, default=None):
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{where} lacks {key}")
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{where}: {key} is {value!r}: give a {getattr(kind, '__name__', 'number')}")
    return value


def _decoder(hf: dict, where: str) -> DecoderConfig:
    return DecoderConfig(**_transformer(hf, where), tied_head=_get(hf, "tie_word_embeddings", bool, where, False))


def _transformer(hf: dict, where: str) -> dict:
    """The fields of TransformerConfig; defaults for missing keys are transformers' own."""
    width, heads = (_get(hf, key, int, where) for key in ("hidden_size", "num_attention_heads"))
    if hf.get("head_dim") is None and (heads < 1 or width % heads):
        raise ValueError(
            f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}: give head_dim"
        )
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads if heads > 0 else None}
    fields = {ours: _get(hf, key, int, where, defaults.get(key)) for key, ours in SIZES.items()}
    return fields | {
        "norm_eps": float(_get(hf, "rms_norm_eps", (int, float), where, 1e-6)),
        "rope": _rope(hf, where),
    }


def _rope(hf: dict, where: str) -> RopeConfig:
    """From transformers 5's rope_parameters, or 4's rope_theta and rope_scaling; both may stand, if they agree."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name)
        if rope is None:
            continue
        rope = {"rope_theta": hf.get("rope_theta", 10_000.0)} | rope
        found.append(_rope_of(rope, hf, f"{where}: {name}"))
    if found and hf.get("rope_theta") is not None:
        found.append(dataclasses.replace(found[0], theta=float(hf["rope_theta"])))
    if any(other != found[0] for other in found):
        raise ValueError(f"{where}: rope_parameters, rope_scaling and rope_theta disagree: {found}: keep one")
    return found[0] if found else RopeConfig(float(_get(hf, "rope_theta", (int, float), where, 10_000.0)))


def _rope_of(rope: dict, hf: dict, where: str) -> RopeConfig:
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ROPE_FIELDS:
        raise ValueError(f"{where}: rope type {scaling!r} is not computed here: only {', '.join(ROPE_FIELDS)}")
    _refuse(rope, HARMLESS_IN_ROPE, where)
    known = ROPE_FIELDS[scaling]
    if unknown := set(rope) - set(known) - set(HARMLESS_IN_ROPE) - {"rope_theta", "rope_type", "type"}:
        raise ValueError(f"{where}: unknown for rope type {scaling}: {', '.join(sorted(unknown))}")
    rope = dict(rope)
    if "original_max_position_embeddings" in known:
        # As transformers does: beside the rope's own dict it has priority; without any, the model's length.
        own = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
        rope["original_max_position_embeddings"] = hf.get("original_max_position_embeddings") or own
    required = {"default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
    for key in required.get(scaling, LLAMA3):
        _get(rope, key, (int, float), where)
    numbers = {ours: _get(rope, key, (int, float), where) for key, ours in known.items() if rope.get(key) is not None}
    return RopeConfig(float(_get(rope, "rope_theta", (int, float), where)), scaling, **numbers)


def facts_of(hf: dict) -> dict:
    """What a Hugging Face config.json says beyond our config: kept, and written back on export."""
    ours = {*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "model_type", "hidden_act"}
    ours |= {"attention_bias", "mlp_bias", "architectures", "torch_dtype", "dtype", "tie_word_embeddings"}
    ours |= {"encoder_hidden_size", "num_cross_attn_layers", *OF_CEPE}
    ours |= {"auto_map"}  # names code beside the weights, which is not exported with them
    facts = {key: value for key, value in hf.items() if key not in ours}
    if "encoder_config" in facts:
        facts["encoder_config"] = facts_of(facts["encoder_config"])
    return facts


def write_llama(config: DecoderConfig, facts: dict) -> dict:
    """Return the config.json of a model with these facts, all but the dtype of its tensors; so do the other writers."""
    return facts | {"tie_word_embeddings": config.tied_head} | _sizes(config)


def write_mlm(config: EncoderConfig, facts: dict) -> dict:
    own = {"is_encoder": True, "do_cross_attention": False, "tie_word_embeddings": True}
    return facts | own | _sizes(config)


def write_cepe(config: CepeConfig, facts: dict) -> dict:
    if config.cross_layers.kind != "last":
        raise ValueError(
            f"cross_layers {config.cross_layers.kind}: the reference reads the memory in the last layers alone, and "
            f"has no class for this model"
        )
    if config.encoder.chunk_positions:
        raise ValueError("chunk_positions: the reference gives chunks none, and has no class for this model")
    facts = dict(facts)
    # The encoder reads chunks: its own length is a fact nobody uses, and 512 is the released one's.
    inner = DEFAULT_FACTS | {"max_position_embeddings": 512} | facts.pop("encoder_config", {})
    own_inner = {"architectures": None, "is_decoder": False, "tie_word_embeddings": False}
    own = {
        "do_cross_attention": True,
        "encode_mode": "context_only",
        "encoder_is_model": False,
        "num_cross_attn_hidden_states": 1,
        "num_cross_attn_layers": config.cross_layers.count,
        "encoder_hidden_size": config.encoder.width,
        "encoder_config": inner | own_inner | _sizes(config.encoder),
        "tie_word_embeddings": config.decoder.tied_head,
        "is_decoder": True,
    }
    return {"train_batch_mode": "none", "train_encoder": True} | facts | own | _sizes(config.decoder)


def _sizes(config: DecoderConfig | EncoderConfig) -> dict:
    rope = config.rope
    fields = {key: getattr(rope, ours) for key, ours in ROPE_FIELDS[rope.scaling].items()}
    if not fields.get("attention_factor", 1):
        del fields["attention_factor"]
    # The reference's transformers (4.34) knows linear alone, calls it `type`, and takes no third key.
    name = "type" if rope.scaling == "linear" else "rope_type"
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else {name: rope.scaling, **fields},
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.scaling, **fields},
    } | {key: getattr(config, ours) for key, ours in SIZES.items()}
