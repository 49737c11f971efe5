"""TF32: a float32 convolution on CUDA does what PyTorch's own would, its backward what its forward did."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import test_batch_norm as batch_norm
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from op_testing import Call
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_fast import ops
from slowfast_fast.ops import _common, _repeat

cudnn = torch.backends.cudnn
CALLS = {
    "temporal_conv": lambda: temporal.random_call(temporal.Shape(), torch.float32),
    "temporal_conv_bn": lambda: batch_norm.bn_call(temporal.Shape(), torch.float32),
    "lateral_concat": lambda: lateral.random_call(lateral.Shape(t=4), torch.float32),
    "lateral_concat_bn": lambda: batch_norm.bn_call(lateral.Shape(t=4), torch.float32),
}
calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    cudnn.fp32_precision = "none"
    cudnn.allow_tf32 = True


@pytest.fixture
def setting_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated as CUDA's; the CPU kernels ignore what they are told."""

    def allows(x: Tensor) -> bool:
        return _common._settings.conv_tf32

    def look_up(op: str, options: tuple[Any, ...], *tensors: Any) -> Any:
        return on_cpu(op, (*options, _common._settings.conv_tf32), *tensors)

    on_cpu = _repeat._look_up
    monkeypatch.setattr(_repeat, "_look_up", look_up)
    for op in ("temporal_conv", "lateral_concat"):
        monkeypatch.setattr(sys.modules[f"slowfast_fast.ops.{op}"], "allows_tf32", allows)


class Passed(TorchDispatchMode):
    """Notes the tf32 of every kernel called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "slowfast_fast" and func._schema.arguments[-1].name == "tf32":
            self.seen.append((func._schema.name.partition("::")[2], args[-1]))
        return func(*args, **(kwargs or {}))


def set_legacy(value: bool) -> None:
    cudnn.allow_tf32 = value


def set_conv(value: bool) -> None:
    cudnn.conv.fp32_precision = "tf32" if value else "ieee"


def set_both(value: bool) -> None:
    """Both interfaces, contradicting each other: reading the legacy one raises now."""
    cudnn.allow_tf32 = not value
    set_conv(value)
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = cudnn.allow_tf32


@pytest.mark.parametrize("setter", [set_legacy, set_conv, set_both])
def test_follows_the_setting(setter: Any) -> None:
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4, 5, device="cuda")
        for value in (True, False, True):
            setter(value)
            assert _common.allows_tf32(x) is value
            assert not _common.allows_tf32(x.half())
            assert not _common.allows_tf32(x.double())
            assert not _common.allows_tf32(x.cpu())


@calls
def test_the_backward_does_what_its_forward_did(setting_on_cpu: None, make: Any) -> None:
    call: Call = make().to(layout="channels_last")
    for value in (True, False):
        set_conv(value)
        tensors = {name: t.detach().clone() for name, t in call.tensors.items()}
        tensors["weight"].requires_grad_()
        with Passed() as passed:
            out = getattr(ops, call.op)(**tensors, **call.options)
            set_conv(not value)
            out.backward(call.grad)
        assert [tf32 for _, tf32 in passed.seen] == [value, value]
        assert [name.endswith("_backward") for name, _ in passed.seen] == [False, True]


@calls
def test_no_tf32_on_the_cpu(make: Any) -> None:
    call: Call = make()
    set_conv(True)
    with Passed() as passed:
        call.run()
    assert [tf32 for _, tf32 in passed.seen] == [False, False]


@pytest.mark.no_sanitizer
def test_compiled_for_each_setting(setting_on_cpu: None) -> None:
    call = temporal.random_call(temporal.Shape(), torch.float32, gradients=False)
    torch._dynamo.reset()
    seen: list[bool] = []

    def note_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "temporal_conv" in str(node.target))
        return graph.forward

    compiled = torch.compile(ops.temporal_conv, fullgraph=True, backend=note_graph)
    for value in (True, False, True):
        set_conv(value)
        call.run(compiled)
    assert seen == [True, False]
