"""Hugging Face's config.json <-> our config, for each of PyTorch's classes. What we do not compute is refused by name.

Read: Llama, Mistral, Qwen2 and Qwen3 (transformers 4 and 5), and the two classes of the CEPE reference. Keys that
change nothing about the arithmetic (special ids, `max_position_embeddings`, ...) are kept as `facts` and written back
on export.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cepe_jax.config import CepeConfig, DecoderConfig, EncoderConfig, RewardConfig, RopeConfig, TransformerConfig
from cepe_jax.parsing import COPY, shortened, typed

Count = Annotated[int, Meta(ge=1)]
Id = Annotated[int, Meta(ge=0)]
Positions = Annotated[int, Meta(ge=1, le=1 << 31)]

# Keys, each with the values under which it changes nothing; another value is refused. A missing key is such a value.
HARMLESS = {
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
YARN_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor"}
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


@dataclass(frozen=True)
class Family:
    """A family of decoders in transformers: Llama's arithmetic, and which of the optional weights they have."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: dict[str, int] = field(default_factory=dict)  # transformers' own, beside those that all families share
    written: dict[str, Any] = field(default_factory=dict)  # keys of config.json
    slides: bool = False  # a token sees only the last `sliding_window` ones; shorter texts are read as by a Llama

    def has(self, config: TransformerConfig) -> bool:
        """Return True if the config has the weights of this family."""
        return (config.qkv_bias, config.qk_norm) == (self.qkv_bias, self.qk_norm)


NO_BIAS = {"attention_bias": False}
LLAMA = Family("llama", written=NO_BIAS | {"mlp_bias": False})
# Of config.json's `architectures`.
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Family("mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, slides=True),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Family(
        "qwen3", qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}, written=NO_BIAS
    ),
}
OF_MODEL_TYPE = {family.model_type: family for family in FAMILIES.values()}
# Facts of a model that never had a Hugging Face config: ids as in the Llama-2 tokenizer.
DEFAULT_FACTS = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 4096}


class Facts(msgspec.Struct, kw_only=True):
    """The facts that are read here. A Struct leaves out the other keys of an object, which a dataclass would refuse."""

    max_position_embeddings: Positions | None = None
    sliding_window: Positions | None = None
    layer_types: list[str] | None = None
    eos_token_id: Id | list[Id] | None = None
    encoder_config: "Facts | None" = None


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


class _Transformer(Facts, kw_only=True):
    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    original_max_position_embeddings: int | None = None
    tie_word_embeddings: bool | None = None


class _Cepe(_Transformer, kw_only=True):
    encoder_config: _Transformer
    encoder_hidden_size: int | None = None
    num_cross_attn_layers: Count


