"""The benchmarks judged: their shapes, formulas, arithmetic and reports. No test depends on how fast anything is."""

import json
import os
from collections import Counter
from dataclasses import replace

import bench_apart
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slowfast_fast.bench import bench
from slowfast_fast.bench import run as running
from slowfast_fast.bench.apart import Apart
from slowfast_fast.bench.cases import DIRECTIONS, Case, natively_supported, traffic
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import (
    COPY,
    GEMM,
    GEMM_SIZE,
    SHORTEST_HOLD,
    TOLERANCE,
    CudaClock,
    Measurement,
    Race,
    disagreement,
)
from slowfast_fast.bench.network import NETWORKS, NetworkCase
from slowfast_fast.bench.run import find_cases, prepare
from slowfast_fast.bench.shapes import Shape, network_shapes
from slowfast_fast.bench.summary import GOALS, STOCK, summarise, summary_text
from slowfast_fast.bench.variants import OURS, Problem, Unavailable, stock_eager
from slowfast_fast.reference.slowfast import SlowFast

CPU = torch.device("cpu")
FLOAT32 = Leg("float32")
SMALL = {
    "temporal_conv": Shape("temporal_conv", "fast", 2, 2, 8, 16, 3, frames=5, size=3),
    "lateral_concat": Shape("lateral_concat", "lateral", 1, 2, 8, 16, 7, frames=8, size=3, stride=4, slow_channels=24),
}


def temporal_convolutions(depth: int, crop: int, batch: int) -> Counter:
    """What the reference network runs, seen by hooks: (op, input shape, weight shape, stride, channels of slow)."""
    size = crop // 32
    with torch.device("meta"):
        model = SlowFast(model_depth=depth, head_pool_kernel_sizes=((8, size, size), (32, size, size)))
        inputs = [torch.empty(batch, 3, frames, crop, crop) for frames in (8, 32)]
    seen: Counter = Counter()
    slow_channels = {}

    def on_fusion(fusion: nn.Module, arguments: tuple) -> None:
        for module in fusion.modules():
            slow_channels[module] = arguments[0][0].shape[1]

    def on_convolution(conv: nn.Conv3d, arguments: tuple) -> None:
        op = "lateral_concat" if conv in slow_channels else "temporal_conv"
        if conv.kernel_size[0] > 1 and conv.kernel_size[1:] == (1, 1):
            shape, weight = tuple(arguments[0].shape), tuple(conv.weight.shape)
            seen[op, shape, weight, conv.stride, conv.padding, slow_channels.get(conv, 0)] += 1

    for block in model.blocks[:5]:
        block.multipathway_fusion.register_forward_pre_hook(on_fusion)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_pre_hook(on_convolution)
    model(inputs)
    return seen


@pytest.mark.parametrize(("depth", "crop", "batch"), [(50, 224, 1), (50, 256, 2), (18, 224, 1), (101, 224, 1)])
def test_shapes_are_those_of_the_network(depth, crop, batch):
    expected = temporal_convolutions(depth, crop, batch)
    found: Counter = Counter()
    for s in network_shapes(crop, depth=depth, batch=batch):
        x = (s.batch, s.channels, s.frames, s.size, s.size)
        weight = (s.out_channels, s.channels, s.kernel, 1, 1)
        found[s.op, x, weight, (s.stride, 1, 1), (s.padding, 0, 0), s.slow_channels] += s.count
    assert found == expected
    assert sum(expected.values()) == {18: 6 + 4, 50: 25 + 4, 101: 59 + 4}[depth]


def test_names_are_unique():
    names = [case.name for case in find_cases(running.OPS, list(DIRECTIONS), FLOAT32)]
    assert len(set(names)) == len(names) == 2 * (12 + 4 + 1)


@pytest.mark.parametrize("crop", [0, -32, 100])
def test_crop_is_checked(crop):
    with pytest.raises(ValueError, match=rf"crop: expected a positive multiple of 32, got {crop}"):
        network_shapes(crop)


def test_depth_is_checked():
    with pytest.raises(ValueError, match=r"depth: expected one of .*18, 50, 101, 152.*, got 34"):
        network_shapes(depth=34)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", network_shapes(), ids=lambda shape: shape.name)
