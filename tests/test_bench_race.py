"""The variants of a case and how they are raced: their agreement, turns, clocks and settings."""

import pytest
import torch
from bench_testing import CPU, FLOAT32, SMALL

from slowfast_fast.bench import run as running
from slowfast_fast.bench.cases import DIRECTIONS, Case, natively_supported
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import SHORTEST_HOLD, TOLERANCE, CudaClock, Race, disagreement
from slowfast_fast.bench.run import prepare
from slowfast_fast.bench.variants import OURS, Problem, Unavailable, stock_eager


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
