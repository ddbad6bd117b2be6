"""Every default of a model, once: frozen dataclasses, their arithmetic, and the presets.

Letters (used in names, shapes and einsum strings throughout the package):
B batch, T decoder positions, S key positions, N query heads, K key/value heads, G = N / K, H head width,
D decoder width, E encoder width, F MLP width, V vocabulary, C chunks per example, L tokens per chunk,
M = C * L memory length.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
Chunk = int | Literal["auto"]
Backend = Literal["xla", "splash", "cudnn"]


# No model is near these. Names of all layers are listed before any file is looked at.
MOST_LAYERS = 1 << 12
LARGEST_SIZE = 1 << 24


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_above(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(low < value < math.inf, f"{name} is {value}: give a finite number above {low:g}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoFormer), with the scalings that Llama checkpoints use."""

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0  # how many times the original length; all scalings but default
    original_length: int = 0  # positions of the unscaled model; yarn and llama3
    beta_fast: float = 32.0  # yarn: rotations over original_length above which nothing is interpolated
    beta_slow: float = 1.0  # yarn: rotations below which everything is
    attention_factor: float = 0.0  # yarn: multiplies cos and sin; 0 = 0.1 ln(factor) + 1
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def __post_init__(self):
        _require_above(1, theta=self.theta)
        _require_above(0, beta_fast=self.beta_fast, beta_slow=self.beta_slow, low_freq_factor=self.low_freq_factor)
        known = ("default", "linear", "yarn", "llama3")
        _require(self.scaling in known, f"rope scaling {self.scaling!r}: choose default, linear, yarn or llama3")
        if self.scaling == "default":
            _require(self.factor == 1, f"rope factor is {self.factor} without a scaling: name the scaling")
        _require(1 <= self.factor < math.inf, f"rope factor is {self.factor}: give a finite number, 1 or more")
        _require(
            0 <= self.attention_factor < math.inf,
            f"rope attention_factor is {self.attention_factor}: give a finite number above 0, or 0 for YaRN's own",
        )
        _require(
            0 <= self.original_length <= LARGEST_SIZE,
            f"rope original_length is {self.original_length}: give 0 to {LARGEST_SIZE:,} positions",
        )
        if self.scaling in ("yarn", "llama3"):
            _require(self.original_length > 0, f"rope scaling {self.scaling} needs original_length above 0")
        for high, low in ("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor"):
            larger, smaller = getattr(self, high), getattr(self, low)
            _require(smaller < larger < math.inf, f"rope {high} is {larger}: give more than {low}, {smaller}")


PRODUCTS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}  # of a block's parts


@dataclass(frozen=True)
class LoraConfig:
    """Factors of a low rank beside the weights of some products: W x + (alpha / rank) B A x (Hu et al. 2022)."""

    rank: int = 16  # of the factors
    alpha: float = 32.0  # what they add is scaled by alpha / rank
    products: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")  # products that have factors

    def __post_init__(self):
        _require(0 < self.rank <= LARGEST_SIZE, f"lora.rank is {self.rank}: give 1 to {LARGEST_SIZE:,}")
        _require(0 < self.alpha < math.inf, f"lora.alpha is {self.alpha}: give a number above 0")
        known = [product for part in PRODUCTS.values() for product in part]
        chosen = [product for product in known if product in self.products]
        _require(
            bool(chosen) and len(chosen) == len(self.products),
            f"lora.products is {list(self.products)}: give some of {', '.join(known)}, each once",
        )
        object.__setattr__(self, "products", tuple(chosen))


@dataclass(frozen=True)
class TransformerConfig:
    """The properties that decoder and encoder share: Llama blocks (RMSNorm, rotary attention, SwiGLU)."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False  # biases of queries, keys and values, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, as in Qwen3
    lora: LoraConfig | None = None  # factors of its own, a part of the model beside this one

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        for name in sizes:
            value, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            _require(0 < value <= most, f"{name} is {value}: give 1 to {most:,}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(0 < self.norm_eps < 1, f"norm_eps is {self.norm_eps}: give a number between 0 and 1")
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: rotary positions turn pairs")


@dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A decoder of Llama's kind: Llama, Mistral, Qwen2 or Qwen3."""

    tied_head: bool = False  # the output head is the embedding


@dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """The bidirectional encoder (paper, section 3.1); its MLM head is always tied to its embedding."""

    norm_eps: float = 1e-6
    mlm_head: bool = False
    chunk_positions: int = 0  # in a CEPE: distinct positions of chunks, counted from the last one; 0 = they have none

    def __post_init__(self):
        super().__post_init__()
        _require(
            0 <= self.chunk_positions <= LARGEST_SIZE,
            f"chunk_positions is {self.chunk_positions}: give 0 to {LARGEST_SIZE:,}",
        )


@dataclass(frozen=True)
class CrossLayers:
    """The choice of the decoder's layers that read the memory."""

    kind: Literal["last", "first", "every"] = "last"  # every: the last layer of each of `count` equal groups
    count: int = 0  # layers that read; 0 = all

    def __post_init__(self):
        _require(self.kind in ("last", "first", "every"), f"cross_layers {self.kind!r}: choose last, first or every")
        _require(self.count >= 0, f"cross_layers.count is {self.count}: give a number of layers, or 0 for all")

    def of(self, num_layers: int) -> "CrossLayers":
        """The same choice for a decoder of `num_layers` layers: all of them are the last ones, and are counted."""
        if self.count in (0, num_layers):
            return CrossLayers("last", num_layers)
        _require(self.count < num_layers, f"cross_layers.count {self.count} exceeds the decoder's {num_layers} layers")
        _require(
            self.kind != "every" or num_layers % self.count == 0,
            f"cross_layers.count {self.count} does not divide the decoder's {num_layers} layers into equal groups",
        )
        return self

    def indices(self, num_layers: int) -> range:
        """The numbers of these layers, once `of` has counted them."""
        match self.kind:
            case "last":
                return range(num_layers - self.count, num_layers)
            case "first":
                return range(self.count)
            case "every":
                return range(num_layers // self.count - 1, num_layers, num_layers // self.count)


@dataclass(frozen=True)
class CepeConfig:
    """A decoder, an encoder, and cross-attention in some of the decoder's layers."""

    decoder: DecoderConfig
    encoder: EncoderConfig
    cross_layers: CrossLayers = CrossLayers()

    def __post_init__(self):
        object.__setattr__(self, "cross_layers", self.cross_layers.of(self.decoder.num_layers))


@dataclass(frozen=True)
class RewardConfig:
    """A decoder with a head of one number in place of that for tokens."""

    decoder: DecoderConfig

    def __post_init__(self):
        object.__setattr__(self, "decoder", dataclasses.replace(self.decoder, tied_head=True))


@dataclass(frozen=True)
class ContextRewardConfig(CepeConfig):
    """A CEPE with a head of one number in place of that for tokens."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "decoder", dataclasses.replace(self.decoder, tied_head=True))


def with_lora(config, part: str, lora: LoraConfig | None):
    """Return a model's config whose `part`, decoder or encoder, has low-rank factors: its own, or else new ones.

    ValueError if its own are others than `lora` says.
    """
    of_part = getattr(config, part, config)
    if of_part.lora is None:
        of_part = dataclasses.replace(of_part, lora=lora or LoraConfig())
    elif lora not in (None, of_part.lora):
        raise ValueError(f"the {part} has factors already, {of_part.lora}: leave lora out, or merge them (convert.py)")
    return dataclasses.replace(config, **{part: of_part}) if hasattr(config, part) else of_part


def without_lora(config):
    """Return a model's config without low-rank factors."""
    parts = {part: without_lora(getattr(config, part)) for part in ("decoder", "encoder") if hasattr(config, part)}
    return dataclasses.replace(config, **(parts or {"lora": None}))


@dataclass(frozen=True)
class RematConfig:
    """The values of a layer that the backward pass recomputes, and whether the host keeps its input."""

    decoder: Remat = "none"  # dots: all except matrix products; full: all; offload: all, from inputs on the host
    encoder: Remat = "none"  # the same in the encoder

    def __post_init__(self):
        for remat in (self.decoder, self.encoder):
            _require(remat in get_args(Remat), f"remat {remat!r}: choose none, dots, full or offload")


def check_chunk(name: str, chunk: Chunk) -> None:
    """Raise ValueError unless `chunk` is auto, 0 or a number of positions."""
    known = chunk == "auto" or (isinstance(chunk, int) and chunk >= 0)
    _require(known, f"{name} is {chunk}: give a number of positions, 0 for all, or auto")


@dataclass(frozen=True)
class Compute:
    """The choices of a run that do not change what a model is: no directory of weights holds them."""

    dtype: Dtype = "float32"  # of activations; weights are cast to it when used
    attention: Backend | Literal["auto"] = "auto"  # splash: TPU; cudnn: GPU, bfloat16; auto: the platform's own
    remat: RematConfig = RematConfig()
    mlp_chunk: Chunk = 0  # positions whose MLP activations exist at once; 0 = all; auto: see `chunk_of`

    def __post_init__(self):
        known = "auto", *get_args(Backend)
        _require(self.dtype in get_args(Dtype), f"dtype {self.dtype!r}: choose float32 or bfloat16")
        _require(self.attention in known, f"attention {self.attention!r}: choose auto, xla, splash or cudnn")
        check_chunk("mlp_chunk", self.mlp_chunk)


FLOAT32 = Compute()

DECODERS = {
    "llama2_7b": DecoderConfig(
        vocab_size=32_000, width=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_width=11_008
    ),
    "llama3_8b": DecoderConfig(
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        rope=RopeConfig(theta=500_000.0),
    ),
    "llama3_70b": DecoderConfig(
        vocab_size=128_256,
        width=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=28_672,
        rope=RopeConfig(theta=500_000.0),
    ),
    "mistral_7b": DecoderConfig(  # v0.3
        vocab_size=32_768,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        rope=RopeConfig(theta=1_000_000.0),
    ),
    "qwen2_5_7b": DecoderConfig(
        vocab_size=152_064,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=18_944,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        qkv_bias=True,
    ),
    "qwen3_8b": DecoderConfig(
        vocab_size=151_936,
        width=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=12_288,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        qk_norm=True,
    ),
    "smollm2_135m": DecoderConfig(
        vocab_size=49_152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope=RopeConfig(theta=100_000.0),
        tied_head=True,
    ),
    "tiny_512": DecoderConfig(
        vocab_size=2048, width=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, mlp_width=1376
    ),
    "tiny": DecoderConfig(
        vocab_size=2048,
        width=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        mlp_width=512,
        tied_head=True,
    ),
}

ENCODERS = {
    "mlm_large": EncoderConfig(
        vocab_size=32_001, width=1024, num_layers=24, num_heads=16, num_kv_heads=16, head_dim=64, mlp_width=4096
    ),
    "smollm2_57m": EncoderConfig(  # as wide as smollm2_135m, from whose first layers it can start
        vocab_size=49_153,
        width=576,
        num_layers=8,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        norm_eps=1e-5,
        rope=RopeConfig(theta=100_000.0),
    ),
    "tiny_512": EncoderConfig(  # of the decoder of that name
        vocab_size=2049, width=256, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=1024
    ),
    "tiny": EncoderConfig(
        vocab_size=2049, width=192, num_layers=2, num_heads=6, num_kv_heads=6, head_dim=32, mlp_width=512
    ),
}


def preset(table: dict, name: str):
    """Return the preset of this name, which is no directory's; ValueError lists the known names."""
    if name not in table:
        raise ValueError(f"{name} is neither a directory nor a preset: give a directory or one of {', '.join(table)}")
    return table[name]
