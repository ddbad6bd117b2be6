"""Generate the text that follows a prompt, or hold a conversation; the encoder reads files of any length.
Of a folder of texts (--corpus) the chunks that fit the prompt are read, and named on standard error after the answer.

python scripts/generate.py --model=cepe-7b --context-file=book.txt --prompt="The book ends with" --dtype=bfloat16
python scripts/generate.py --model=ceped-7b --context-file=book.txt --chat --system="Answer from the book."
python scripts/generate.py --model=cepe-7b --corpus=docs --retrieve.k=5 --prompt="Question: Who is the heir? Answer:"
"""

from cepe_jax.commands import run_script
from cepe_jax.inference.terminal import GenerateConfig, run_generate

COMMANDS = {"": (GenerateConfig, run_generate)}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