def read_decoder(family: Family, hf: dict, where: str) -> DecoderConfig:
    """Return our config of a Hugging Face config.json; so do the other readers."""
    model = typed(hf, _Transformer, where)
    _refuse(hf, _harmless(family) | OF_PLAIN, where)
    if not family.slides and (others := set(model.layer_types or ()) - {"full_attention"}):
        raise ValueError(f"{where}: layer_types {shortened(min(others))} is not computed here: only full_attention is")
    properties = {"qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
    return typed(_decoder(hf, model, where, family) | properties, DecoderConfig, where)


def _harmless(family: Family) -> dict[str, tuple]:
    """Return HARMLESS for a family. Qwen's files have the width of a sliding window that is not used."""
    harmless = HARMLESS | {"model_type": (family.model_type,)}
    return {key: values for key, values in harmless.items() if family is LLAMA or key != "sliding_window"}


def window_of(facts: dict) -> int | None:
    """Return how many tokens a decoder with these facts reads as it was trained to; None if nothing says it."""
    family, positions = OF_MODEL_TYPE.get(facts.get("model_type"), LLAMA), facts.get("max_position_embeddings")
    slides = facts.get("sliding_window", family.defaults["sliding_window"]) if family.slides else None
    return min((count for count in (positions, slides) if count is not None), default=None)


def with_window(facts: dict, length: int) -> dict:
    """Return the facts of a decoder that was trained to read this many tokens, all of them at once."""
    slides = OF_MODEL_TYPE.get(facts.get("model_type"), LLAMA).slides
    return facts | {"max_position_embeddings": length} | ({"sliding_window": None} if slides else {})


def read_mlm(hf: dict, where: str) -> EncoderConfig:
    _refuse(hf, _harmless(LLAMA) | OF_PLAIN | OF_ENCODER | {"tie_word_embeddings": (True, None)}, where)
    return typed(_fields(hf, typed(hf, _Transformer, where), where) | {"mlm_head": True}, EncoderConfig, where)


def read_cepe(hf: dict, where: str) -> CepeConfig:
    _refuse(hf, _harmless(LLAMA) | OF_CEPE, where)
    inside, model = f"{where}: encoder_config", typed(hf, _Cepe, where)
    encoder = hf["encoder_config"]
    _refuse(encoder, _harmless(LLAMA) | OF_PLAIN | OF_ENCODER, inside)
    width = model.encoder_config.hidden_size
    if model.encoder_hidden_size not in (width, None):
        raise ValueError(
            f"{where}: encoder_hidden_size {model.encoder_hidden_size} is not encoder_config's hidden_size {width}: "
            f"one of them is wrong"
        )
    fields = {
        "decoder": _decoder(hf, model, where),
        "encoder": _fields(encoder, model.encoder_config, inside),
        "cross_layers": {"kind": "last", "count": model.num_cross_attn_layers},
    }
    return typed(fields, CepeConfig, where)


def _refuse(hf: dict, harmless: dict[str, tuple], where: str) -> None:
    for key, values in harmless.items():
        if key in hf and hf[key] not in values:
            raise ValueError(f"{where}: {key} {shortened(hf[key])} is not computed here: only {values[0]!r} is")


def _decoder(hf: dict, model: _Transformer, where: str, family: Family = LLAMA) -> dict:
    return _fields(hf, model, where, family) | {"tied_head": bool(model.tie_word_embeddings)}


def _fields(hf: dict, model: _Transformer, where: str, family: Family = LLAMA) -> dict:
    """Return the fields of TransformerConfig; defaults for missing keys are transformers' own."""
    width, heads = model.hidden_size, model.num_attention_heads
    if "head_dim" not in family.defaults and model.head_dim is None and width % heads:
        raise ValueError(
            f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}: give head_dim"
        )
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads} | family.defaults
    fields = {ours: getattr(model, key) or defaults[key] for key, ours in SIZES.items()}
    fields["norm_eps"] = 1e-6 if model.rms_norm_eps is None else model.rms_norm_eps
    return fields | {"rope": _rope(hf, model, where)}


def _rope(hf: dict, model: _Transformer, where: str) -> RopeConfig:
    """Read transformers 5's rope_parameters, or 4's rope_theta and rope_scaling; both may stand, if they agree."""
    theta = RopeConfig.theta if model.rope_theta is None else model.rope_theta
    readings = [
        _rope_of(hf[name], rope, model, theta, f"{where}: {name}")
        for name in ("rope_parameters", "rope_scaling")
        if (rope := getattr(model, name)) is not None
    ]
    if not readings:
        return typed({"theta": theta}, RopeConfig, where)
    if any(other != readings[0] for other in readings) or model.rope_theta not in (readings[0].theta, None):
        raise ValueError(f"{where}: rope_parameters, rope_scaling and rope_theta disagree: keep one")
    return readings[0]


def _rope_of(hf: dict, rope: _Rope, model: _Transformer, theta: float, where: str) -> RopeConfig:
    scaling = rope.rope_type or rope.type or "default"
    if scaling not in ROPE_FIELDS:
        raise ValueError(f"{where}: rope type {shortened(scaling)} is not computed here: only {', '.join(ROPE_FIELDS)}")
    _refuse(hf, HARMLESS_IN_ROPE, where)
    known = ROPE_FIELDS[scaling]
    if unknown := set(hf) - set(known) - set(HARMLESS_IN_ROPE) - {"rope_theta", "rope_type", "type"}:
        raise ValueError(f"{where}: unknown for rope type {scaling}: {', '.join(map(shortened, sorted(unknown)[:3]))}")
    fields = {ours: getattr(rope, key) for key, ours in known.items()}
    if "original_length" in fields:
        # As transformers does: beside the rope's own dict it has priority; without any, the model's length.
        own = rope.original_max_position_embeddings or model.max_position_embeddings
        fields["original_length"] = model.original_max_position_embeddings or own
    for key, ours in known.items():
        if fields[ours] is None and key not in YARN_OPTIONAL:
            raise ValueError(f"{where} lacks {key}: {COPY}")
    fields = {ours: value for ours, value in fields.items() if value is not None}
    own_theta = theta if rope.rope_theta is None else rope.rope_theta
    return typed(fields | {"theta": own_theta, "scaling": scaling}, RopeConfig, where)


