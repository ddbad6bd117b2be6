"""One stage of training: a decoder from scratch (lm), the encoder (mlm), the warm-up, the main stage (cepe)."""

from cepe_jax.cli import parse, run
from cepe_jax.training.run import dry_run, launch
from cepe_jax.training.settings import TrainConfig


def main() -> None:
    config = parse(TrainConfig)
    for line in dry_run(config) if config.dry_run else [launch(config)]:
        print(line)


if __name__ == "__main__":
    run(main)
