"""The arithmetic of a dry run, by numbers that were worked out by hand."""

from cepe_jax.training.forecast import forecast

STEP = {"steps": 20_000, "batch_size": 128, "tokens": 2**20, "flops": 128 * 1.91e14, "devices": "16 x TPU v5 lite"}


def test_hours_tokens_and_epochs():
    lines = list(
        forecast(
            **STEP, peak_flops=16 * 1.97e14, examples={"filtered": 1_000_000, "packed": 400_000}, weights=[2.0, 1.0]
        )
    )
    assert lines == [
        "20,000 steps of 128 sequences and 1,048,576 tokens: 20,971,520,000 tokens",
        "24,448.000 TFLOP a step: 4.890e+20 FLOP",
        "16 x TPU v5 lite, 3,152 TFLOP/s at the most: 43.1 hours, and 107.7 at an MFU of 40%",
        "filtered: 1.71 times each of its 1,000,000 examples",
        "packed: 2.13 times each of its 400,000 examples",
    ]


def test_a_chip_that_is_not_known():
    lines = list(forecast(**STEP, peak_flops=None, examples={"data": 100}, weights=[1.0]))
    assert lines[2].startswith("16 x TPU v5 lite: how fast they can be is not known; hours at an MFU of 40%: ")
    assert "1,724 of one v5e" in lines[2].split(": ")[2]
    assert lines[3] == "data: 25,600.00 times each of its 100 examples"
