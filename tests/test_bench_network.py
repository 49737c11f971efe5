"""The benchmarks of whole networks judged, as test_bench_cases.py and its neighbours judge the others."""

import json
from dataclasses import replace

import pytest
import torch
from bench_testing import CPU, measurement
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_fast import create_slowfast
from slowfast_fast.bench import main, network
from slowfast_fast.bench import run as running
from slowfast_fast.bench.family import FAMILY, FamilyCase, FamilyProblem, speeds
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import FASTEST_STOCK, MILLISECOND, NETWORK_GEMM_SIZE, Race, clock_for
from slowfast_fast.bench.memory import peak_bytes
from slowfast_fast.bench.network import AUTOCAST, FROZEN, GRAPHED, TRAINING, NetworkCase, NetworkProblem
from slowfast_fast.bench.report import rates, table
from slowfast_fast.bench.run import prepare
from slowfast_fast.bench.summary import STOCK, summarise
from slowfast_fast.bench.variants import OURS, Unavailable
from slowfast_fast.cli import main as cli
from slowfast_fast.models.costs import cost
from slowfast_fast.models.costs import table as table_of_models


@pytest.mark.parametrize(("network", "direction"), [("R50 4x16", "fwd"), ("R50 8x8", "bwd")])
def test_network_variants_agree(network, direction):
    found, _ = prepare(NetworkCase(Leg("float32", crop=32), direction, network), CPU, compile=False)
    expected = {"stock", "stock channels_last_3d", OURS} | ({FROZEN} if direction == "fwd" else {AUTOCAST})
    assert expected <= set(found.variants), found.unavailable
    assert set(found.unavailable) <= {"torch.compile", "OpenVINO", AUTOCAST, FROZEN, GRAPHED}
    assert set(found.peaks) == (expected if direction == "bwd" else set())
    assert all(peak > 1 << 20 for peak in found.peaks.values())
    assert found.ours == (FROZEN if direction == "fwd" else OURS)
    assert found.checked_clips is None, "there is one clip"


@pytest.mark.parametrize("kind", [NetworkCase, FamilyCase])
def test_some_clips_of_a_batch_are_checked(kind, monkeypatch):
    """Exactly those of the call that is timed; a variant that gets one of them wrong is out, and the table says whose
    errors it has."""

    def wrong_in(clip):
        def build(problem):
            runner = variants["stock"](problem)
            return lambda: {"y": runner()["y"].index_add(0, torch.tensor([clip]), torch.ones(1, width(runner)))}

        return build

    def width(runner):
        return runner()["y"].shape[1]

    variants = running.NETWORK_STOCK if kind is NetworkCase else running.FAMILY
    name = "R50 4x16" if kind is NetworkCase else "slowfast_r18_8x8"
    for clip in range(3):
        monkeypatch.setitem(variants, f"wrong in {clip}", wrong_in(clip))
    monkeypatch.delitem(variants, "OpenVINO", raising=False)
    found, race = prepare(kind(Leg("float32", 3, 32), "fwd", name), CPU, compile=False)
    assert found.checked_clips == [0, 2]
    assert "relative error of y" in found.unavailable["wrong in 0"]
    assert "relative error of y" in found.unavailable["wrong in 2"]
    assert FROZEN in found.errors
    assert race.calls["stock"]()["y"].shape[0] == 3
    race.round()
    assert "errors are those of 2 clips of 3: 0, 2" in table(found)


def test_compiling_moves_no_weights(monkeypatch):
    """A compiled training step's first result is that of a first step, with which it is compared."""
    monkeypatch.setattr(network, "compile_module", lambda model, freeze: model)
    problem = NetworkProblem(NetworkCase(Leg("float32", 2, crop=32), "bwd", "R50 4x16"), CPU)
    first, compiled = (
        problem.runner(create_slowfast, torch.channels_last_3d, compiled=value)() for value in (False, True)
    )
    for name, result in first.items():
        torch.testing.assert_close(compiled[name], result, rtol=0, atol=0)


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


