"""The whole network: eval forward, and a training step without the optimizer."""

OP = "slowfast"


def test_slowfast(race, case):
    race(case)
