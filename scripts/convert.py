"""PyTorch weights and GGUF files to our directories, and back to PyTorch's.

python scripts/convert.py to-jax Llama-2-7b-hf llama-2-7b --dtype bfloat16
python scripts/convert.py to-jax SmolLM2-135M-Instruct.Q4_1.gguf smollm2
python scripts/convert.py to-hf llama-2-7b Llama-2-7b-hf
python scripts/convert.py verify llama-2-7b
"""

import argparse

from cepe_jax.cli import run
from cepe_jax.weights.convert import to_hf, to_jax
from cepe_jax.weights.source import open_ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-jax", help="a Llama, CEPE or MLM-encoder of PyTorch weights, or a .gguf -> ours")
    command.add_argument("source")
    command.add_argument("target")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the written tensors; default: as stored, float32 of GGUF"
    )
    command = commands.add_parser("to-hf", help="ours -> what transformers or the CEPE reference loads")
    command.add_argument("source")
    command.add_argument("target")
    command = commands.add_parser("verify", help="read all of our directory and compare with its hashes")
    command.add_argument("source")
    arguments = parser.parse_args()
    match arguments.command:
        case "to-jax":
            to_jax(arguments.source, arguments.target, arguments.dtype)
        case "to-hf":
            to_hf(arguments.source, arguments.target)
        case "verify":
            open_ours(arguments.source).verify()
    print(f"{arguments.source}: whole" if arguments.command == "verify" else f"{arguments.target}: written")


if __name__ == "__main__":
    run(main)
