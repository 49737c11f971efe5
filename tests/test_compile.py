"""What PyTorch is told of the operators: opcheck, torch.compile with gradients, dynamic shapes, torch.export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_batch_norm as batch_norm
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from conftest import device_of
from op_testing import Call
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import ops

LIBRARY = torch.ops.slowfast_fast
T = temporal.Shape()
L = lateral.Shape(t=4)
CALLS = {
    "temporal_conv": lambda: temporal.random_call(T, torch.float32),
    "temporal_conv_bn": lambda: batch_norm.bn_call(T, torch.float32),
    "temporal_conv_bn evaluation": lambda: batch_norm.bn_call(T, torch.float32, training=False),
    "temporal_conv_bn cumulative": lambda: batch_norm.bn_call(T, torch.float32, momentum=None),
    "lateral_concat": lambda: lateral.random_call(L, torch.float32),
    "lateral_concat_bn": lambda: batch_norm.bn_call(L, torch.float32),
}
calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


def operator_arguments(dtype: torch.dtype, layout: str, device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator of the library."""
    bare = temporal.random_call(T, dtype).to(layout=layout, device=device)
    side = lateral.random_call(L, dtype).to(layout=layout, device=device)
    x, weight, scale, shift, residual = (t.requires_grad_() for t in bare.tensors.values())
    slow, fast, kernel, a, b = (t.requires_grad_() for t in side.tensors.values())
    _, raw, mean, invstd, var = (
        t.detach() for t in LIBRARY.temporal_conv_bn(x, weight, None, None, None, 1, 1, 1, 1e-5, False, False)
    )
    y = LIBRARY.temporal_conv(x, weight, None, None, None, 1, 1, 1, True, False).detach()
    of_x, of_weight, of_scale, of_residual = (t.detach() for t in (x, weight, scale, residual))
    stats = (torch.zeros_like(mean), torch.ones_like(mean), torch.tensor(0, device=device))
    geometry = (1, 1, 1)
    everything, some = (True,) * 5, (True, False, False, True, False)
    return {
        "temporal_conv": (x, weight, scale, shift, residual, *geometry, True, False),
        "temporal_conv bare": (x, weight, None, None, None, *geometry, False, False),
        "temporal_conv_bn": (x, weight, scale, shift, residual, *geometry, 1e-5, True, False),
        "temporal_conv_bn bare": (x, weight, None, None, None, *geometry, 1e-5, False, False),
        "temporal_conv_bn_frozen": (
            of_x,
            of_weight,
            of_scale,
            of_scale,
            *stats[:2],
            None,
            *geometry,
            1e-5,
            True,
            False,
        ),
        "lateral_concat": (slow, fast, kernel, a, b, 4, 2, True, False),
        "lateral_concat_bn_frozen": (
            *(t.detach() for t in (slow, fast, kernel, a, b, torch.zeros_like(a), torch.ones_like(a))),
            *(4, 2, 1e-5, True, False),
        ),
        "lateral_concat_bn": (slow, fast, kernel, a, b, 4, 2, 1e-5, True, False),
        "temporal_conv_backward": (bare.grad, of_x, of_weight, of_scale, y, *geometry, *everything, False),
        "temporal_conv_backward some": (bare.grad, of_x, of_weight, None, None, *geometry, *some, False),
        "temporal_conv_bn_backward": (
            *(bare.grad, of_x, of_weight, of_scale, of_scale, of_residual, raw, mean, invstd, *geometry, True),
            *everything,
            False,
        ),
        "update_running_stats": (*stats, mean, var, 0.1),
        "update_running_stats cumulative": (*stats, mean, var, None),
        "update_running_stats uncounted": (*stats[:2], None, mean, var, 0.1),
    }


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("layout", ["channels_last", "channel_slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(compiled_backend: str, dtype: torch.dtype, layout: str) -> None:
    for name, arguments in operator_arguments(dtype, layout, device_of(compiled_backend)).items():
        operator = getattr(LIBRARY, name.split()[0]).default
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        # The AOT test compares with tolerances that half precision does not meet.
        if dtype == torch.float32 and layout == "channels_last":
            tests += ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_fake_results_have_the_strides_of_the_real_ones(compiled_backend: str) -> None:
    """Strides of dimensions of size 1 included, which opcheck does not look at."""
    for shape in (T, replace(T, n=1), replace(T, c=1, k=1), replace(T, h=1), replace(T, h=1, w=1), replace(T, n=0)):
        call = temporal.random_call(shape, torch.float32).to(layout="channels_last", device=device_of(compiled_backend))
        x, weight = call.tensors["x"], call.tensors["weight"]
        arguments = {
            "temporal_conv": (x, weight, None, None, None, 1, 1, 1, True, False),
            "temporal_conv_bn": (x, weight, None, None, None, 1, 1, 1, 1e-5, True, False),
            "temporal_conv_backward": (call.grad, x, weight, None, call.grad, 1, 1, 1, *(True,) * 5, False),
        }
        for name, given in arguments.items():
            real = getattr(LIBRARY, name)(*given)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = getattr(LIBRARY, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
            pairs = zip(*((out,) if isinstance(out, Tensor) else out for out in (real, fake)), strict=True)
            for of_real, of_fake in pairs:
                assert of_real.shape == of_fake.shape
                assert of_real.stride() == of_fake.stride()
                assert of_real.dtype == of_fake.dtype


def compiled_run(call: Call, **options: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    return call.run(torch.compile(getattr(ops, call.op), fullgraph=True, **options))


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, result in ours.items():
        torch.testing.assert_close(result, expected[name], msg=lambda message, n=name: f"{n}: {message}")
    assert ours["output"].stride() == expected["output"].stride()


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@calls
def test_compiled_is_eager(compiled_backend: str, make: Any, compiler: str) -> None:
    """Output, gradients and running statistics, in one graph."""
    call = make().to(device=device_of(compiled_backend))
    assert_same(compiled_run(call, backend=compiler), call.run())


@pytest.mark.no_sanitizer
@calls
def test_compiled_reference(make: Any) -> None:
    call = make()
    with slowfast_fast.backend("reference"):
        assert_same(compiled_run(call, backend="aot_eager"), call.run())


@pytest.mark.no_sanitizer
def test_compiled_chain_of_ops() -> None:
    """Ops feeding each other between ordinary ones, with a memory layout to keep and a tensor that is used twice."""
    first, second = batch_norm.bn_call(T, torch.float32), batch_norm.bn_call(L, torch.float32)
    x = torch.randn(2, 4, 16, 3, 2)
    weights = [torch.randn(4, 4, 3, 1, 1), torch.randn(6, 4, 5, 1, 1)]

    def network(x: Tensor, a: Tensor, b: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        fast = ops.temporal_conv_bn(x, a, None, None, mean, var, x, num_batches_tracked=count, training=True, relu=True)
        slow = nn.functional.avg_pool3d(fast, (4, 1, 1)) * 2
        return ops.lateral_concat(slow, fast, b, alpha=4).square() + fast.mean()

    def run(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        buffers = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
        out = function(*leaves, *buffers)
        return [out.detach(), *buffers, *torch.autograd.grad(out.sum(), leaves)]

    assert first.op != second.op
    torch._dynamo.reset()
    for ours, expected in zip(run(torch.compile(network, fullgraph=True)), run(network), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.no_sanitizer
def test_dynamic_shapes() -> None:
    """Multigrid training changes T, crop and batch: one dynamic graph serves them."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.lateral_concat_bn, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Sizes that are equal in the first call would be taken for the same size: 7, 3, 9 (fast T), 8 and 10 are not.
        for n, t, h, w in ((7, 3, 8, 10), (3, 2, 5, 5), (4, 6, 9, 9)):
            call = batch_norm.bn_call(replace(L, n=n, t=t, h=h, w=w), torch.float32)
            call = call.to(layout="channels_last")
            assert_same(call.run(compiled), call.run())


@pytest.mark.no_sanitizer
def test_backend_chosen_outside_of_a_compiled_function() -> None:
    """A function compiled under one backend is compiled again under another, not run on the first."""
    call = temporal.random_call(T, torch.float32, gradients=False)
    torch._dynamo.reset()
    seen: list[set[str]] = []

    def note_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(ops.temporal_conv, fullgraph=True, backend=note_graph)
    for name in ("cpu", "reference", "cpu"):
        with slowfast_fast.backend(name):
            call.run(compiled)
    assert [any("slowfast_fast" in target for target in graph) for graph in seen] == [True, False]


@pytest.mark.no_sanitizer
def test_backend_chosen_inside_a_compiled_function() -> None:
    call = temporal.random_call(T, torch.float32, gradients=False)

    def function(**kwargs: Any) -> tuple[Tensor, Tensor]:
        with slowfast_fast.backend("reference"):
            of_reference = ops.temporal_conv(**kwargs)
        return of_reference, ops.temporal_conv(**kwargs)

    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    of_reference, of_kernel = torch.compile(function, fullgraph=True, backend=keep)(**call.tensors, **call.options)
    torch.testing.assert_close(of_reference, of_kernel)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("slowfast_fast" in target for target in targets) == 1
    assert any("conv3d" in target for target in targets)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 6, (3, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return ops.temporal_conv_bn(
            x,
            self.conv.weight,
            n.weight,
            n.bias,
            n.running_mean,
            n.running_var,
            num_batches_tracked=n.num_batches_tracked,
            training=self.training,
            relu=True,
        )


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    block = Block().eval()
    x = torch.randn(2, 4, 5, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    batch, frames = torch.export.Dim("batch", min=2), torch.export.Dim("frames", min=2)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch, 2: frames},), strict=strict)
    assert any("slowfast_fast.temporal_conv" in str(node.target) for node in program.graph.nodes)
    for shape in ((2, 4, 5, 3, 3), (3, 4, 8, 3, 3)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.no_sanitizer
def test_compiled_under_autocast() -> None:
    call = batch_norm.bn_call(T, torch.float32)

    def function(**kwargs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.temporal_conv_bn(**kwargs).float()

    torch._dynamo.reset()
    ours = call.run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for name, expected in call.run(function).items():
        torch.testing.assert_close(ours[name], expected)
