"""The command that makes the table of a device, on stand-ins for devices and clocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_backend import use_backends

from slowfast_fast import choosing, tune
from slowfast_fast.backend import BACKENDS, KERNELS
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import CpuClock
from slowfast_fast.cli import main

CPU = torch.device("cpu")
# The others have one compiled backend on a device, and so nothing to choose between.
TUNED = [op for op in KERNELS if op.removesuffix("_bn") in ("temporal_conv", "lateral_concat")]


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's, under two names."""
    backends = {"first": replace(BACKENDS["cpu"], name="first"), "second": replace(BACKENDS["cpu"], name="second")}
    use_backends(monkeypatch, backends)
    for module in ("tune", "ops._common"):
        monkeypatch.setattr(f"slowfast_fast.{module}.BACKENDS", backends)


def test_every_op_and_direction_is_measured() -> None:
    found = list(tune.problems(2, 32))
    assert {(p.op, p.direction) for p in found} == {(op, direction) for op in TUNED for direction in ("fwd", "bwd")}
    assert {p.shape.kernel for p in found if p.shape.op == "temporal_conv"} == {1, 3}
    assert len(set(found)) == len(found)


def test_table(two_backends: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The backend with the smaller sum over a class wins, and auto finds the entry under the key that it asks with."""

    def measured(problem: tune.Problem, leg: Leg, *_: Any) -> dict[str, float]:
        first = 1.0 if problem.shape.channels >= 512 else 3.0
        return {"first": first, "second": 2.0}

    lines: list[str] = []
    kept: list[dict[str, Any]] = []
    table = tune.tune(
        CPU, precisions=("float32",), batch=1, crop=32, measured=measured, report=lines.append, keep=kept.append
    )
    assert [len(so_far["fastest"]) for so_far in kept] == sorted(len(so_far["fastest"]) for so_far in kept)
    assert (len(kept), kept[-1]) == (len(lines), table)
    wide = choosing.table_key("temporal_conv", "bwd", torch.float32, False, "1024->256 temporal")
    narrow = choosing.table_key("lateral_concat_bn", "fwd", torch.float32, False, "32->64 temporal strided")
    assert table["fastest"][wide] == "first"
    assert table["fastest"][narrow] == "second"
    assert table["microseconds"][narrow]["second"] < table["microseconds"][narrow]["first"]
    assert len(lines) == len(list(tune.problems(1, 32)))
    monkeypatch.setattr(choosing, "TABLES", tmp_path)
    monkeypatch.setattr(choosing, "_tables", {})
    path = tune.write(table, None)
    assert path == tmp_path / "cpu.json"
    assert choosing.table("cpu")[wide] == "first"
    assert json.loads(path.read_text())["made"]["torch"] == torch.__version__


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("op", TUNED)
def test_measure(two_backends: None, op: str, direction: str) -> None:
    shape = next(p.shape for p in tune.problems(1, 32) if p.op == op and p.shape.channels <= 64)
    problem = tune.Problem(op, direction, shape)
    times = tune.measure(problem, Leg("float32"), CPU, 2, CpuClock())
    assert list(times) == ["first", "second"]
    assert all(time > 0 for time in times.values())


def test_a_backend_that_fails_is_not_chosen(two_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one shape is enough; and it costs no figure of the others."""
    runner = tune.runner
    found = [p for p in tune.problems(1, 32) if (p.op, p.direction) == ("temporal_conv", "fwd")][:4]

    def run(problem: tune.Problem, name: str, *arguments: Any) -> Any:
        if name == "first" and problem == found[1]:
            raise RuntimeError("no such kernel")
        return runner(problem, name, *arguments)

    monkeypatch.setattr(tune, "runner", run)
    monkeypatch.setattr(tune, "problems", lambda batch, crop: found)
    with pytest.warns(UserWarning, match="first failed at .*no such kernel"):
        table = tune.tune(CPU, precisions=("float32",), batch=1, crop=32, rounds=2, report=lambda line: None)
    failed = {key for key, times in table["microseconds"].items() if "first" not in times}
    assert 0 < len(failed) < len(table["microseconds"])
    assert all(table["fastest"][key] == "second" for key in failed)


def test_nothing_to_choose_between() -> None:
    message = "tune needs two backends to choose between; on cpu there is cpu"
    with pytest.raises(ValueError, match=message):
        tune.tune(CPU)
    result = CliRunner().invoke(main, ["tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu() -> None:
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 2
    assert "this machine has none" in result.output
