"""From a case to a measurement: build every variant, check that they agree with float64, then race them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..backend import BACKENDS
from ..choosing import choose
from ..models import list_models
from .apart import device_is_lost
from .cases import DIRECTIONS, Case
from .family import FAMILY, FamilyCase, FamilyProblem
from .leg import Leg
from .measure import (
    FAILED,
    NETWORK_TOLERANCE,
    TOLERANCE,
    HostClock,
    Measurement,
    Race,
    clock_for,
    disagreement,
    limits,
    tolerance,
)
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
)
from .shapes import network_shapes
from .variants import OURS, STOCK, Problem, Runner, Unavailable, ours, stock_eager

OPS = ("temporal_conv", "lateral_concat", OP)
COMPILED = "torch.compile"
FEWEST_ROUNDS = 3  # of which a median says something


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

    A variant that can't run the case, raises or gives wrong numbers is left out; `Measurement.unavailable` says why.
    """
    field = _field(case, device, seed)
    measurement = Measurement(case, device.type, field.chosen, checked_clips=field.checked)
    calls: dict[str, Callable[[], object]] = {}
    left_out = {} if compile else {COMPILED: "left out: compiling every case takes minutes"}
    if not autocast:
        left_out[AUTOCAST] = "left out: a processor without bfloat16 instructions takes many times as long"
    for name, build in field.builders.items():
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
        except Exception as error:  # the other variants are still worth measuring
            if device_is_lost(device):
                raise RuntimeError(f"{name}: {error}") from error
            measurement.unavailable[name] = f"{FAILED}{type(error).__name__}: {error}"
            continue
        if name == AUTOCAST:
            expected = {key: value for key, value in field.exact.items() if key in results}
            bounds = tolerance(NETWORK_TOLERANCE, replace(case.leg, precision="bfloat16"), device)
        else:
            expected, bounds = field.exact, field.allowed
        if field.checked is not None:
            results = {"y": results["y"][field.checked]}
        measurement.errors[name], wrong = disagreement(results, expected, bounds)
        del results  # with the gradients in it
        if wrong is None:
            calls[name] = runner
            if isinstance(case, NetworkCase) and case.direction == "bwd":
                measurement.peaks[name] = peak_bytes(runner, device)
        else:
            measurement.unavailable[name] = wrong
    waited_for = device.type == "cuda" and isinstance(case, NetworkCase) and case.direction == "fwd"
    race = Race({**calls, **limits(case, device)}, clock_for(device), HostClock(device) if waited_for else None)
    race.warm_up()
    measurement.seconds, measurement.latencies = race.seconds, race.latencies
    return measurement, race


@dataclass(frozen=True)
class _Field:
    """Who races in a case, and what they are held against before."""

    builders: Mapping[str, Callable[[], Runner]]
    chosen: str  # the variant that `auto` picks
    exact: dict[str, torch.Tensor]  # the results in float64
    allowed: tuple[float, float]  # how far from those a variant may be
    checked: list[int] | None = None  # the clips that `exact` is of, None for all


def _field(case: Case | NetworkCase, device: torch.device, seed: int) -> _Field:
    if isinstance(case, NetworkCase):
        network: Any  # each kind with the variants that take it
        variants: Mapping[str, Callable[[Any], Runner]]
        if isinstance(case, FamilyCase):
            network, variants = FamilyProblem(case, device, seed), FAMILY
        else:
            network, variants = NetworkProblem(case, device, seed), NETWORK_STOCK | NETWORK_OURS
        training = case.direction == "bwd"
        return _Field(
            {name: partial(build, network) for name, build in variants.items()},
            OURS if training else FROZEN,
            _without_search(network.exact),
            tolerance(NETWORK_TOLERANCE, case.leg, device),
            None if training or len(network.clips.checked) == case.batch else network.clips.checked,
        )
    problem = Problem.random(case, device, seed)
    stock = {name: lambda build=build: build(problem) for name, build in STOCK.items()}
    # On a GPU the plain PyTorch of the reference backend is what stock channels_last_3d runs.
    backends = [name for name, backend in BACKENDS.items() if backend.library or device.type == "cpu"]
    own = {f"{OURS} {backend}": lambda backend=backend: ours(problem, backend) for backend in backends}
    op = problem.op if case.direction == "bwd" else case.shape.op
    chosen = choose(op, problem.x, problem.weight, case.shape.stride, tf32=case.leg.tf32).backend
    exact = _without_search(stock_eager(problem.to(dtype=torch.float64)))
    return _Field({**stock, **own}, f"{OURS} {chosen}", exact, tolerance(TOLERANCE, case.leg, device))


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
    seconds: float | None = None,
    compile: bool = True,
    autocast: bool = True,
    seed: int = 0,
) -> Measurement:
    """Measure a case under the settings of its leg, in so many rounds, or fewer once they took ``seconds``."""
    with case.leg.applied():
        measurement, race = prepare(case, device, compile=compile, autocast=autocast, seed=seed)
        begun = time.monotonic()
        for done in range(rounds):
            if seconds is not None and done >= FEWEST_ROUNDS and time.monotonic() - begun >= seconds:
                break
            race.round()
    return measurement
