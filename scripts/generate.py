"""Generate the text that follows a prompt, or hold a conversation; the encoder reads files of any length.

python scripts/generate.py --model=cepe-7b --context-file=book.txt --prompt="The book ends with" --dtype=bfloat16
python scripts/generate.py --model=ceped-7b --context-file=book.txt --chat --system="Answer from the book."
"""

from cepe_jax.commands import run_script
from cepe_jax.inference.terminal import GenerateConfig, run_generate

COMMANDS = {"": (GenerateConfig, run_generate)}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
