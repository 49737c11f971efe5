"""The whole network: eval forward."""

OP, DIRECTIONS = "slowfast", ("fwd",)


def test_slowfast(race, case):
    race(case)
