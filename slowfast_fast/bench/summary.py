"""The questions that a run of the benchmarks answers: how many times faster than stock, how near to what the machine
can do, and is that fast enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .cases import DIRECTIONS
from .leg import Leg
from .measure import FASTEST_STOCK, LIMIT, MILLISECOND, Measurement
from .network import DEFAULT_NETWORK, NETWORK_DIRECTIONS, NETWORKS, OP, TRAINED, TRAINING, NetworkCase
from .shapes import Shape, network_shapes

STOCK, CHANNELS_LAST = "stock", "stock channels_last_3d"


@dataclass(frozen=True)
class Goal:
    """How many times faster than a baseline ours is: in the sum over the network's shapes, or at the worst of them.

    In the sum every shape counts as often as the network runs it. `target` is the ratio to reach, in the leg `at`, or
    where that is None on a CPU in float32 with two threads or on a GPU in any precision; None where the ratio is only
    for information. `pathway` None means all of them, `bound` "memory" or "compute" those that this one limits.
    `network`: which one, of a goal about a whole network. `memory`: not the time is meant but the peak memory, and the
    ratio is ours over the baseline's, of which `target` is the most.
    """

    op: str
    direction: str
    baseline: str
    target: float | None
    pathway: str | None = None
    worst: bool = False
    bound: str | None = None
    network: str | None = None
    at: Leg | None = None
    memory: bool = False

    def __str__(self) -> str:
        direction = (NETWORK_DIRECTIONS if self.network else DIRECTIONS)[self.direction]
        where = f"{self.pathway} pathway" if self.pathway else "network"
        shape = f"{self.bound}-bound shape" if self.bound else "shape"
        over = f"worst {shape} of the {where}" if self.worst else f"sum over the {where}"
        over = f" {self.network}" if self.network else f", {over}"
        what = f"{self.op}{over} {direction}" if self.network else f"{self.op} {direction}{over}"
        what += ", peak memory" if self.memory else ""
        return f"{what}, against {self.baseline}"

    def selects(self, shape: Shape) -> bool:
        return self.op == shape.op and self.pathway in (None, shape.pathway)

    def covers(self, measurement: Measurement) -> bool:
        case = measurement.case
        if case.direction != self.direction:
            return False
        if isinstance(case, NetworkCase):
            return self.network == case.network
        return self.selects(case.shape) and (self.bound is None or self.bound == measurement.bound)


def _network_goals(baselines: Sequence[str], targets: Mapping[str, float], at: Leg) -> tuple[Goal, ...]:
    """The eval forward of every network against the baselines; `targets` are those of the default one in the leg."""
    return tuple(
        Goal(OP, "fwd", baseline, targets.get(baseline) if network == DEFAULT_NETWORK else None, network=network, at=at)
        for network in NETWORKS
        for baseline in baselines
    )


def _training_goals(targets: Mapping[str, float | None], memory: float, at: Leg) -> tuple[Goal, ...]:
    """The training step of every network, whose peak memory is held against stock's; targets are for some of them."""
    return tuple(
        Goal(OP, "bwd", baseline, target if network in TRAINED else None, network=network, at=at, memory=of_memory)
        for network in NETWORKS
        for baseline, target, of_memory in [*((*goal, False) for goal in targets.items()), (STOCK, memory, True)]
    )


CPU_GOALS = (
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
    *_network_goals(
        (STOCK, CHANNELS_LAST, "torch.compile", "OpenVINO", LIMIT),
        {STOCK: 2.1, "torch.compile": 1.2, "OpenVINO": 1.1, LIMIT: 0.85},
        at=Leg("float32", 1, 224),
    ),
    *_training_goals(
        {STOCK: 1.5, CHANNELS_LAST: None, "torch.compile": None, FASTEST_STOCK: 1.2, LIMIT: None},
        memory=0.6,
        at=TRAINING["cpu"],
    ),
)
CUDA_GOALS = (
    *(
        goal
        for op in ("temporal_conv", "lateral_concat")
        for direction in DIRECTIONS
        for goal in (
            Goal(op, direction, STOCK, None if op == "temporal_conv" else {"fwd": 3.0, "bwd": 2.0}[direction]),
            Goal(op, direction, FASTEST_STOCK, 1.0, worst=True),
            Goal(op, direction, LIMIT, 0.7, worst=True, bound="memory"),
            Goal(op, direction, LIMIT, 0.6, worst=True, bound="compute"),
        )
    ),
    *_network_goals(
        (STOCK, CHANNELS_LAST, FASTEST_STOCK, LIMIT),
        {STOCK: 4.0, FASTEST_STOCK: 2.0, LIMIT: 0.6},
        at=Leg("bfloat16", 32, 256),
    ),
    Goal(OP, "fwd", MILLISECOND, 1.0, network=DEFAULT_NETWORK, worst=True, at=Leg("bfloat16", 1, 256)),
    *_training_goals(
        {STOCK: None, CHANNELS_LAST: None, FASTEST_STOCK: 2.0, LIMIT: None}, memory=0.55, at=TRAINING["cuda"]
    ),
)
GOALS = {"cpu": CPU_GOALS, "cuda": CUDA_GOALS}


