"""The benchmarks of whole networks judged, as test_bench.py judges the others."""

from dataclasses import replace

import pytest
from test_bench import CPU, measurement

from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import NETWORK_GEMM_SIZE
from slowfast_fast.bench.network import FROZEN, NetworkCase
from slowfast_fast.bench.report import table
from slowfast_fast.bench.run import prepare
from slowfast_fast.bench.summary import STOCK, summarise
from slowfast_fast.bench.variants import OURS


@pytest.mark.parametrize(("network", "direction"), [("R50 4x16", "fwd"), ("R50 8x8", "bwd")])
def test_network_variants_agree(network, direction):
    found, _ = prepare(NetworkCase(Leg("float32", crop=32), direction, network), CPU, compile=False)
    expected = {"stock", "stock channels_last_3d", OURS} | ({FROZEN} if direction == "fwd" else set())
    assert expected <= set(found.variants), found.unavailable
    assert set(found.unavailable) <= {"torch.compile", "OpenVINO"} | ({FROZEN} if direction == "bwd" else set())
    assert found.ours == (FROZEN if direction == "fwd" else OURS)


def test_targets_of_a_network():
    found = measurement("R50 8x8", ours=[1000.0], stock=[2200.0], copy=[0.5], gemm=[100.0])
    found.seconds |= {"torch.compile": [1.1], "OpenVINO": [1.2]}
    answers = {answer.goal.baseline: answer for answer in summarise([found])}
    assert (answers[STOCK].ratio, answers[STOCK].target, answers[STOCK].met) == (pytest.approx(2.2), 2.1, True)
    assert (answers["torch.compile"].met, answers["OpenVINO"].met) == (False, True)
    assert answers[STOCK].goal.network == "R50 8x8"
    # A target is that of one batch and crop; elsewhere a ratio is for information.
    found.case = replace(found.case, leg=Leg("float32", 8))
    assert {answer.target for answer in summarise([found])} == {None}


def test_figures_of_a_network():
    found = measurement("R50 8x8", ours=[10.0, 20.0, 30.0], stock=[40.0], copy=[1.0], gemm=[100.0])
    found.case = replace(found.case, leg=Leg("float32", 8))
    assert found.clips_per_second(OURS) == pytest.approx(8 / 20e-3)
    assert found.percentile(OURS, 95) == pytest.approx(29e-3)
    assert found.gemm_gigaflops_per_second == pytest.approx(2 * NETWORK_GEMM_SIZE["cpu"] ** 3 / 0.1 / 1e9)
    header, ours = table(found).splitlines()[1:3]
    assert "clips/s" in header
    assert header.endswith("p95 ms")
    assert "400.0" in ours
    assert ours.endswith("29.000")
