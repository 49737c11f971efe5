"""Training steps of the whole network: forward, loss, backward and SGD, and the peak memory of a step."""

OP, DIRECTIONS, TRAINS = "slowfast", ("bwd",), True


def test_training(race, case):
    race(case)
