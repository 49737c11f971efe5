"""The frozen network as a whole: what runs, how much memory lives, golden files, random configurations, export."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_threads, tf32
from network_testing import SMALL, clips, distance
from test_freeze import FP32, assert_same, enliven, stock_and_frozen
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import slowfast_fast
from slowfast_fast import freeze
from slowfast_fast.bench.memory import peak_bytes
from slowfast_fast.reference.slowfast import SlowFast

R50: dict[str, Any] = {"dropout_rate": 0.0, "head_pool_kernel_sizes": ((2, 2, 2), (8, 2, 2))}
# What a fused layer must not leave behind as a pass of its own.
PASSES = ("aten::cat", "aten::batch_norm", "aten::relu", "aten::relu_", "aten::add", "aten::add_", "aten::max_pool3d")


def ran(model: nn.Module, x: list[Tensor] | Tensor, *others: Any) -> dict[str, int]:
    """The operators that a call runs, and how often."""
    given = list(x) if isinstance(x, list) else x
    model(given, *others)
    given = list(x) if isinstance(x, list) else x  # pytorchvideo writes into the list that it is given
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        model(given, *others)
    return {event.key: event.count for event in profiler.key_averages()}


@pytest.mark.usefixtures("one_thread")
def test_no_pass_is_left_of_its_own() -> None:
    """No cat, no norm, no activation, and of sums only that of the two pathways' logits; copies only of the clips."""
    stock, frozen = SlowFast(**R50).eval(), freeze(slowfast_fast.create_slowfast(**R50))
    x = [clip.float() for clip in clips(1, size=64)]
    assert ran(stock, x)["aten::cat"] == 5
    counts = ran(frozen, x)
    assert {name: counts[name] for name in PASSES if name in counts} == {"aten::add": 2}
    assert counts.get("aten::contiguous", 0) <= 2
    lateral = {name: count for name, count in counts.items() if "lateral_concat" in name}
    assert lateral == {
        "slowfast_fast::max_pool_lateral_concat": 1,
        "slowfast_fast::temporal_conv_lateral_concat": 3,
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head", ["mlp", "no projection", "features", "another block", "no pools"])
def test_no_cat_before_other_heads(head: str) -> None:
    model = slowfast_fast.create_slowfast(
        **SMALL, head_pool=nn.AdaptiveAvgPool3d if head == "no pools" else nn.AvgPool3d
    )
    match head:
        case "mlp":
            model.blocks[-1].proj = nn.Sequential(
                nn.Linear(model.blocks[-1].proj.in_features, 5), nn.ReLU(), nn.Linear(5, 2)
            )
        case "no projection":
            model.blocks[-1].proj = None
        case "features":
            model.blocks[-1] = nn.Identity()
        case "another block":
            model.blocks.append(nn.Softmax(1))
        case "no pools":
            model.blocks[-2].pool[0] = nn.AdaptiveAvgPool3d((8, None, None))
            model.blocks[-2].pool[1] = None
    enliven(model.double())
    x = clips(3)
    frozen = freeze(model)
    with torch.no_grad():
        assert distance(frozen(x), copy.deepcopy(model).eval()(list(x))) < 1e-13
    assert "aten::cat" not in ran(frozen, x)


@torch.inference_mode()
def most_live_bytes(model: nn.Module, x: list[Tensor]) -> int:
    """Of a call that is not the first."""
    model(list(x))
    return peak_bytes(lambda: model(list(x)), x[0].device)


@pytest.mark.usefixtures("one_thread")
def test_activations_take_little_memory() -> None:
    """At batch 8, in two parts, the live bytes of a call are at most 45 % of those of stock under inference_mode."""
    stock, frozen = SlowFast(**R50).eval(), freeze(slowfast_fast.create_slowfast(**R50))
    x = [clip.float() for clip in clips(8, size=64)]
    stocks, ours = most_live_bytes(stock, x), most_live_bytes(frozen, x)
    assert 0 < ours <= 0.45 * stocks, (ours, stocks)


# Compilers


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("one_thread")
def test_export() -> None:
    """An exported program holds the folded weights, and takes other batches and sizes where they were left open."""
    stock, frozen = stock_and_frozen(head_pool=nn.AdaptiveAvgPool3d)
    x = clips(3, size=48, dtype=torch.float32)
    size = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(frozen, (x,), dynamic_shapes=([size, size],))
    assert not any("batch_norm" in str(node.target) or "aten.cat" in str(node.target) for node in program.graph.nodes)
    assert_same(stock, program.module(), x)
    assert_same(stock, program.module(), clips(2, size=48, dtype=torch.float32))


# With layers of every kind: 3x3 at stride 1 over 32 and 64 channels, three taps over 64.
FINE = {"stage_spatial_strides": ((1, 1, 1, 2), (1, 1, 1, 2))}


def calls(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often its graph calls each operator."""
    targets = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(target.removesuffix(".default") for target in targets)


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_graph_has_the_ops_of_a_call(dtype: torch.dtype) -> None:
    """What runs on ops of this package does so in a graph; what runs on a library is PyTorch's convolution there."""
    model = slowfast_fast.create_slowfast(**SMALL, **FINE)
    enliven(model)
    frozen, x = freeze(model, dtype=dtype), clips(2, dtype=dtype)
    rows = slowfast_fast.explain(frozen, x, show=False).rows
    layers = [row for row in rows if row.what == "FrozenConv"]
    ops = {op: [f"{op}: " in row.reason for row in layers].count(True) for op in ("temporal_conv", "spatial_conv")}
    program = torch.export.export(frozen, (x,))
    counts = calls(program)
    assert ops["spatial_conv"] > 0
    for op, count in ops.items():
        assert counts[f"slowfast_fast.{op}"] == count
    assert counts["aten.conv3d"] == len(layers) - sum(ops.values())
    for op in ("bottleneck", "max_pool", "max_pool_lateral_concat", "temporal_conv_lateral_concat"):
        assert counts[f"slowfast_fast.{op}"] == [row.what for row in rows].count(op)
    if dtype == torch.float32:
        assert distance(program.module()(x), frozen(x)) < FP32


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("one_thread")
def test_aot_inductor_package(tmp_path: Path) -> None:
    stock, frozen = stock_and_frozen(**FINE)
    x = clips(2, dtype=torch.float32)
    program = torch.export.export(frozen, (x,))
    assert calls(program)["slowfast_fast.spatial_conv"] > 0
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "slowfast.pt2"), inductor_configs={"freezing": True}
    )
    assert_same(stock, torch._inductor.aoti_load_package(package), x)


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("one_thread")
def test_torch_compile() -> None:
    stock, frozen = stock_and_frozen()
    torch.compiler.reset()
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    assert_same(stock, compiled, clips(2, dtype=torch.float32))


