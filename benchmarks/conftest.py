"""Options, the race that a benchmark runs, and the summary at the end."""

from collections.abc import Callable
from dataclasses import astuple
from itertools import product

import pytest
import torch

from slowfast_fast.bench.cases import DIRECTIONS, Case
from slowfast_fast.bench.leg import PRECISIONS, Leg
from slowfast_fast.bench.measure import Measurement
from slowfast_fast.bench.network import DEFAULT_NETWORK, NETWORKS, TRAINED, TRAINING, NetworkCase
from slowfast_fast.bench.report import busy, heading, machine, rates, table, versions
from slowfast_fast.bench.run import COMPILED, find_cases, prepare
from slowfast_fast.bench.summary import summary_text

MEASUREMENTS = pytest.StashKey[list[Measurement]]()
BUSY = pytest.StashKey[str | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slowfast_fast")
    group.addoption("--race-rounds", type=int, default=10, help="rounds of each case (default: 10)")
    group.addoption("--race-device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    for name, kind, help in (
        ("dtype", {"choices": sorted(PRECISIONS)}, "default: float32; of training on a GPU bfloat16"),
        ("batch", {"type": int}, "clips (default: 1; of training 2 on a CPU, 32 on a GPU)"),
        ("crop", {"type": int}, "pixels, height and width (default: 224; of training on a CPU 112)"),
        (
            "network",
            {},
            f"of test_slowfast.py and test_training.py: {', '.join(NETWORKS)} (default: {DEFAULT_NETWORK})",
        ),
    ):
        group.addoption(f"--race-{name}", action="append", help=f"{help}; repeatable", **kind)
    group.addoption("--race-threads", type=int, help="CPU threads (default: PyTorch's setting)")
    group.addoption("--race-out", help="write the figures of pack_pathways to this file")
    group.addoption("--race-compile", action="store_true", help=f"also race {COMPILED} (minutes of compilation)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASUREMENTS] = []
    config.stash[BUSY] = busy(machine(_device(config)))
    if config.getoption("--race-threads"):
        torch.set_num_threads(config.getoption("--race-threads"))


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--race-device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In each leg asked for, one test for each shape and direction of the op that the test module names; or for each
    network asked for, where it trains by default for those that have targets there."""
    if "case" in metafunc.fixturenames:
        config, module = metafunc.config, metafunc.module
        trains = getattr(module, "TRAINS", False)
        usual = TRAINING[_device(config).type] if trains else Leg("float32")
        given = [config.getoption(f"--race-{name}") for name in ("dtype", "batch", "crop")]
        legs = product(*(values or [default] for values, default in zip(given, astuple(usual), strict=True)))
        directions = getattr(module, "DIRECTIONS", tuple(DIRECTIONS))
        networks = config.getoption("--race-network") or (TRAINED if trains else (DEFAULT_NETWORK,))
        cases = [case for leg in legs for case in find_cases([module.OP], directions, Leg(*leg), networks)]
        metafunc.parametrize("case", cases, ids=[_id(case) for case in cases])


def _id(case: Case | NetworkCase) -> str:
    """The case's name, with what that does not tell of its leg."""
    leg = case.leg.precision if isinstance(case, NetworkCase) else f"{case.leg.precision} batch {case.leg.batch}"
    return f"{case.name.split(' ', 1)[1]} {leg}".replace(" ", "-")


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark) -> Callable[[Case | NetworkCase], Measurement]:
    """Call it with a case: pytest-benchmark times ours, and before each of its rounds every other variant runs once."""
    config = request.config

    def run(case: Case | NetworkCase) -> Measurement:
        with case.leg.applied():
            measurement, calls = prepare(case, _device(config), compile=config.getoption("--race-compile"))
            ours = measurement.ours
            assert ours in measurement.seconds, f"{ours} did not run: {measurement.unavailable[ours]}"
            rounds = config.getoption("--race-rounds")
            benchmark.group = DIRECTIONS[case.direction]
            benchmark.pedantic(calls.run, args=(ours,), setup=lambda: calls.round(without=ours), rounds=rounds)
        benchmark.extra_info.update(
            bytes=case.bytes,
            flops=case.flops,
            copy_gigabytes_per_second=measurement.copy_gigabytes_per_second,
            gemm_gigaflops_per_second=measurement.gemm_gigaflops_per_second,
            bound=measurement.bound,
            ours=ours,
            variants={name: rates(measurement, name) for name in measurement.variants},
            times_faster_than={name: measurement.ratio(name) for name in measurement.variants if name != ours},
            unavailable=measurement.unavailable,
            versions=versions(),
        )
        config.stash[MEASUREMENTS].append(measurement)
        return measurement

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measurements = config.stash[MEASUREMENTS]
    if not measurements:
        return
    terminalreporter.section("ours (*) against stock")
    lines = (heading(machine(_device(config))), config.stash[BUSY])
    terminalreporter.write_line("\n".join(filter(None, lines)) + "\n")
    for measurement in measurements:
        terminalreporter.write_line(table(measurement) + "\n")
    terminalreporter.write_line(summary_text(measurements))
    if not config.getoption("--race-compile"):
        terminalreporter.write_line(f"{COMPILED} was left out; --race-compile takes it in.")