@dataclass(frozen=True)
class Answer:
    """A goal, the ratio measured in a leg (None where the baseline or ours did not run), and over how many shapes."""

    goal: Goal
    leg: Leg
    ratio: float | None
    measured: int
    expected: int
    comparable: bool  # the target is meant for this device and precision

    @property
    def target(self) -> float | None:
        return self.goal.target if self.comparable else None

    @property
    def met(self) -> bool | None:
        """None when there is no target for this run, or not every shape was measured."""
        if self.target is None or self.ratio is None or self.measured < self.expected:
            return None
        return self.ratio <= self.target if self.goal.memory else self.ratio >= self.target

    def __str__(self) -> str:
        share = self.goal.memory or self.goal.baseline == LIMIT
        unit = (lambda value: f"{value:.0%}") if share else (lambda value: f"{value:.2f}x")
        ratio = "not measured" if self.ratio is None else unit(self.ratio)
        target = "" if self.target is None else f"target {unit(self.target)}{' at most' if self.goal.memory else ''}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        partial = "" if self.measured == self.expected else f"({self.measured} of {self.expected} shapes)"
        return f"{self.goal!s:<101} {ratio:>12}  {target} {verdict} {partial}".rstrip()


def summarise(measurements: Sequence[Measurement]) -> list[Answer]:
    """Leg by leg, an answer to every goal of the device that any of the measurements is about."""
    legs: dict[Leg, list[Measurement]] = {}
    for measurement in measurements:
        legs.setdefault(measurement.case.leg, []).append(measurement)
    return [
        answer for leg, group in legs.items() for goal in GOALS[group[0].device] for answer in _answer(goal, leg, group)
    ]


def summary_text(measurements: Sequence[Measurement]) -> str:
    """The answers under a heading for each leg."""
    lines: list[str] = []
    leg = None
    for answer in summarise(measurements):
        if answer.leg != leg:
            leg = answer.leg
            lines.append(f"{leg}:")
        lines.append(f"  {answer}")
    return "\n".join(lines)


def _answer(goal: Goal, leg: Leg, measurements: Sequence[Measurement]) -> list[Answer]:
    """The answer of one leg, or none where it measured nothing that the goal is about."""
    covered = [measurement for measurement in measurements if goal.covers(measurement)]
    if not covered:
        return []
    if goal.network:
        expected = 1
    else:
        expected = sum(goal.selects(shape) for shape in network_shapes())
        # Whether a shape is bound by memory is known once it is measured.
        expected -= sum(replace(goal, bound=None).covers(m) and not goal.covers(m) for m in measurements)
    comparable = leg == goal.at if goal.at else covered[0].device == "cuda" or leg.precision == "float32"
    if goal.memory:
        ratio = covered[0].peak_ratio(goal.baseline)
    else:
        ratio = (worst_ratio if goal.worst else summed_ratio)(covered, goal.baseline)
    return [Answer(goal, leg, ratio, len(covered), expected, comparable)]


def summed_ratio(measurements: Sequence[Measurement], baseline: str) -> float | None:
    """Time of the baseline over time of ours, each summed over the measurements as often as the network runs them."""
    if any(measurement.ratio(baseline) is None for measurement in measurements):
        return None
    theirs = sum(m.occurrences * (m.baseline_seconds(baseline) or 0) for m in measurements)
    return theirs / sum(m.occurrences * m.median(m.ours) for m in measurements)


def worst_ratio(measurements: Sequence[Measurement], baseline: str) -> float | None:
    """The smallest ratio among the measurements."""
    ratios = [measurement.ratio(baseline) for measurement in measurements]
    return None if None in ratios else min(ratio for ratio in ratios if ratio is not None)
