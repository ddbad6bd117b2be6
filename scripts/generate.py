"""Text that follows a prompt, the encoder reading files of any length."""

from cepe_jax.cli import parse, run
from cepe_jax.inference.text import GenerateConfig, generate_text

if __name__ == "__main__":
    run(lambda: print(generate_text(parse(GenerateConfig))))
