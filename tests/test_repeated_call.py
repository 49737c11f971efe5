"""A call like an earlier one takes the short way: the same results and the same errors, without the checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_batch_norm as batch_norm
import test_bottleneck as block
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from op_testing import Call, assert_as_exact_as_pytorch, dtypes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import slowfast_fast
from slowfast_fast import ops, reference
from slowfast_fast.ops import _repeat

T, L = temporal.Shape(), lateral.Shape(t=4)


def eval_call(shape: Any, dtype: torch.dtype = torch.float32) -> Call:
    return replace(batch_norm.bn_call(shape, dtype, training=False), differentiable=())


CALLS: dict[str, Callable[[], Call]] = {
    "temporal_conv": lambda: temporal.random_call(T, torch.float32, gradients=False),
    "temporal_conv gradients": lambda: temporal.random_call(T, torch.float32),
    "temporal_conv_bn": lambda: batch_norm.bn_call(T, torch.float32),
    "temporal_conv_bn evaluation": lambda: eval_call(T),
    "lateral_concat": lambda: lateral.random_call(L, torch.float32),
    "lateral_concat_bn": lambda: batch_norm.bn_call(L, torch.float32),
    "lateral_concat_bn evaluation": lambda: eval_call(L),
    "bottleneck": lambda: block.random_call(block.Shape(), torch.float32),
}
calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def no_plans() -> None:
    _repeat._plans.clear()


def rows(call: Call) -> Call:
    return call.to(layout="channels_last")


def forbid_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the long way was taken")

    monkeypatch.setattr(sys.modules["slowfast_fast.ops._checks"], "convolution", fail)
    monkeypatch.setattr(sys.modules["slowfast_fast.ops.lateral_concat"], "_check_lateral", fail)
    monkeypatch.setattr(sys.modules["slowfast_fast.ops.bottleneck"], "_check", fail)


@calls
def test_the_short_way_gives_the_same(make: Callable[[], Call], monkeypatch: pytest.MonkeyPatch) -> None:
    call = rows(make())
    expected = call.run()
    assert len(_repeat._plans) == 1
    forbid_the_long_way(monkeypatch)
    for name, result in call.run().items():
        assert torch.equal(result, expected[name]), name


@dtypes
@pytest.mark.parametrize("shape", [T, L], ids=["temporal_conv_bn", "lateral_concat_bn"])
def test_frozen_statistics_are_as_exact_as_pytorch(shape: Any, dtype: torch.dtype) -> None:
    """The fold inside of the op: it takes calls of which no gradient is wanted."""
    assert_as_exact_as_pytorch(lambda: eval_call(shape, dtype))
    assert {plan.kernel._schema.name.rpartition("_")[2] for plan in _repeat._plans.values()} == {"frozen"}


def test_frozen_statistics_with_a_gradient() -> None:
    """A plan of a call without gradients does not swallow those of a later one."""
    call = rows(batch_norm.bn_call(T, torch.float32, training=False))
    replace(call, differentiable=()).run()
    assert len(_repeat._plans) == 1
    gradients = call.run()
    stock = call.run_stock()
    for name in stock:
        torch.testing.assert_close(gradients[name], stock[name], rtol=1e-4, atol=1e-4)


def message_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (which one is what the test is about)
        function(*args, **kwargs)
    return caught.type, str(caught.value)


WRONG: dict[str, dict[str, Any]] = {
    "x": {"x": [1.0]},
    "x's dtype": {"x": torch.zeros(2, 3, 5, 4, 2, dtype=torch.int64)},
    "weight's dtype": {"weight": torch.zeros(4, 3, 3, 1, 1, dtype=torch.float64)},
    "weight's channels": {"weight": torch.zeros(4, 5, 3, 1, 1)},
    "scale's size": {"scale": torch.zeros(5)},
    "scale's type": {"scale": [1.0]},
    "scale's dtype": {"scale": torch.zeros(4, dtype=torch.float16)},
    "scale on another device": {"scale": torch.zeros(4, device="meta")},
    "shift's size": {"shift": torch.zeros(4, 1)},
    "residual's shape": {"residual": torch.zeros(2, 4, 5, 4, 3)},
    "weight on another device": {"weight": torch.zeros(4, 3, 3, 1, 1, device="meta")},
    "residual on another device": {"residual": torch.zeros(2, 4, 5, 4, 2, device="meta")},
    "residual's dtype": {"residual": torch.zeros(2, 4, 5, 4, 2, dtype=torch.float64)},
    "a bool for an int": {"stride": True},
    "an int for a bool": {"relu": 1},
    "a list": {"dilation": [1, 1, 1]},
    "too much padding": {"padding": -1},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_as_before(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "x": torch.randn(2, 3, 5, 4, 2).contiguous(memory_format=torch.channels_last_3d),
        "weight": torch.randn(4, 3, 3, 1, 1),
        "scale": torch.rand(4),
        "shift": torch.rand(4),
        "residual": torch.randn(2, 4, 5, 4, 2).contiguous(memory_format=torch.channels_last_3d),
        "relu": True,
    }
    expected = message_of(ops.temporal_conv, **right | wrong)
    assert expected[0] in (TypeError, ValueError)
    assert not _repeat._plans
    ops.temporal_conv(**right)
    assert _repeat._plans
    assert message_of(ops.temporal_conv, **right | wrong) == expected


def test_what_is_wrong_with_statistics_is_told_as_before() -> None:
    call = rows(batch_norm.bn_call(T, torch.float32))
    right = call.tensors | call.options
    for wrong in (
        {"running_mean": torch.zeros(T.k + 1)},
        {"running_var": torch.zeros(T.k, dtype=torch.float16)},
        {"running_mean": torch.zeros(2 * T.k)[::2]},
        {"num_batches_tracked": torch.tensor(0.0)},
        {"num_batches_tracked": 3},
        {"momentum": "a tenth"},
        {"running_var": None},
    ):
        _repeat._plans.clear()
        expected = message_of(ops.temporal_conv_bn, **right | wrong)
        ops.temporal_conv_bn(**right)
        before = {name: right[name].clone() for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert message_of(ops.temporal_conv_bn, **right | wrong) == expected, wrong
        assert all(torch.equal(right[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", ["contiguous", "channel_slice"])
def test_layouts(layout: str) -> None:
    """What must be copied is copied each time; what is read in place takes the short way."""
    call = temporal.random_call(replace(T, c=4, k=5), torch.float32, gradients=False)
    expected = rows(call).run()["output"]
    _repeat._plans.clear()
    laid_out = call.to(layout=layout)
    for _ in range(2):
        assert torch.equal(laid_out.run()["output"], expected)
    assert len(_repeat._plans) == (layout == "channel_slice")


def test_a_plan_is_of_its_backend() -> None:
    call = rows(CALLS["temporal_conv"]())
    call.run()
    with slowfast_fast.backend("reference"):
        torch.testing.assert_close(call.run()["output"], call.run_stock()["output"], rtol=0, atol=0)
    with slowfast_fast.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for"):
        call.run()


def test_autocast_and_subclasses() -> None:
    call = rows(CALLS["temporal_conv"]())
    call.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert call.run()["output"].dtype == torch.bfloat16

    class Marked(Tensor):
        pass

    marked = call.tensors["x"].as_subclass(Marked)
    assert type(ops.temporal_conv(**call.tensors | {"x": marked}, **call.options)) is Marked


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "values": lambda t: t.mul_(2),
    "memory": lambda t: setattr(t, "data", t.data * 2),
    "strides": lambda t: setattr(t, "data", torch.stack([t.data, t.data], -1)[..., 0]),
    "sizes": lambda t: setattr(t, "data", torch.cat([t.data, t.data])),
    "dtypes": lambda t: setattr(t, "data", t.data.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_same_tensors_changed(change: Callable[[Tensor], Any]) -> None:
    """A repeated call looks at its tensors anew."""
    call = rows(eval_call(L))
    before = ops.lateral_concat_bn(**call.tensors, **call.options)
    for tensor in call.tensors.values():
        if tensor.is_floating_point():
            change(tensor)
    y, expected = (getattr(library, call.op)(**call.tensors, **call.options) for library in (ops, reference))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if change is not CHANGES["strides"]:
        assert y.shape != before.shape or not torch.allclose(y, before.to(y.dtype), rtol=1e-9, atol=0)


def test_inference_mode() -> None:
    """A plan made outside of it serves inside, and one made inside serves outside, where gradients are recorded."""
    call = rows(batch_norm.bn_call(L, torch.float32, training=False))
    without_gradient = replace(call, differentiable=())
    outside, gradients = without_gradient.run(), call.run()
    with torch.inference_mode():
        inside = without_gradient.run()
        assert inside["output"].is_inference()
    assert torch.equal(inside["output"], outside["output"])
    again = call.run()
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


def test_function_modes_see_a_repeated_call() -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(function))
            return function(*args, **kwargs or {})

    call = rows(CALLS["temporal_conv"]())
    call.run()
    with Names() as names:
        call.run()
    assert any("temporal_conv" in name for name in names.seen)


def test_the_profiler_sees_a_repeated_call() -> None:
    call = rows(CALLS["temporal_conv"]())
    call.run()
    with torch.profiler.profile() as profile:
        call.run()
    assert "slowfast_fast::temporal_conv" in {event.name for event in profile.events()}


def test_tensors_of_several_devices_have_no_result() -> None:
    """Nor do they where one is on the meta device, whose kernels compute nothing."""
    x, vector = torch.randn(1, 4, 3, 2, 2), torch.rand(4)
    op = torch.ops.slowfast_fast.temporal_conv.default
    with pytest.raises(RuntimeError, match="tensors of one device; got cpu, meta"):
        op(x, torch.randn(4, 4, 1, 1, 1), vector.to("meta"), None, None, 1, 0, 1, False, False)
    statistics = torch.zeros(4, device="meta"), torch.zeros(4), None
    with pytest.raises(RuntimeError, match="tensors of one device; got cpu, meta"):
        torch.ops.slowfast_fast.update_running_stats(*statistics, vector, vector, 0.1)


def test_explain_sees_a_repeated_call() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return ops.temporal_conv(x, self.weight)

    layer, x = Layer(), rows(CALLS["temporal_conv"]()).tensors["x"]
    x = torch.randn(2, 3, 5, 4, 2).contiguous(memory_format=torch.channels_last_3d)
    layer(x)
    rows_seen = slowfast_fast.explain(layer, x, show=False).rows
    assert [row.what for row in rows_seen][:1] == ["temporal_conv"]


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_repeat, "MOST_PLANS", 3)
    weight = torch.randn(2, 2, 1, 1, 1)
    for frames in range(1, 9):
        ops.temporal_conv(torch.zeros(1, 2, frames, 1, 1), weight)
        assert len(_repeat._plans) <= 3
