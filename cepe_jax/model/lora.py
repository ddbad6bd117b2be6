"""Low-rank factors beside the weights of a stack's products: LoRA (Hu et al. 2022).

They are a part of a model of their own, `decoder_lora` or `encoder_lora`: what trains and what is frozen is decided as
for any other part, and the decoder without them is the model that it was.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from cepe_jax.config import PRODUCTS, LoraConfig
from cepe_jax.model.parts import Model, Parts

Array = jax.Array
INPUT_AXES = {"o": 2}  # axes of a layer's weight that its product sums over; 1 for all others


class Factors(nnx.Module):
    """The factors A (Z, *inputs, R) and B (Z, R, *outputs) of one product in every layer.

    A starts uniform, as in PEFT, and B at zero: at first the product is what it is without them.
    """

    def __init__(self, weight: nnx.Param, num_inputs: int, config: LoraConfig, *, key: Array):
        """Make factors for `weight` (Z, *inputs, *outputs), which may be a shape alone."""
        (Z, *sizes), (_, *axes) = weight.shape, weight.get_metadata()["axes"]
        inputs, outputs = sizes[:num_inputs], sizes[num_inputs:]
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (Z, *inputs, config.rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a, axes=("layer", *axes[:num_inputs], None))
        self.b = nnx.Param(jnp.zeros((Z, config.rank, *outputs)), axes=("layer", None, *axes[num_inputs:]))
        self.scale = config.alpha / config.rank

    def __call__(self, rows: Array) -> Array:
        """Return what they add to a layer's product of `rows` (n, inputs): (n, outputs)."""
        a, b = self.a[...].astype(rows.dtype), self.b[...].astype(rows.dtype)
        rank = b.shape[0]
        return self.scale * (rows @ a.reshape(-1, rank) @ b.reshape(rank, -1))


class Adapter(nnx.Module):
    """The factors of some of a module's products, under their names; None for the others."""

    def __init__(self, products: tuple[str, ...], module: nnx.Module, config: LoraConfig, *, key: Array):
        for number, product in enumerate(products):
            weight, num_inputs = getattr(module, product), INPUT_AXES.get(product, 1)
            of_product = jax.random.fold_in(key, number)
            factors = Factors(weight, num_inputs, config, key=of_product) if product in config.products else None
            setattr(self, product, nnx.data(factors))


class Lora(nnx.Module):
    """The factors of a stack of blocks, layers first; `config` says which there are."""

    def __init__(self, blocks: nnx.Module, config: LoraConfig, *, key: Array):
        attention, mlp = jax.random.split(key)
        self.config = config
        self.attention = Adapter(PRODUCTS["attention"], blocks.attention, config, key=attention)
        self.mlp = Adapter(PRODUCTS["mlp"], blocks.mlp, config, key=mlp)


def bound(blocks: nnx.Module, lora: Lora | None) -> nnx.Module:
    """Return the stack of blocks with these factors beside its weights, over the same arrays."""
    if lora is None:
        return blocks
    blocks = jax.tree.map(lambda leaf: leaf, blocks)  # another object: what is set on it is not set on the model
    blocks.attention.lora, blocks.mlp.lora = lora.attention, lora.mlp
    return blocks


def with_factors(stack: nnx.Module, lora: Lora | None) -> nnx.Module:
    """Return the decoder or encoder with these factors, or none, over the same arrays."""
    stack = jax.tree.map(lambda leaf: leaf, stack)
    stack.lora = lora
    stack.config = dataclasses.replace(stack.config, lora=lora and lora.config)
    return stack


def parts_of(name: str, stack: nnx.Module) -> Parts:
    """Return the parts of a decoder or encoder by its name: itself, and `<name>_lora` if it has factors."""
    if stack.lora is None:
        return {name: stack}
    return {name: with_factors(stack, None), f"{name}_lora": stack.lora}


def of_parts(name: str, parts: Parts) -> nnx.Module:
    """Return the decoder or encoder of parts as `parts_of` gives them; others may be among them."""
    lora = parts.get(f"{name}_lora")
    return parts[name] if lora is None else with_factors(parts[name], lora)


def without_factors(model: Model) -> Model:
    """Return the model without low-rank factors, over the same arrays."""
    return type(model).from_parts({name: part for name, part in model.parts.items() if not name.endswith("_lora")})
