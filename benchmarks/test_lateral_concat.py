"""`lateral_concat` with BatchNorm and ReLU, at every shape of SlowFast R50 8x8, in eval and in training."""

OP = "lateral_concat"


def test_lateral_concat(race, case):
    race(case)
