"""The questions that a run of the benchmarks answers: how many times faster than stock, and is that fast enough."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cases import DIRECTIONS
from .measure import Measurement
from .network import NetworkCase
from .shapes import Shape, network_shapes

STOCK, CHANNELS_LAST = "stock", "stock channels_last_3d"


@dataclass(frozen=True)
class Goal:
    """How many times faster than a baseline ours is: in the sum over the network's shapes, or at the worst of them.

    In the sum every shape counts as often as the network runs it. `target` is the ratio to reach on a CPU in float32
    with two threads, None where the ratio is only for information. `pathway` None means all of them.
    """

    op: str
    direction: str
    baseline: str
    target: float | None
    pathway: str | None = None
    worst: bool = False

    def __str__(self) -> str:
        where = f"{self.pathway} pathway" if self.pathway else "network"
        over = f"worst shape of the {where}" if self.worst else f"sum over the {where}"
        over = "" if self.op == "slowfast" else f", {over}"
        return f"{self.op} {DIRECTIONS[self.direction]}{over}, against {self.baseline}"

    def selects(self, shape: Shape) -> bool:
        return self.op == shape.op and self.pathway in (None, shape.pathway)

    def covers(self, measurement: Measurement) -> bool:
        case = measurement.case
        if case.direction != self.direction:
            return False
        return self.op == "slowfast" if isinstance(case, NetworkCase) else self.selects(case.shape)


GOALS = (
    Goal("temporal_conv", "fwd", STOCK, 3.0, pathway="fast"),
    Goal("temporal_conv", "fwd", STOCK, 1.5),
    Goal("temporal_conv", "fwd", CHANNELS_LAST, None, pathway="fast"),
    Goal("temporal_conv", "fwd", CHANNELS_LAST, None),
    Goal("temporal_conv", "fwd", CHANNELS_LAST, 1.0, worst=True),
    Goal("lateral_concat", "fwd", STOCK, 2.0),
    Goal("lateral_concat", "fwd", CHANNELS_LAST, None),
    Goal("temporal_conv", "bwd", STOCK, 1.0),
    Goal("temporal_conv", "bwd", CHANNELS_LAST, None),
    Goal("temporal_conv", "bwd", STOCK, None, worst=True),
    Goal("lateral_concat", "bwd", STOCK, 1.0),
    Goal("lateral_concat", "bwd", CHANNELS_LAST, None),
    Goal("lateral_concat", "bwd", STOCK, None, worst=True),
    Goal("slowfast", "fwd", STOCK, None),
    Goal("slowfast", "fwd", CHANNELS_LAST, None),
    Goal("slowfast", "bwd", STOCK, None),
    Goal("slowfast", "bwd", CHANNELS_LAST, None),
)


@dataclass(frozen=True)
class Answer:
    """A goal, the ratio measured (None where the baseline or ours did not run), and on how many of its shapes."""

    goal: Goal
    ratio: float | None
    measured: int
    expected: int
    comparable: bool  # the target is meant for this device and dtype

    @property
    def target(self) -> float | None:
        return self.goal.target if self.comparable else None

    @property
    def met(self) -> bool | None:
        """None when there is no target for this run, or not every shape was measured."""
        if self.target is None or self.ratio is None or self.measured < self.expected:
            return None
        return self.ratio >= self.target

    def __str__(self) -> str:
        ratio = "not measured" if self.ratio is None else f"{self.ratio:.2f}x"
        target = "" if self.target is None else f"target {self.target:.1f}x"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        partial = "" if self.measured == self.expected else f"({self.measured} of {self.expected} shapes)"
        return f"{self.goal!s:<101} {ratio:>12}  {target} {verdict} {partial}".rstrip()


def summarise(measurements: Sequence[Measurement]) -> list[Answer]:
    """An answer to every goal that any of the measurements is about."""
    answers = []
    for goal in GOALS:
        covered = [measurement for measurement in measurements if goal.covers(measurement)]
        if not covered:
            continue
        expected = 1 if goal.op == "slowfast" else sum(goal.selects(shape) for shape in network_shapes())
        comparable = all(m.device == "cpu" and m.case.dtype is torch.float32 for m in covered)
        combine = worst_ratio if goal.worst else summed_ratio
        answers.append(Answer(goal, combine(covered, goal.baseline), len(covered), expected, comparable))
    return answers


def summed_ratio(measurements: Sequence[Measurement], baseline: str) -> float | None:
    """Time of the baseline over time of ours, each summed over the measurements as often as the network runs them."""
    if any(measurement.ratio(baseline) is None for measurement in measurements):
        return None
    theirs = sum(m.occurrences * m.median(baseline) for m in measurements)
    return theirs / sum(m.occurrences * m.median(m.ours) for m in measurements)


def worst_ratio(measurements: Sequence[Measurement], baseline: str) -> float | None:
    """The smallest ratio among the measurements."""
    ratios = [measurement.ratio(baseline) for measurement in measurements]
    return None if None in ratios else min(ratio for ratio in ratios if ratio is not None)