def test_flops_against_torch(shape, direction):
    x = torch.empty(1, shape.channels, shape.frames, shape.size, shape.size, device="meta", requires_grad=True)
    weight = torch.empty(shape.out_channels, shape.channels, shape.kernel, 1, 1, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = F.conv3d(x, weight, stride=(shape.stride, 1, 1), padding=(shape.padding, 0, 0))
        if direction == "bwd":
            y.sum().backward()
    assert Case(shape, direction, FLOAT32).flops == counter.get_total_flops()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("op", SMALL)
def test_bytes_against_real_tensors(op, precision):
    def size(*tensors: Tensor | None) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    forward = Problem.random(Case(SMALL[op], "fwd", Leg(precision, 2)), CPU)
    y = stock_eager(forward)()["y"]
    # Folded BatchNorm is two vectors; slow is in y once more.
    assert forward.case.bytes == size(forward.x, forward.weight, forward.gamma, forward.beta, forward.slow, y)

    step = Problem.random(Case(SMALL[op], "bwd", Leg(precision, 2)), CPU)
    results = stock_eager(step)()
    raw = y[:, SMALL[op].slow_channels :].clone()
    moved = {
        "forward": size(step.x, step.weight, step.slow, results["y"]) + 2 * size(raw),
        "vectors": size(step.gamma, step.beta, step.mean, step.var, results["dgamma"], results["dbeta"]),
        "reductions": 2 * size(raw),
        "dgrad and wgrad": 2 * size(raw) + size(step.x, step.weight, results["dx"], results["dweight"]),
    }
    assert step.case.bytes == sum(moved.values())
    assert all(value >= 0 for value in traffic(step.case).values())


def test_case_is_checked():
    with pytest.raises(ValueError, match=r"direction: expected one of .*'bwd', 'fwd'.*, got 'train'"):
        Case(SMALL["temporal_conv"], "train", FLOAT32)


def test_network_flops():
    """Against a count by hooks, and the published 50.58 GMAC of R50 8x8 at 224 (which take in norms and pools)."""
    counted = 0

    def count(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = SlowFast()
        for module in model.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                module.register_forward_hook(count)
        model([torch.empty(1, 3, frames, 224, 224) for frames in (8, 32)])
    flops = NetworkCase(FLOAT32, "fwd").flops
    assert flops == counted
    assert flops == pytest.approx(2 * 50.58e9, rel=0.01)
    # In training every layer has a wgrad, and every one but the two stems a dgrad.
    assert 2.8 * flops < NetworkCase(FLOAT32, "bwd").flops < 3 * flops


def measurement(shape: Shape | str, direction: str = "fwd", **milliseconds: list[float]) -> Measurement:
    """Of an op's shape, or of a network by its name."""
    of_network = isinstance(shape, str)
    case = NetworkCase(FLOAT32, direction, shape) if of_network else Case(shape, direction, FLOAT32)
    names = {"ours": OURS, "stock": STOCK, "copy": COPY, "gemm": GEMM}
    found = Measurement(case, "cpu", OURS)
    found.seconds = {names[name]: [value / 1e3 for value in values] for name, values in milliseconds.items()}
    found.errors = dict.fromkeys(found.variants, 0.0)
    return found


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


def test_race_interleaves_and_rotates():
    order: list[str] = []
    race = Race({name: lambda name=name: order.append(name) for name in "abc"}, running.clock_for(CPU))
    for _ in range(3):
        race.round()
    assert "".join(order) == "abcbcacab"
    order.clear()
    race.round(without="b")
    race.run("b")
    assert sorted(order[:-1]) == ["a", "c"]
    assert order[-1] == "b"
    assert {name: len(seconds) for name, seconds in race.seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_disagreement():
    tolerance = TOLERANCE[torch.float32]
    exact = {"y": torch.randn(5, 7, dtype=torch.float64), "dx": torch.randn(5, dtype=torch.float64)}
    right = {name: tensor.float() for name, tensor in exact.items()}
    assert disagreement(right, exact, tolerance)[1] is None
    assert "gave ['y']" in disagreement({"y": right["y"]}, exact, tolerance)[1]
    assert "dx has shape (4,), expected (5,)" in disagreement({**right, "dx": right["dx"][:4]}, exact, tolerance)[1]
    assert "relative error of y" in disagreement({**right, "y": right["y"] * (1 + 2e-5)}, exact, tolerance)[1]
    assert disagreement({**right, "dx": right["dx"] * (1 + 2e-5)}, exact, tolerance)[1] is None
    assert "relative error of dx" in disagreement({**right, "dx": right["dx"] * float("nan")}, exact, tolerance)[1]


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", SMALL)
def test_every_variant_gives_the_same_numbers(op, direction, precision):
    leg = Leg(precision, 2)
    found, race = prepare(Case(SMALL[op], direction, leg), CPU, compile=False, seed=torch.seed() % 2**31)
    absent = {"torch.compile", f"{OURS} cuda", f"{OURS} triton"}
    if direction == "bwd" or leg.dtype is torch.float64 or not natively_supported(leg.dtype, CPU):
        absent.add("mkldnn post-op")
    assert set(found.unavailable) == absent, found.unavailable
    assert set(found.variants) == {
        "stock",
        "stock channels_last_3d",
        "conv2d view",
        f"{OURS} cpu",
        f"{OURS} reference",
    } | ({"mkldnn post-op"} - absent)
    assert found.ours == f"{OURS} cpu"
    race.round()
    assert {len(seconds) for seconds in found.seconds.values()} == {1}


def test_compiled_variant():
    found, _ = prepare(Case(SMALL["temporal_conv"], "fwd", FLOAT32), CPU)
    assert "torch.compile" in found.variants, found.unavailable


def test_wrong_or_absent_variants_are_left_out(monkeypatch):
    def wrong(problem: Problem):
        runner = stock_eager(problem)
        return lambda: {name: tensor + 1e-3 for name, tensor in runner().items()}

    def absent(problem: Problem):
        raise Unavailable("not today")

    monkeypatch.setitem(running.STOCK, "wrong", wrong)
    monkeypatch.setitem(running.STOCK, "absent", absent)
    found, race = prepare(Case(SMALL["temporal_conv"], "fwd", FLOAT32), CPU, compile=False)
    assert "relative error of y against float64" in found.unavailable["wrong"]
    assert found.unavailable["absent"] == "not today"
    assert {"wrong", "absent"}.isdisjoint(race.calls)


def test_a_variant_that_fails_costs_no_other(tmp_path, monkeypatch):
    """It is told in the document and by the exit."""

    def broken(problem: Problem):
        raise ArithmeticError("no such kernel")

    monkeypatch.setitem(running.STOCK, "broken", broken)
    path = tmp_path / "run.json"
    with pytest.raises(RuntimeError, match="4 variants failed"):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    cases = json.loads(path.read_text())["cases"]
    assert {case["unavailable"]["broken"] for case in cases} == {"failed: ArithmeticError: no such kernel"}
    assert all("slowfast_fast cpu" in case["variants"] for case in cases)


def test_cases_apart():
    """One process for all calls, and another one after one that ended or gave no answer."""
    apart = Apart(bench_apart.answer, seconds=60)
    try:
        first = apart("process")
        assert first != os.getpid()
        with pytest.raises(RuntimeError, match="KeyError: 'no such kernel'"):
            apart("raise", value="no such kernel")
        with pytest.raises(torch.OutOfMemoryError, match="too much"):
            apart("memory", value="too much")
        assert apart("process") == first
        with pytest.raises(RuntimeError, match="its process ended with 3"):
            apart("end")
        second = apart("process")
        assert second != first
        apart._seconds = 1.0
        with pytest.raises(RuntimeError, match="no result after 1 s"):
            apart("hang")
        apart._seconds = 60.0
        assert apart("process") not in (first, second)
    finally:
        apart.close()


def test_quick_run_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    threads = torch.get_num_threads()
    json_path, png_path = tmp_path / "run.json", tmp_path / "run.png"
    bench(quick=True, crops=[32], rounds=2, threads=1, json=json_path, png=png_path)
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "temporal_conv fast res2 8->8 32x8x8 fwd" in printed
    assert "lateral_concat eval forward, sum over the network, against stock" in printed
    assert png_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    document = json.loads(json_path.read_text())
    assert set(document) == {
        *("schema", "finished", "date", "versions", "machine", "settings", "summary", "cases", "left_out")
    }
    assert document["schema"] == 2
    assert document["finished"] is True
    assert document["left_out"] == []
    assert document["machine"]["threads"] == 1
    assert {"cpu", "cpu_capability", "load_average"} <= set(document["machine"])
    assert {"commit", "torch", "cuda", "cudnn", "triton", "driver", "python", "slowfast_fast"} <= set(
        document["versions"]
    )
    assert document["settings"]["rounds"] == 2
    assert len(document["cases"]) == 6  # fast, slow and lateral, in both directions
    for case in document["cases"]:
        assert {"name", "direction", "leg", "shape", "bytes", "flops", "limit", "ours", "variants"} <= set(case)
        assert case["ours"] in case["variants"]
        assert all(len(variant["seconds"]) == 2 for variant in case["variants"].values())
        stock, ours = case["variants"]["stock"], case["variants"][case["ours"]]
        assert ours["speedup_over_stock"] == pytest.approx(stock["median"] / ours["median"])
        assert ours["gigabytes_per_second"] == pytest.approx(case["bytes"] / ours["median"] / 1e9)
    assert all({"goal", "leg", "target", "ratio", "met"} <= set(line) for line in document["summary"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["conv"]}, "ops: expected some of .*'temporal_conv'.*, got 'conv'"),
        ({"directions": ["train"]}, "directions: expected some of .*'fwd'.*, got 'train'"),
        ({"dtypes": ["int8"]}, "dtype: expected one of .*'float32'.*, got 'int8'"),
        ({"dtypes": ["tf32"], "device": "cpu"}, "dtype: tf32 is for a GPU"),
        ({"batches": [0]}, "batch: expected at least 1, got 0"),
        ({"device": "meta"}, "device: expected cpu or cuda, got 'meta'"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"crops": [100]}, "crop: expected a positive multiple of 32, got 100"),
        ({"json": "no/such/folder/run.json"}, "json: the folder of no/such/folder/run.json does not exist"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def test_chart_needs_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        bench(png=tmp_path / "run.png")
    assert capsys.readouterr().out == ""  # nothing was measured


def test_budget(tmp_path, capsys):
    """The legs come in the order asked for, and what there was no time for is named."""
    path = tmp_path / "run.json"
    legs = {"dtypes": ["float32", "bfloat16"], "batches": [1, 2], "crops": [32]}
    bench(
        ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, budget=0, json=path, **legs
    )
    document = json.loads(path.read_text())
    assert document["cases"] == []
    names = [case["leg"] for case in document["left_out"]]
    assert list(dict.fromkeys(names)) == [
        f"{dtype}, batch {batch}, 32 x 32" for batch in (1, 2) for dtype in ("float32", "bfloat16")
    ]
    assert len(names) == 4 * 4
    assert {case["reason"] for case in document["left_out"]} == {"the time was up"}
    assert "16 of 16 cases were left out" in capsys.readouterr().out


def test_a_failing_case_is_no_end(tmp_path, monkeypatch):
    """The others are measured and written, and the failure is told twice: in the document and by the exit."""

    def prepare_some(case, *arguments, **options):
        if case.shape.stage == 2:
            raise RuntimeError("no such kernel")
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    path = tmp_path / "run.json"
    with pytest.raises(RuntimeError, match="1 of 4 cases failed"):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    document = json.loads(path.read_text())
    assert len(document["cases"]) == 3
    assert [case["reason"] for case in document["left_out"]] == ["failed: no such kernel"]


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), "interrupted"), (torch.OutOfMemoryError(), "out of device memory")]
)
def test_what_ends_a_case_early_costs_no_result(tmp_path, monkeypatch, error, reason):
    """An interrupt also leaves out what would come after it; neither is a failure of a kernel."""

    def prepare_some(case, *arguments, **options):
        if case.shape.stage == 2:
            raise error
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    path = tmp_path / "run.json"
    bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    document = json.loads(path.read_text())
    left_out = [reason, "the time was up", "the time was up"] if reason == "interrupted" else [reason]
    assert [case["reason"] for case in document["left_out"]] == left_out
    assert len(document["cases"]) == 4 - len(left_out)


