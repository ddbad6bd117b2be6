"""Prepare data for training. Without a command, documents are prepared.

documents: Tokenise documents and divide them into training, test and retrieval.
    python scripts/prepare_data.py documents --input=documents --out=data/documents --tokenizer=llama-2-7b
    python scripts/prepare_data.py --config configs/quickstart_data.yaml --input=texts --out=data/documents

conversations: Tokenise conversations as a chat template writes them, to train stage sft.
    python scripts/prepare_data.py conversations --input=chats --out=data/chats --tokenizer=llama-3-8b
    python scripts/prepare_data.py conversations --input=chats --out=data/chats --tokenizer=cepe-chat \\
        --bad_share=0.01

preferences: Tokenise pairs of answers, to train stages reward and dpo.
    python scripts/prepare_data.py preferences --input=pairs --out=data/preferences --tokenizer=llama-3-8b
    python scripts/prepare_data.py preferences --input=rpr --out=data/preferences --tokenizer=cepe-chat \\
        --context=encoder

plant: Write pairs of which the context alone says which answer is better, to try a reward model on.
    python scripts/prepare_data.py plant --out=planted
    python scripts/prepare_data.py plant --out=planted --rows=20000 --negations=0.3

deduplicate: Leave out documents that nearly are earlier ones, by MinHash.
    python scripts/prepare_data.py deduplicate --data=data/documents --out=data/unique
    python scripts/prepare_data.py deduplicate --data=data/documents --out=data/unique --threshold=0.7 --workers=8

sample: Sample sequences for training from tokenised documents.
    python scripts/prepare_data.py sample --config configs/sample_filtered.yaml --data=data/documents \\
        --out=data/filtered
    python scripts/prepare_data.py sample --data=data/documents --out=data/packed --kind=packed --length=8192

retrieve: Retrieve passages for each sequence, none of them from its own documents.
    python scripts/prepare_data.py retrieve --data=data/windows --passages=data/documents --out=data/retrieved \\
        --k=16
    python scripts/prepare_data.py retrieve --data=data/windows --passages=data/documents --out=data/retrieved \\
        --k=16 \\
        --passage_length=128 --shard=0/4

teacher: Store the next tokens that a decoder expects after each token, for training by distillation.
    python scripts/prepare_data.py teacher --data=data/windows --model=llama-2-7b-chat --out=data/taught \\
        --dtype=bfloat16
    python scripts/prepare_data.py teacher --data=data/windows --model=llama-2-7b-chat --out=data/taught --top_k=100

reference: Store the log-probabilities of both answers of pairs, for stage dpo.
    python scripts/prepare_data.py reference --data=data/preferences --model=llama-3-8b --out=data/reference \\
        --dtype=bfloat16
    python scripts/prepare_data.py reference --data=data/preferences --model=cepe-chat --out=data/reference \\
        --num_chunks=4

tagcos: Select the records whose gradients, at checkpoints of a warm-up, stand for those of all (TAGCOS).
    python scripts/prepare_data.py tagcos --run=runs/warmup-sft --steps="[10, 20, 30]" --data=data/chats \\
        --out=data/coreset
    python scripts/prepare_data.py tagcos --run=runs/warmup-sft --steps="[10, 20, 30]" --data=data/chats \\
        --out=data/coreset \\
        --use_weights --features=data/chats-features --shard=0/4
"""

from cepe_jax.commands import run_script
from cepe_jax.data.conversations import ConversationConfig, prepare_conversations
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.duplicates import DeduplicateConfig, deduplicate
from cepe_jax.data.planted import PlantConfig, plant
from cepe_jax.data.preferences import PreferenceConfig, prepare_preferences
from cepe_jax.data.retrieval import RetrieveConfig, retrieve
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.selection.tagcos import TagcosConfig, tagcos
from cepe_jax.training.reference import ReferenceConfig, refer
from cepe_jax.training.teacher import TeacherConfig, teach

COMMANDS = {
    "": (PrepareConfig, prepare),
    "documents": (PrepareConfig, prepare),
    "conversations": (ConversationConfig, prepare_conversations),
    "plant": (PlantConfig, plant),
    "preferences": (PreferenceConfig, prepare_preferences),
    "deduplicate": (DeduplicateConfig, deduplicate),
    "sample": (SampleConfig, sample),
    "retrieve": (RetrieveConfig, retrieve),
    "reference": (ReferenceConfig, refer),
    "tagcos": (TagcosConfig, tagcos),
    "teacher": (TeacherConfig, teach),
}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
