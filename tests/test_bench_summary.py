"""What is made of measurements: rates, the limit, sums over a network, verdicts on the targets."""

from dataclasses import replace

import pytest
from bench_testing import FLOAT32, SMALL, measurement

from slowfast_fast.bench.cases import DIRECTIONS
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import GEMM_SIZE
from slowfast_fast.bench.network import NETWORKS
from slowfast_fast.bench.shapes import network_shapes
from slowfast_fast.bench.summary import GOALS, STOCK, summarise, summary_text
from slowfast_fast.bench.variants import OURS


def test_rates_of_one_measurement():
    found = measurement(SMALL["temporal_conv"], ours=[2, 1, 9], stock=[6, 100, 5], copy=[1, 1, 1], gemm=[10, 10, 10])
    assert found.median(OURS) == 2e-3
    assert found.ratio(STOCK) == pytest.approx(3)  # of medians, not the median of ratios, which is 3, 100 and 0.6
    assert found.ratio(STOCK, STOCK) == 1
    assert found.ratio("torch.compile") is None
    assert found.gigabytes_per_second(OURS) == pytest.approx(found.case.bytes / 2e-3 / 1e9)
    assert found.gigaflops_per_second(OURS) == pytest.approx(found.case.flops / 2e-3 / 1e9)
    assert found.gemm_gigaflops_per_second == pytest.approx(2 * GEMM_SIZE["cpu"] ** 3 / 10e-3 / 1e9)
    assert found.variants == [OURS, STOCK]
    # 1 ms to move the bytes, and the FLOPs at the product's rate take far less.
    assert found.bound == "memory"
    assert found.percent_of_limit(OURS) == pytest.approx(50)
    assert found.spread(OURS) == pytest.approx((5.5 - 1.5) / 2)


def test_compute_bound():
    found = measurement(SMALL["temporal_conv"], ours=[2], copy=[1e-6], gemm=[1000])
    expected = found.case.flops / (2 * GEMM_SIZE["cpu"] ** 3)  # seconds, at one product a second
    assert found.bound == "compute"
    assert found.limit_seconds == pytest.approx(expected)


def test_summary_weighs_by_occurrence():
    fast = [shape for shape in network_shapes() if shape.op == "temporal_conv" and shape.pathway == "fast"]
    runs = [measurement(shape, ours=[1.0], stock=[float(i)]) for i, shape in enumerate(fast, 1)]
    times = sum(i * shape.count for i, shape in enumerate(fast, 1)), sum(shape.count for shape in fast)
    answers = {str(answer.goal): answer for answer in summarise(runs)}
    pathway = answers["temporal_conv eval forward, sum over the fast pathway, against stock"]
    assert pathway.ratio == pytest.approx(times[0] / times[1])
    assert pathway.target == 3
    assert pathway.met is (times[0] / times[1] >= 3)
    network = answers["temporal_conv eval forward, sum over the network, against stock"]
    assert network.ratio == pathway.ratio
    assert (network.measured, network.expected, network.met) == (8, 12, None)  # the slow pathway's shapes are missing
    worst = answers["temporal_conv eval forward, worst shape of the network, against stock channels_last_3d"]
    assert worst.ratio is None
    assert "not measured" in str(worst)
    assert not any("lateral_concat" in goal or "training" in goal for goal in answers)


@pytest.mark.parametrize(("stock", "met", "word"), [(2.01, True, "met"), (1.99, False, "MISSED")])
def test_verdict(stock, met, word):
    runs = [measurement(s, ours=[1.0], stock=[stock]) for s in network_shapes() if s.op == "lateral_concat"]
    answer = summarise(runs)[0]
    assert (answer.target, answer.met) == (2.0, met)
    assert word in str(answer)
    for run in runs:
        run.case = replace(run.case, leg=Leg("bfloat16"))  # the CPU's targets are for float32
    assert summarise(runs)[0].met is None


def test_worst_shape():
    runs = [measurement(s, "bwd", ours=[2.0], stock=[4.0 + i]) for i, s in enumerate(network_shapes()[-4:])]
    worst = next(answer for answer in summarise(runs) if answer.goal.worst)
    assert worst.ratio == 2.0


@pytest.mark.parametrize("device", GOALS)
def test_every_goal_can_be_answered(device):
    shapes = [*network_shapes(), *NETWORKS]
    # Every second shape is bound by memory, the others by the matrix product.
    times = {"ours": [1.0], "stock": [2.0], "copy": [0.5]}
    runs = [
        measurement(shape, direction, **times, gemm=[1e-9 if i % 2 else 1e9])
        for i, shape in enumerate(shapes)
        for direction in DIRECTIONS
    ]
    for run in runs:
        run.device = device
    assert [answer.goal for answer in summarise(runs)] == list(GOALS[device])
    assert all(answer.measured == answer.expected for answer in summarise(runs))


def test_targets_on_a_gpu():
    shapes = [shape for shape in network_shapes() if shape.op == "lateral_concat"]
    runs = [measurement(shape, ours=[1.0], stock=[3.1], copy=[0.8], gemm=[1e-9]) for shape in shapes]
    for run in runs:
        run.device, run.case = "cuda", replace(run.case, leg=Leg("bfloat16", 8))
        run.seconds["stock channels_last_3d"] = [1.2e-3]
    runs[1].seconds["conv2d view"] = [0.9e-3]
    runs[2].seconds["copy"] = [0.6e-3]
    stock, fastest, memory = summarise(runs)
    assert (stock.ratio, stock.target, stock.met) == (pytest.approx(3.1), 3.0, True)
    assert (fastest.ratio, fastest.target, fastest.met) == (pytest.approx(0.9), 1.0, False)
    assert (memory.ratio, memory.target, memory.met) == (pytest.approx(0.6), 0.7, False)
    assert "worst memory-bound shape of the network, against the limit" in str(memory)
    assert "60%  target 70% MISSED" in str(memory)
    assert summary_text(runs).startswith("bfloat16, batch 8, 224 x 224:\n")
    missing = summarise(runs[:3])
    assert [(answer.measured, answer.expected, answer.met) for answer in missing] == [(3, 4, None)] * 3


def test_legs_are_summarised_apart():
    shape = next(shape for shape in network_shapes() if shape.op == "lateral_concat")
    runs = [measurement(shape, ours=[1.0], stock=[2.0]), measurement(shape, ours=[1.0], stock=[5.0])]
    runs[1].case = replace(runs[1].case, leg=Leg("float32", 8))
    ratios = {answer.leg: answer.ratio for answer in summarise(runs) if answer.goal.baseline == "stock"}
    assert ratios == {FLOAT32: pytest.approx(2), Leg("float32", 8): pytest.approx(5)}