def test_a_killed_run_keeps_what_it_has(tmp_path, monkeypatch):
    """The document is complete after every case; of one that is begun and not ended it says so."""
    path = tmp_path / "run.json"
    path.write_text("older")
    seen: list[object] = []

    class Killed(BaseException):
        pass

    def prepare_some(case, *arguments, **options):
        seen.append(path.read_text() if not seen else json.loads(path.read_text()))
        if len(seen) == 3:
            raise Killed
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    with pytest.raises(Killed):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    assert seen[0] == "older", "nothing is lost before there is anything new"
    document = json.loads(path.read_text())
    assert document == seen[2]
    assert [(len(d["cases"]), len(d["left_out"]), d["finished"]) for d in seen[1:]] == [(1, 3, False), (2, 2, False)]
    assert {case["reason"] for case in document["left_out"]} == {"the run did not get there"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_settings_of_a_leg():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    for precision, allowed in (("tf32", True), ("float32", False)):
        with Leg(precision).applied():
            assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (allowed, allowed, True)
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == before


def test_device_is_held_until_the_call_is_queued(monkeypatch):
    """The clock of a GPU, on pretended events: it repeats the call with a longer hold while the device gets there
    first."""
    held: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return held[-1] < 4 * SHORTEST_HOLD

        def elapsed_time(self, end: "Event") -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    clock = CudaClock(CPU)
    calls: list[int] = []
    assert clock.time(lambda: calls.append(len(held))) == 3e-3
    assert held == [SHORTEST_HOLD, 2 * SHORTEST_HOLD, 4 * SHORTEST_HOLD]
    assert clock.time(lambda: calls.append(len(held))) == 3e-3
    assert calls == [1, 2, 3, 4]  # the second call found the hold long enough
