"""CEPE in JAX and Flax. `load` reads a model that takes and gives text, `load_reward` one that scores answers."""


def __getattr__(name: str):
    if name == "load":
        from cepe_jax.inference.text import load  # here, so that a part alone imports fast

        return load
    if name == "load_reward":
        from cepe_jax.inference.rewards import load_reward

        return load_reward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
