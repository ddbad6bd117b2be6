"""CEPE in JAX and Flax. `cepe_jax.load` reads a model that takes and gives text."""


def __getattr__(name: str):
    if name == "load":
        from cepe_jax.inference.text import load  # here, so that a part alone imports fast

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
