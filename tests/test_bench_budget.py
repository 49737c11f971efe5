"""What a run measures in the time that it has, in which order, and what can be made of a run that was cut short."""

import json

import pytest
from bench_testing import CPU, FLOAT32, SMALL, measurement
from click.testing import CliRunner

from slowfast_fast.bench import main
from slowfast_fast.bench import run as running
from slowfast_fast.bench.budget import Budget, most_wanted_first
from slowfast_fast.bench.cases import Case
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import Race
from slowfast_fast.bench.network import NETWORKS, NetworkCase
from slowfast_fast.bench.variants import OURS
from slowfast_fast.cli import main as cli


def networks(precision, batches, crops):
    return [NetworkCase(Leg(precision, b, c), "fwd", name) for c in crops for b in batches for name in NETWORKS]


@pytest.mark.parametrize(
    ("device", "precision", "first"),
    [("cpu", "float32", [(1, 224)]), ("cuda", "bfloat16", [(1, 256), (32, 256)])],
)
def test_most_wanted_first(device, precision, first):
    cases = networks(precision, (1, 8, 32), (224, 256))
    ordered = most_wanted_first(cases, device)
    wanted = [(case.network, case.batch, case.crop) for case in ordered[: len(first)]]
    assert wanted == [("R50 8x8", *leg) for leg in first], "they have the targets"
    flops = [case.flops for case in ordered[len(first) :]]
    assert flops == sorted(flops)
    assert sorted(map(cases.index, ordered)) == list(range(18))
    mixed = [*cases, Case(SMALL["temporal_conv"], "fwd", FLOAT32)]
    assert most_wanted_first(mixed, device) == mixed


def test_a_network_takes_as_long_as_its_flops_say(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("slowfast_fast.bench.budget.time.monotonic", lambda: now[0])
    small, large = (NetworkCase(Leg("float32", batch), "fwd") for batch in (1, 8))
    assert large.flops == 8 * small.flops
    clock = Budget(1000, rounds=10, case_seconds=100)
    assert clock.expected(small) == Budget.GUESS["NetworkCase"]
    assert clock.has_room_for(small)
    found = measurement("R50 8x8", ours=[1000.0] * 10, stock=[2900.0] * 10, copy=[50.0] * 10, gemm=[50.0] * 10)
    now[0] += 30 + 4.0 * 12
    clock.took(small, found)
    assert clock.expected(small) == pytest.approx(30 + 4.0 * 12)
    # 32 s a round: four rounds fill the seconds of a case, and two come before.
    assert clock.expected(large) == pytest.approx(30 + 32 * (4 + 2))
    assert clock.has_room_for(large)
    now[0] = 1100 - 30 - 32 * 6 + 1
    assert not clock.has_room_for(large)
    assert clock.has_room_for(small)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (4.5, 5), (None, 9)])
def test_rounds_of_a_case_that_takes_long(monkeypatch, seconds, rounds):
    now = [0.0]

    def second():
        now[0] += 1

    def prepare(case, device, **_):
        found = measurement("R50 8x8")
        race = Race({OURS: second}, running.clock_for(CPU))
        found.seconds = race.seconds
        return found, race

    monkeypatch.setattr(running, "prepare", prepare)
    monkeypatch.setattr("slowfast_fast.bench.run.time.monotonic", lambda: now[0])
    found = running.run(NetworkCase(FLOAT32, "fwd"), CPU, rounds=9, seconds=seconds)
    assert len(found.seconds[OURS]) == rounds


def test_a_run_cut_short_still_gives_table_and_chart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    seen = []

    def run(case, *_, **__):
        seen.append(case)
        if len(seen) > 2:
            raise SystemExit
        found = measurement(case.network, ours=[1000.0], stock=[2000.0 * len(seen)], copy=[1.0], gemm=[50.0])
        found.case = case
        return found

    monkeypatch.setattr(main, "run", run)
    path, png = tmp_path / "run.json", tmp_path / "run.png"
    with pytest.raises(SystemExit):
        main.bench(networks=list(NETWORKS), directions=["fwd"], device="cpu", batches=[1, 8], json=path)
    assert json.loads(path.read_text())["finished"] is False
    result = CliRunner().invoke(cli, ["results", str(path), "--png", str(png)])
    assert result.exit_code == 0, result.output
    assert "is of a run that did not finish" in result.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if line[0] == "|"]
    assert rows[0] == ["network", "ms (p50)", "p95", "clips/s", "% of the limit", "x stock"]
    assert [row[0] for row in rows[2:]] == ["R50 8x8 batch 1 at 224 fwd", "R50 4x16 batch 1 at 224 fwd"]
    assert [row[5] for row in rows[2:]] == ["2.00", "4.00"]
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_results_are_of_networks(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"cases": [], "machine": {}, "versions": {}}))
    result = CliRunner().invoke(cli, ["results", str(path)])
    assert result.exit_code == 2
    assert "there is no whole network in what these runs measured" in result.output
