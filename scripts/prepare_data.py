"""Datasets for training: tokenised documents, then sequences sampled from them, then what is made for those.

python scripts/prepare_data.py --input=documents --out=data/documents --tokenizer=llama-2-7b
python scripts/prepare_data.py sample --config configs/sample_filtered.yaml --data=data/documents --out=data/filtered
python scripts/prepare_data.py retrieve --data=data/windows --passages=data/documents --out=data/retrieved --k=16
python scripts/prepare_data.py teacher --data=data/windows --model=llama-2-7b-chat --out=data/taught --dtype=bfloat16
"""

from cepe_jax.cli import run_command
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.retrieval import RetrieveConfig, retrieve
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.training.teacher import TeacherConfig, teach

COMMANDS = {
    "documents": (PrepareConfig, prepare),
    "sample": (SampleConfig, sample),
    "retrieve": (RetrieveConfig, retrieve),
    "teacher": (TeacherConfig, teach),
}

if __name__ == "__main__":
    run_command(COMMANDS, default="documents")
