"""From a case to a measurement: build every variant, check that they agree with float64, then race them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..backend import BACKENDS
from ..choosing import choose
from ..models import list_models
from .cases import DIRECTIONS, Case
from .family import FAMILY, FamilyCase, FamilyProblem
from .leg import Leg
from .measure import NETWORK_TOLERANCE, TOLERANCE, Measurement, Race, clock_for, disagreement, limits, tolerance
from .memory import peak_bytes
from .network import (
    AUTOCAST,
    DEFAULT_NETWORK,
    FROZEN,
    NETWORK_OURS,
    NETWORK_STOCK,
    NETWORKS,
    OP,
    NetworkCase,
    NetworkProblem,
    SlowFast,
)
from .shapes import network_shapes
from .variants import OURS, STOCK, Problem, Runner, Unavailable, ours, stock_eager

OPS = ("temporal_conv", "lateral_concat", OP)
COMPILED = "torch.compile"


def find_cases(
    ops: Sequence[str], directions: Sequence[str], leg: Leg, networks: Sequence[str] = (DEFAULT_NETWORK,)
) -> list[Case | NetworkCase]:
    """Every case for those ops (of `OPS`) and directions (of `cases.DIRECTIONS`), op by op: of "slowfast" the networks
    named (also by the names of registered models), of the others each shape of SlowFast R50 8x8.

    Raises:
        ValueError: an op, a direction or a network is unknown, or the crop is no multiple of 32, which the ops' shapes
            need.
    """
    for argument, values, known in (
        ("ops", ops, OPS),
        ("directions", directions, tuple(DIRECTIONS)),
        ("networks", networks, (*NETWORKS, *list_models())),
    ):
        for value in values:
            if value not in known:
                raise ValueError(f"{argument}: expected some of {known}, got {value!r}")
    shapes = [] if set(ops) == {OP} else network_shapes(leg.crop, batch=leg.batch)
    cases: list[Case | NetworkCase] = []
    for op in ops:
        for direction in directions:
            if op == OP:
                cases += [
                    (NetworkCase if network in NETWORKS else FamilyCase)(leg, direction, network)
                    for network in networks
                ]
            cases += [Case(shape, direction, leg) for shape in shapes if shape.op == op]
    return cases


def prepare(
    case: Case | NetworkCase, device: torch.device, *, compile: bool = True, autocast: bool = True, seed: int = 0
) -> tuple[Measurement, Race]:
    """The variants of a case, checked and warmed up, ready to run in rounds; and the measurement that the rounds fill.

    A variant that can't run the case, or gives wrong numbers, is left out; `Measurement.unavailable` says why.
    """
    builders, chosen, exact, allowed = _variants(case, device, seed)
    measurement = Measurement(case, device.type, chosen)
    calls: dict[str, Callable[[], object]] = {}
    left_out = {} if compile else {COMPILED: "left out: compiling every case takes minutes"}
    if not autocast:
        left_out[AUTOCAST] = "left out: a processor without bfloat16 instructions takes many times as long"
    for name, build in builders.items():
        if name in left_out:
            measurement.unavailable[name] = left_out[name]
            continue
        try:
            runner = build()
            results = runner()
        except Unavailable as reason:
            measurement.unavailable[name] = str(reason)
            continue
        except torch.OutOfMemoryError:
            measurement.unavailable[name] = "out of device memory"
            continue
        if name == AUTOCAST:
            expected = {key: value for key, value in exact.items() if key in results}
            bounds = tolerance(NETWORK_TOLERANCE, replace(case.leg, precision="bfloat16"), device)
        else:
            expected, bounds = exact, allowed
        measurement.errors[name], wrong = disagreement(results, expected, bounds)
        del results  # with the gradients in it
        if wrong is None:
            calls[name] = runner
            if isinstance(case, NetworkCase) and case.direction == "bwd":
                measurement.peaks[name] = peak_bytes(runner, device)
        else:
            measurement.unavailable[name] = wrong
    race = Race({**calls, **limits(case, device)}, clock_for(device))
    race.warm_up()
    measurement.seconds = race.seconds
    return measurement, race


def _variants(
    case: Case | NetworkCase, device: torch.device, seed: int
) -> tuple[dict[str, Callable[[], Runner]], str, dict[str, torch.Tensor], tuple[float, float]]:
    """Builders by name, the name that `auto` picks, the results in float64, and how far from them a variant may be."""
    if isinstance(case, FamilyCase):
        family = FamilyProblem(case, device, seed)
        return (
            {name: partial(build, family) for name, build in FAMILY.items()},
            FROZEN,
            _without_search(family.stock(torch.contiguous_format, torch.float64)),
            tolerance(NETWORK_TOLERANCE, case.leg, device),
        )
    if isinstance(case, NetworkCase):
        network = NetworkProblem(case, device, seed)
        variants = NETWORK_STOCK | NETWORK_OURS
        exact = _without_search(network.runner(SlowFast, torch.contiguous_format, dtype=torch.float64))
        return (
            {name: partial(build, network) for name, build in variants.items()},
            OURS if case.direction == "bwd" else FROZEN,
            exact,
            tolerance(NETWORK_TOLERANCE, case.leg, device),
        )
    problem = Problem.random(case, device, seed)
    stock = {name: lambda build=build: build(problem) for name, build in STOCK.items()}
    # On a GPU the plain PyTorch of the reference backend is what stock channels_last_3d runs.
    backends = [name for name, backend in BACKENDS.items() if backend.library or device.type == "cpu"]
    own = {f"{OURS} {backend}": lambda backend=backend: ours(problem, backend) for backend in backends}
    op = problem.op if case.direction == "bwd" else case.shape.op
    chosen = choose(op, problem.x, problem.weight, case.shape.stride, tf32=case.leg.tf32).backend
    exact = _without_search(stock_eager(problem.to(dtype=torch.float64)))
    return {**stock, **own}, f"{OURS} {chosen}", exact, tolerance(TOLERANCE, case.leg, device)


def _without_search(runner: Runner) -> dict[str, torch.Tensor]:
    """The results of a runner that is called this once, for which the fastest algorithm need not be found."""
    cudnn = torch.backends.cudnn
    search, cudnn.benchmark = cudnn.benchmark, False
    try:
        return runner()
    finally:
        cudnn.benchmark = search


def run(
    case: Case | NetworkCase,
    device: torch.device,
    *,
    rounds: int,
    compile: bool = True,
    autocast: bool = True,
    seed: int = 0,
) -> Measurement:
    """Measure a case under the settings of its leg."""
    with case.leg.applied():
        measurement, race = prepare(case, device, compile=compile, autocast=autocast, seed=seed)
        for _ in range(rounds):
            race.round()
    return measurement
