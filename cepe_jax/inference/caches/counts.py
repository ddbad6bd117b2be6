"""The check of a policy's numbers of tokens."""

from numbers import Integral

from cepe_jax.parsing import shortened

MOST_TOKENS = 1 << 30  # programs count with 32 bits


def check_counts(**counts) -> None:
    """Raise ValueError unless all are whole numbers from 1 to MOST_TOKENS."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
            raise ValueError(f"cache.{name} is {shortened(value)}: give a whole number, 1 to {MOST_TOKENS:,}")
