"""One stage of training: a decoder from scratch (lm), the encoder (mlm), the warm-up, the main stage (cepe)."""

from cepe_jax.cli import parse, run
from cepe_jax.training.settings import TrainConfig
from cepe_jax.training.stages import launch

if __name__ == "__main__":
    run(lambda: print(launch(parse(TrainConfig))))