def test_a_millisecond_is_the_hosts():
    """Of the variant with a CUDA graph, from the call to the result, whatever the device's clock says."""
    found = measurement("R50 8x8", ours=[3.0], stock=[4.0], copy=[0.5], gemm=[0.5])
    found.device, found.case = "cuda", replace(found.case, leg=Leg("bfloat16", 1, 256))
    found.seconds[GRAPHED] = [3e-3]
    found.errors[GRAPHED] = 0.0

    def answer():
        return next(answer for answer in summarise([found]) if answer.goal.baseline == MILLISECOND)

    assert (answer().ratio, answer().met) == (None, None)
    found.latencies = {name: [2e-3, 4e-3, 3e-3] for name in found.seconds} | {GRAPHED: [0.7e-3, 0.9e-3, 0.8e-3]}
    assert (answer().ratio, answer().target, answer().met) == (pytest.approx(1.25), 1.0, True)
    assert str(answer()).startswith("slowfast R50 8x8 eval forward, against a millisecond")
    header, *rows = table(found).splitlines()[1:]
    assert header.split()[-4:] == ["p50", "ms", "p95", "ms"]
    assert next(row for row in rows if GRAPHED in row).split()[-2:] == ["0.800", "0.890"]
    assert rates(found, GRAPHED)["p50"] == 0.8e-3
    found.latencies[GRAPHED] = [1.1e-3]
    assert answer().met is False


def test_a_graph_is_a_variant_only_where_one_is_captured(monkeypatch):
    problem = NetworkProblem(NetworkCase(Leg("float32", 1, crop=32), "fwd", "R50 4x16"), CPU)
    with pytest.raises(Unavailable, match="a GPU's"):
        network.frozen(problem, cuda_graph=True)
    on_cpu = problem.model(create_slowfast, torch.float32)
    monkeypatch.setattr(problem, "device", torch.device("cuda"))
    monkeypatch.setattr(problem, "model", lambda create, dtype: on_cpu)
    with pytest.raises(RuntimeWarning, match="without a graph"):
        network.frozen(problem, cuda_graph=True)


def test_latencies_are_taken_beside_the_seconds(monkeypatch):
    waits: list[str] = []

    class Host:
        def time(self, call):
            waits.append(call())
            return 2.0

    race = Race({name: lambda name=name: name for name in "ab"}, clock_for(CPU), Host())
    race.warm_up()
    race.round()
    race.round()
    assert waits == ["a", "b", "b", "a"]
    assert race.latencies == {"a": [2.0, 2.0], "b": [2.0, 2.0]}
    assert all(len(seconds) == 2 for seconds in race.seconds.values())


def test_targets_of_a_training_step():
    found = measurement("R50 8x8", "bwd", ours=[1000.0], stock=[1600.0], copy=[0.5], gemm=[100.0])
    found.seconds |= {"torch.compile": [1.1], AUTOCAST: [1.3]}
    found.peaks |= {"stock": 1000, OURS: 590}
    found.case = replace(found.case, leg=TRAINING["cpu"])

    def answers():
        return {(a.goal.baseline, a.goal.memory): a for a in summarise([found])}

    assert (answers()[STOCK, False].target, answers()[STOCK, False].met) == (1.5, True)
    assert (answers()[FASTEST_STOCK, False].ratio, answers()[FASTEST_STOCK, False].met) == (pytest.approx(1.1), False)
    memory = answers()[STOCK, True]
    assert (memory.ratio, memory.target, memory.met) == (0.59, 0.6, True)
    assert "training step, peak memory, against stock" in str(memory)
    assert str(memory).endswith("target 60% at most met")
    found.peaks[OURS] = 610
    assert answers()[STOCK, True].met is False


