"""Convert PyTorch weights and GGUF files to this package's format, and back to PyTorch's.

to-jax: Convert a Llama, a CEPE or an MLM encoder of PyTorch, PEFT's LoRA of a Llama, or a GGUF file.
    python scripts/convert.py to-jax Llama-2-7b-hf llama-2-7b --dtype bfloat16
    python scripts/convert.py to-jax SmolLM2-135M-Instruct.Q4_1.gguf smollm2

to-hf: Write a model as transformers or the CEPE reference reads it.
    python scripts/convert.py to-hf llama-2-7b Llama-2-7b-hf
    python scripts/convert.py to-hf --source=cepe-7b --target=CEPE-again

to-peft: Write the low-rank factors of a decoder as PEFT loads them.
    python scripts/convert.py to-peft runs/lora/model adapter --base=meta-llama/Llama-2-7b-hf
    python scripts/convert.py to-peft --source=runs/lora/model --target=adapter --base=Llama-2-7b-hf

merge: Add the low-rank factors of a model to its weights.
    python scripts/convert.py merge runs/lora/model llama-2-7b-tuned
    python scripts/convert.py merge --source=runs/lora/model --target=llama-2-7b-tuned

verify: Read a whole model and compare it with its hashes.
    python scripts/convert.py verify llama-2-7b
    python scripts/convert.py verify --source=llama-2-7b
"""

from dataclasses import dataclass
from pathlib import Path

from cepe_jax.commands import run_script
from cepe_jax.config import Dtype
from cepe_jax.weights.convert import merge, to_hf, to_jax
from cepe_jax.weights.factors import to_peft
from cepe_jax.weights.source import open_ours


@dataclass(frozen=True)
class ToJaxConfig:
    source: Path  # a directory of PyTorch weights, or a .gguf file; the first argument without a name
    target: Path  # the new directory; the second argument without a name
    dtype: Dtype | None = None  # of the written tensors; None: as they are stored, float32 from GGUF

    POSITIONALS = ("source", "target")

    def convert(self) -> None:
        to_jax(self.source, self.target, self.dtype)
        print(f"{self.target}: written")


@dataclass(frozen=True)
class ToHfConfig:
    source: Path  # a model in this package's format; the first argument without a name
    target: Path  # the new directory; the second argument without a name

    POSITIONALS = ("source", "target")

    def convert(self) -> None:
        to_hf(self.source, self.target)
        print(f"{self.target}: written")


@dataclass(frozen=True)
class ToPeftConfig:
    source: Path  # a model in this package's format; the first argument without a name
    target: Path  # the new directory; the second argument without a name
    base: str  # the model that PEFT loads them on, without factors: a name or a directory of Hugging Face's

    POSITIONALS = ("source", "target")

    def convert(self) -> None:
        to_peft(open_ours(self.source), self.base, self.target)
        print(f"{self.target}: written")


@dataclass(frozen=True)
class MergeConfig:
    source: Path  # a model in this package's format; the first argument without a name
    target: Path  # the new directory; the second argument without a name

    POSITIONALS = ("source", "target")

    def merge(self) -> None:
        merge(self.source, self.target)
        print(f"{self.target}: written")


@dataclass(frozen=True)
class VerifyConfig:
    source: Path  # a model in this package's format; the first argument without a name

    POSITIONALS = ("source",)

    def verify(self) -> None:
        open_ours(self.source).verify()
        print(f"{self.source}: whole")


COMMANDS = {
    "to-jax": (ToJaxConfig, ToJaxConfig.convert),
    "to-hf": (ToHfConfig, ToHfConfig.convert),
    "to-peft": (ToPeftConfig, ToPeftConfig.convert),
    "merge": (MergeConfig, MergeConfig.merge),
    "verify": (VerifyConfig, VerifyConfig.verify),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