def facts_of(hf: dict, where: str = "config.json") -> dict:
    """Return what a Hugging Face config.json has beyond our config: kept, and written back on export."""
    typed(hf, Facts, where)
    ours = {*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"}
    ours |= {"attention_bias", "mlp_bias", "architectures", "torch_dtype", "dtype", "tie_word_embeddings"}
    ours |= {"encoder_hidden_size", "num_cross_attn_layers", *OF_CEPE}
    ours |= {"auto_map"}  # names code beside the weights, which is not exported with them
    facts = {key: value for key, value in hf.items() if key not in ours}
    if facts.get("model_type") == LLAMA.model_type:
        del facts["model_type"]  # a model without is a Llama
    if facts.get("encoder_config"):
        facts["encoder_config"] = facts_of(facts["encoder_config"], where)
    return facts


def write_decoder(family: Family, config: DecoderConfig, facts: dict) -> dict:
    """Return the config.json of a model with these facts, all but the dtype of its tensors; so do the other writers."""
    return facts | {"tie_word_embeddings": config.tied_head} | _sizes(config, family)


def read_reward(hf: dict, where: str = "config.json") -> RewardConfig:
    """Return the config of a classifier that gives one number; ValueError for one that gives several."""
    labels = typed(hf.get("id2label", {"0": "", "1": ""}), dict[str, Any], f"{where}: id2label")
    if len(labels) != 1:
        raise ValueError(f"{where}: a head of {len(labels)} numbers: a reward model gives one, with one id2label")
    return RewardConfig(read_decoder(LLAMA, hf, where))


def write_reward(config: RewardConfig, facts: dict) -> dict:
    """Return the config.json of a classifier. Of several texts it finds the last tokens by `pad_token_id`, if given."""
    own = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tie_word_embeddings": False}
    return write_decoder(LLAMA, config.decoder, facts) | own


def write_mlm(config: EncoderConfig, facts: dict) -> dict:
    _check_is_plain(config)
    own = {"is_encoder": True, "do_cross_attention": False, "tie_word_embeddings": True}
    return facts | own | _sizes(config)


def write_cepe(config: CepeConfig, facts: dict) -> dict:
    window = window_of(facts)
    if config.cross_layers.kind != "last":
        raise ValueError(
            f"cross_layers {config.cross_layers.kind}: the reference reads the memory in the last layers alone, and "
            f"has no class for this model"
        )
    if config.encoder.chunk_positions:
        raise ValueError("chunk_positions: the reference gives chunks none, and has no class for this model")
    _check_is_plain(config.decoder)
    _check_is_plain(config.encoder)
    facts = {key: value for key, value in facts.items() if key != "sliding_window"}
    facts["max_position_embeddings"] = window
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


def _check_is_plain(config: TransformerConfig) -> None:
    """Raise ValueError for weights that the reference's classes have no place for."""
    if not LLAMA.has(config):
        raise ValueError("biases or norms of heads: the reference's models are Llamas, and have no place for them")


def _sizes(config: DecoderConfig | EncoderConfig, family: Family = LLAMA) -> dict:
    rope = config.rope
    fields = {key: getattr(rope, ours) for key, ours in ROPE_FIELDS[rope.scaling].items()}
    if not fields.get("attention_factor", 1):
        del fields["attention_factor"]
    # The reference's transformers (4.34) knows linear alone, calls it `type`, and takes no third key.
    name = "type" if rope.scaling == "linear" else "rope_type"
    return (
        family.written
        | {
            "model_type": family.model_type,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": rope.theta,
            "rope_scaling": None if rope.scaling == "default" else {name: rope.scaling, **fields},
            "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.scaling, **fields},
        }
        | {key: getattr(config, ours) for key, ours in SIZES.items()}
    )
