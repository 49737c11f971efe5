"""Options, the race that a benchmark runs, and the summary at the end."""

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch

from slowfast_fast.bench.cases import DIRECTIONS, Case
from slowfast_fast.bench.leg import PRECISIONS, Leg
from slowfast_fast.bench.measure import Measurement
from slowfast_fast.bench.network import DEFAULT_NETWORK, TRAINED, TRAINING, NetworkCase
from slowfast_fast.bench.report import busy, heading, machine, rates, table, versions
from slowfast_fast.bench.run import COMPILED, find_cases, prepare
from slowfast_fast.bench.summary import summary_text

MEASUREMENTS = pytest.StashKey[list[Measurement]]()
BUSY = pytest.StashKey[str | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slowfast_fast")
    group.addoption("--race-rounds", type=int, default=10, help="rounds of each case (default: 10)")
    group.addoption("--race-dtype", choices=sorted(PRECISIONS), help="default: float32; of training on a GPU bfloat16")
    group.addoption("--race-device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    group.addoption("--race-crop", type=int, help="pixels, height and width (default: 224; of training on a CPU 112)")
    group.addoption("--race-batch", type=int, help="clips (default: 1; of training 2 on a CPU, 32 on a GPU)")
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
    """One test for each shape and direction of the op that the test module names; or, where it trains, for each
    network that has targets there."""
    if "case" in metafunc.fixturenames:
        config, module = metafunc.config, metafunc.module
        trains = getattr(module, "TRAINS", False)
        usual = TRAINING[_device(config).type] if trains else Leg("float32")
        given = [config.getoption(f"--race-{name}") for name in ("dtype", "batch", "crop")]
        leg = Leg(*(value or default for value, default in zip(given, astuple(usual), strict=True)))
        directions = getattr(module, "DIRECTIONS", tuple(DIRECTIONS))
        cases = find_cases([module.OP], directions, leg, TRAINED if trains else (DEFAULT_NETWORK,))
        metafunc.parametrize("case", cases, ids=[case.name.split(" ", 1)[1].replace(" ", "-") for case in cases])


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