def test_train_measures_where_the_targets_hold(monkeypatch, tmp_path):
    def run(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(main, "run", run)
    main.bench(train=True, device="cpu", json=tmp_path / "bench.json")
    left_out = json.loads((tmp_path / "bench.json").read_text())["left_out"]
    assert [case["name"] for case in left_out] == [
        f"slowfast R50 {name} batch 2 at 112 bwd" for name in ("4x16", "8x8")
    ]
    assert {case["leg"] for case in left_out} == {"float32, batch 2, 112 x 112"}


def test_peak_memory_counts_what_lives_at_once():
    kept = torch.zeros(1 << 20)

    def call():
        first = kept + 1
        second = first + 1
        del first
        return second + 1

    assert 2 * 4 << 20 <= peak_bytes(call, CPU) < (2 * 4 << 20) + 1024  # the numbers added are tensors, too
    assert peak_bytes(lambda: None, CPU) == 0


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


def test_a_registered_model_against_its_layers_as_stock_runs_them():
    found, _ = prepare(FamilyCase(Leg("float32", crop=32), "fwd", "slowfast_r18_8x8"), CPU, compile=False)
    assert set(found.variants) == set(FAMILY), found.unavailable
    assert found.ours == FROZEN
    assert found.case.flops == pytest.approx(2e9 * cost("slowfast_r18_8x8", 32).gflops)
    assert summarise([found]) == [], "there are no targets"


@pytest.mark.parametrize(
    "name", ["slowfast_r50_4x16_both_ways", "slowfast_r50_ava", "i3d_r18_32x2", "slowfast_convlstm"]
)
def test_stock_is_stock(name):
    """Nothing but PyTorch's operators, on clips in the layout that they were given in."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            if "conv" in func.__name__:
                laid_out.append(args[0].is_contiguous(memory_format=memory_format))
            return func(*args, **(kwargs or {}))

    problem = FamilyProblem(FamilyCase(Leg("float32", crop=32), "fwd", name), CPU)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        namespaces, laid_out = set(), []
        run = problem.stock(memory_format)
        with Seen():
            run()
        assert namespaces <= {"aten", "prim"}
        assert len(laid_out) > 10
        assert laid_out[0], "what becomes of the layout behind the stem is PyTorch's choice"


def test_speeds_stand_in_the_table_of_models():
    rates = {"stock": 3.0, "stock channels_last_3d": 2.0, FROZEN: 1.5}
    variants = {name: {"median": seconds, "clips_per_second": 1 / seconds} for name, seconds in rates.items()}
    document = {"cases": [{"shape": {"network": "slow_r50_4x16"}, "variants": variants}]}
    lines = table_of_models(["slow_r50_4x16", "resnet2d_r18"], 32, speeds(document)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][5:8] == ["clips/s", "x stock", "x stock channels_last_3d"]
    assert cells[2][5:8] == ["0.67", "2.00", "1.33"]
    assert cells[3][5:8] == ["", "", ""], "not measured"
    assert len({len(row) for row in cells}) == 1


def test_a_run_gives_the_table_its_figures(tmp_path):
    run = tmp_path / "run.json"
    main.bench(networks=["fast_r50_32x2"], crops=[32], device="cpu", rounds=2, compile=False, budget=300, json=run)
    result = CliRunner().invoke(cli, ["models", "fast_r50_32x2", "--crop", "32", "--measured", str(run)])
    assert result.exit_code == 0, result.output
    row = [cell.strip() for cell in result.output.splitlines()[2].split("|")]
    assert all(float(figure) > 0 for figure in row[6:9])
    assert "(float32, batch 1, 32 x 32)" in result.output
    assert "medians of 2 interleaved rounds" in result.output


def test_registered_models_are_measured_forward():
    with pytest.raises(ValueError, match="directions: registered models are measured in fwd alone, got fwd, bwd"):
        main.bench(networks=["slow_r50_4x16"], directions=["fwd", "bwd"], device="cpu")
