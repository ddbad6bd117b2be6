"""A tiny decoder with induction heads, trained in a minute, and texts that show how far back they see."""

import jax
import numpy as np
import optax

from cepe_jax.config import DecoderConfig, RopeConfig
from cepe_jax.model.llama import Llama

TOY = DecoderConfig(
    vocab_size=512,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_width=64,  # a wider one takes longer to train
    rope=RopeConfig(theta=1000.0),  # with 10,000 only one pair turns fast, and heads look 6 tokens back, as often as 1
)
LENGTH = 64  # tokens of a text in training
SHORTEST, LONGEST = 12, 32  # tokens of the block that such a text repeats
ROWS = 32
MOST_STEPS = 2000
ENOUGH = 0.9  # share of the needles in texts of TRIED tokens that are found when the training ends
TRIED = 50
# The tests' environment turns LLVM's optimisations off, without which a step takes two to three times as long.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def trained(seed: int) -> Llama:
    """Return a decoder that finds needles in texts as long as those it was trained on.

    Induction heads form all at once, after 500 to 1000 steps. Raise RuntimeError if they do not.
    """
    model = jax.jit(lambda key: Llama(TOY, key=key))(jax.random.key(seed))
    optimizer = optax.adamw(optax.linear_schedule(0, 3e-3, 20))
    state, rng = optimizer.init(model), np.random.default_rng(seed)

    def loss(model: Llama, tokens_BT: jax.Array, repeated_BT: jax.Array) -> jax.Array:
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
        return losses_BT.mean(where=repeated_BT[:, 1:])

    def step(model: Llama, state: optax.OptState, *texts: jax.Array) -> tuple[Llama, optax.OptState]:
        updates, state = optimizer.update(jax.grad(loss)(model, *texts), state, model)
        return optax.apply_updates(model, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=OPTIMIZED)
    answers = jax.jit(lambda model, tokens_BT: model(tokens_BT)[:, -1].argmax(axis=-1), compiler_options=OPTIMIZED)
    prompts_BT, values_B = needles(seed, 256, TRIED)
    for number in range(1, MOST_STEPS + 1):
        model, state = step(model, state, *repeats(rng))
        if number % 50 == 0 and (answers(model, prompts_BT) == values_B).mean() > ENOUGH:
            return model
    raise RuntimeError(f"no induction heads after {MOST_STEPS} steps from seed {seed}")


def repeats(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return texts (ROWS, LENGTH), each of a block of different tokens and its repetitions, and what they let predict.

    That are the tokens from the second one of the first repetition on.
    """
    blocks_BV = rng.permuted(np.tile(np.arange(TOY.vocab_size), (ROWS, 1)), axis=1)
    periods_B1 = rng.integers(SHORTEST, LONGEST + 1, (ROWS, 1))
    at_T = np.arange(LENGTH)
    return np.take_along_axis(blocks_BV, at_T % periods_B1, axis=1), at_T > periods_B1


def needles(seed: int, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` texts of `length` random tokens, and the token that followed each one's last token before.

    The last token, the key, occurs once before, at a depth of 10% to 80% of the length.
    """
    rng, rows = np.random.default_rng(seed), np.arange(count)
    keys_B = rng.integers(0, TOY.vocab_size, count)
    others_BT = rng.integers(1, TOY.vocab_size, (count, length))
    tokens_BT = (keys_B[:, None] + others_BT) % TOY.vocab_size  # nowhere the key
    depths_B = rng.integers(length // 10, length * 8 // 10, count)
    tokens_BT[rows, depths_B] = tokens_BT[:, -1] = keys_B
    return tokens_BT, tokens_BT[rows, depths_B + 1]
