"""Train one stage: a decoder from scratch (lm), the encoder (mlm), the warm-up (warmup), the main stage (cepe, ceped).

python scripts/train.py --config configs/quickstart_decoder.yaml --data=data/documents --out=runs/decoder
python scripts/train.py --config configs/train_cepe.yaml --data=data --cepe=runs/warmup/model --out=runs/cepe
"""

from cepe_jax.commands import run_script
from cepe_jax.training.run import dry_run, launch
from cepe_jax.training.settings import TrainConfig


def train(config: TrainConfig) -> None:
    for line in dry_run(config) if config.dry_run else [launch(config)]:
        print(line)


COMMANDS = {"": (TrainConfig, train)}

if __name__ == "__main__":
    run_script(__doc__, COMMANDS)
