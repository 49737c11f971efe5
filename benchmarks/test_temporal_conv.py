"""`temporal_conv` with BatchNorm and ReLU, at every shape of SlowFast R50 8x8, in eval and in training."""

OP = "temporal_conv"


def test_temporal_conv(race, case):
    race(case)
