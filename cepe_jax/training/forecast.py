"""What a run will read, compute and take, told before it runs."""

from collections.abc import Iterator, Sequence

from cepe_jax.cost import CHIPS

USUAL_MFU = 0.4  # of a run that goes well


def forecast(
    *,
    steps: int,
    batch_size: int,
    tokens: int,
    flops: float,
    devices: str,
    peak_flops: float | None,
    examples: dict[str, int],
    weights: Sequence[float],
) -> Iterator[str]:
    """Lines for people. `tokens` and `flops` are of a step, `peak_flops` of all devices per second.

    `examples`: how many each dataset has; `weights`: their shares of the mixture.
    """
    yield f"{steps:,} steps of {batch_size:,} sequences and {tokens:,} tokens: {steps * tokens:,} tokens"
    yield f"{flops / 1e12:,.3f} TFLOP a step: {steps * flops:.3e} FLOP"
    if peak_flops is None:
        hours = {name: steps * flops / USUAL_MFU / chip.peak_flops / 3600 for name, chip in CHIPS.items()}
        each = ", ".join(f"{time:,.0f} of one {name}" for name, time in hours.items())
        yield f"{devices}: how fast they can be is not known; hours at an MFU of {USUAL_MFU:.0%}: {each}"
    else:
        hours = steps * flops / peak_flops / 3600
        yield (
            f"{devices}, {peak_flops / 1e12:,.0f} TFLOP/s at the most: {hours:,.1f} hours, "
            f"and {hours / USUAL_MFU:,.1f} at an MFU of {USUAL_MFU:.0%}"
        )
    for (name, count), weight in zip(examples.items(), weights, strict=True):
        epochs = steps * batch_size * weight / sum(weights) / count
        yield f"{name}: {epochs:,.2f} times each of its {count:,} examples"
