"""Text that follows a prompt, or a conversation, the encoder reading files of any length."""

from cepe_jax.cli import parse, run
from cepe_jax.inference.terminal import GenerateConfig, run_generate

if __name__ == "__main__":
    run(lambda: run_generate(parse(GenerateConfig)))