# CUDA graphs


def test_a_graph_that_cannot_be_captured_warns_once() -> None:
    model = slowfast_fast.create_slowfast(**SMALL)
    plain, graphed = freeze(model), freeze(model, cuda_graph=True)
    x = clips(2, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(slowfast_fast.explain(graphed, x, show=False).rows) > 10  # explain() sees the layers, not a graph
    with pytest.warns(RuntimeWarning, match="cuda_graph=True runs without a graph here: the clips are on cpu"):
        assert torch.equal(graphed(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(graphed(x), plain(x))
    assert torch.equal(copy.deepcopy(graphed).to("cpu").load_state_dict(graphed.state_dict()) and plain(x), plain(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """As exact as stock under autocast, with and without a graph."""
    model = slowfast_fast.create_slowfast(**SMALL).cuda()
    stock = SlowFast(**SMALL).cuda().eval()
    stock.load_state_dict(model.state_dict())
    x = [clip.cuda().to(dtype) for clip in clips(4, dtype=torch.float32)]
    with torch.no_grad(), tf32(False):
        exact = copy.deepcopy(stock).double()([clip.double() for clip in x])
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            theirs = distance(stock([clip.float() for clip in x]).double(), exact)
        for graph in (False, True):
            frozen = freeze(model, dtype=dtype, cuda_graph=graph)
            assert distance(frozen(x).double(), exact) <= max(2 * theirs, torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_graphs_of_several_shapes_streams_and_threads() -> None:
    model = slowfast_fast.create_slowfast(**SMALL).cuda()
    plain, graphed = freeze(model), freeze(model, cuda_graph=True)
    given = [[clip.cuda() for clip in clips(batch, dtype=torch.float32)] for batch in (1, 2, 3)]
    expected = [plain(x) for x in given]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(10):
                index = (which + turn) % len(given)
                if not torch.allclose(graphed(given[index]), expected[index], rtol=1e-4, atol=1e-4):
                    wrong.append(index)

    in_threads(work, range(3))
    assert not wrong


@pytest.mark.gpu
def test_a_moved_or_loaded_network_is_captured_again() -> None:
    one, other = (slowfast_fast.create_slowfast(**SMALL).cuda() for _ in range(2))
    x = [clip.cuda() for clip in clips(2, dtype=torch.float32)]
    frozen = freeze(one, cuda_graph=True)
    frozen(x)
    frozen.load_state_dict(freeze(other).state_dict())
    torch.testing.assert_close(frozen(x), freeze(other)(x), rtol=1e-4, atol=1e-4)
