"""How an op is judged: the same call in float64 (exact), in PyTorch's own operators in the dtype of the test
(stock), and on the op.

An error is a relative L2 distance from exact. Ours may be at most twice that of stock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slowfast_fast import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
CHANNELS_LAST = torch.channels_last_3d
LAYOUTS = ("channels_last", "contiguous", "channel_slice", "time_slice", "batch_slice", "width_slice", "transposed")
# Enough independent values that a ratio of two errors means something; a single value's may be 0 by luck.
FEWEST_VALUES = 64


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same values in another memory layout. What lies between and beside them is NaN."""

    def inside(wide: Tensor, *index: slice) -> Tensor:
        wide = torch.full_like(wide.contiguous(memory_format=CHANNELS_LAST), math.nan)
        view = wide[index]
        return view.copy_(tensor)

    n, c, t, h, w = tensor.shape
    every = slice(None)
    match layout:
        case "channels_last":
            return tensor.contiguous(memory_format=CHANNELS_LAST)
        case "contiguous":
            return tensor.contiguous()
        case "channel_slice":
            return inside(tensor.new_empty(n, c + 8, t, h, w), every, slice(3, 3 + c))
        case "time_slice":
            return inside(tensor.new_empty(n, c, 2 * t + 1, h, w), every, every, slice(1, None, 2))
        case "batch_slice":
            return inside(tensor.new_empty(2 * n + 1, c, t, h, w), slice(1, None, 2))
        case "width_slice":
            return inside(tensor.new_empty(n, c, t, h, 2 * w), every, every, every, every, slice(1, None, 2))
        case "transposed":
            return tensor.transpose(3, 4).contiguous(memory_format=CHANNELS_LAST).transpose(3, 4)
    raise ValueError(layout)


@dataclass(frozen=True)
class Call:
    """One call of an op: its tensors by argument name and its other arguments."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    # Gradients are asked of these; grad is the one given for the output.
    differentiable: tuple[str, ...] = ()
    grad: Tensor | None = None
    updated: tuple[str, ...] = field(default=("running_mean", "running_var"))

    def to(self, dtype: torch.dtype | None = None, layout: str | None = None, device: str | None = None) -> Call:
        """The same call with every floating-point tensor in another dtype, or every activation in another layout."""

        def convert(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            if layout is not None and tensor.dim() == 5 and name != "weight":
                tensor = lay_out(tensor, layout)
            return tensor

        tensors = {name: convert(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, grad=convert("grad", self.grad))

    def run(self, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
        """Results by name: the output, what the call updates in place, and each gradient."""
        function = function or getattr(ops, self.op)
        tensors = {
            name: tensor.detach().clone() if name in self.updated or not tensor.is_floating_point() else tensor.detach()
            for name, tensor in self.tensors.items()
        }
        for name in self.differentiable:
            tensors[name].requires_grad_()
        out = function(**tensors, **self.options)
        results = {"output": out.detach()}
        results.update({name: tensors[name] for name in self.updated if name in tensors})
        if self.differentiable:
            gradients = torch.autograd.grad(out, [tensors[name] for name in self.differentiable], self.grad)
            results.update({f"grad of {name}": g for name, g in zip(self.differentiable, gradients, strict=True)})
        return results

    def run_stock(self) -> dict[str, Tensor]:
        return self.run(getattr(reference, self.op))

    def run_exact(self) -> dict[str, Tensor]:
        return self.to(torch.float64).run_stock()


def away_from_the_kink(call: Call, margin: float = 0.05) -> Call:
    """``call`` with the gradient of the output zero where the ReLU's argument is near 0: there the mask depends on
    rounding, and the error would count how often rounding went the other way."""
    if not call.options.get("relu", call.op.startswith("lateral")) or call.grad is None:
        return call
    before = replace(call, options=call.options | {"relu": False}, differentiable=()).run_exact()["output"]
    return replace(call, grad=torch.where(before.abs() > margin, call.grad, 0).to(call.grad.dtype))


def assert_as_exact_as_pytorch(make: Callable[[], Call], layout: str = "channels_last", device: str = "cpu") -> None:
    """Draw calls from ``make`` until each result has enough values to judge, and compare them all."""
    ours, stock, norm, values, eps = {}, {}, {}, {}, {}
    while not values or min(values.values()) < FEWEST_VALUES:
        call = away_from_the_kink(make())
        exact = call.run_exact()
        for errors, results in ((ours, call.to(layout=layout, device=device).run()), (stock, call.run_stock())):
            for name, result in results.items():
                assert result.shape == exact[name].shape, f"{name}: shape {result.shape}, expected {exact[name].shape}"
                distance = (result.cpu().double() - exact[name]).square().sum().item()
                errors[name] = errors.get(name, 0.0) + distance
                eps[name] = torch.finfo(result.dtype).eps
        for name, result in exact.items():
            norm[name] = norm.get(name, 0.0) + result.square().sum().item()
            values[name] = values.get(name, 0) + max(result.numel(), 1)
    for name in values:
        # In float64 both differ from "exact", which is float64 itself, by rounding alone.
        allowed = max(2 * math.sqrt(stock[name]), 4 * eps[name] * math.sqrt(norm[name]) * (stock[name] == 0))
        if eps[name] == torch.finfo(torch.float64).eps:
            allowed = max(allowed, 1e-12 * math.sqrt(norm[name]))
        error = math.sqrt(ours[name])
        assert error <= allowed, (
            f"{name}: error {error:.3g}, PyTorch's own {math.sqrt(stock[name]):.3g}, "
            f"norm of the exact result {math.sqrt(norm[name]):.3g}, over {values[name]} values"
        )


def assert_exact(call: Call, layout: str = "channels_last", device: str = "cpu") -> None:
    """For calls whose every intermediate sum is exact in float32: the results are the exact ones, rounded once."""
    exact = call.run_exact()
    results = call.to(layout=layout, device=device).run()
    for name in results:
        expected = exact[name].to(results[name].dtype)
        assert torch.equal(results[name].cpu(), expected), f"{name} is not the exact result rounded once"


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Integers of -2 to 2, half of them 0: their products and sums are exact in float32."""
    return (torch.randint(-2, 3, shape) * torch.randint(0, 2, shape)).to(dtype)


def integer_scales(k: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0])[torch.randint(0, 5, (k,))].to(dtype)


def assert_dense(out: Tensor) -> None:
    """Outputs are dense channels_last_3d."""
    assert out.stride() == torch.empty(out.shape, memory_format=CHANNELS_LAST).stride(), out.stride()
