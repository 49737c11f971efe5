"""How an op is judged: the same call in float64 (exact), in PyTorch's own operators in the dtype of the test
(stock), and on the op.

An error is a relative L2 distance from exact. Ours may be at most twice that of stock, or what rounding the exact
result to its dtype may cost, where stock came closer than that by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from op_arguments import RUNNING
from torch import Tensor

from slowfast_fast import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
CHANNELS_LAST = torch.channels_last_3d
ROWS = ("channels_last", "channel_slice", "time_slice", "batch_slice", "width_slice")
LAYOUTS = (*ROWS, "contiguous", "transposed")
# Enough independent values that a ratio of two errors means something; a single value's may be 0 by luck.
FEWEST_VALUES = 128


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
    updated: tuple[str, ...] = RUNNING

    def to(self, dtype: torch.dtype | None = None, layout: str | None = None, device: str | None = None) -> Call:
        """The same call with every floating-point tensor in another dtype, or every activation in another layout."""

        def convert(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            if layout is not None and tensor.dim() == 5 and "weight" not in name:
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


def allocations(run: Callable[[], object]) -> list[int]:
    """The bytes of every tensor that PyTorch's CPU allocator hands out in ``run``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def assert_as_exact_as_pytorch(
    make: Callable[[], Call],
    layout: str = "channels_last",
    device: str = "cpu",
    exact_on: str = "cpu",
    fewest_draws: int = 1,
    fewest_values: int = FEWEST_VALUES,
    trials: int = 1,
) -> None:
    """Draw calls from ``make`` until each result has enough values to judge, and compare them all. ``exact_on`` is the
    device of the float64 computation. With several trials the median one of each result decides: for ops with a ReLU
    inside, which a rounding error flips in ours or in PyTorch's now and then."""
    tried = [_judge(make, layout, device, exact_on, fewest_draws, fewest_values) for _ in range(trials)]
    for name in tried[0]:
        ranked = sorted((trial[name] for trial in tried), key=lambda judgement: judgement.ratio)
        judgement = ranked[trials // 2]
        assert judgement.ours <= judgement.allowed, f"{name}: {judgement}"


def _judge(
    make: Callable[[], Call], layout: str, device: str, exact_on: str, fewest_draws: int, fewest_values: int
) -> dict[str, Judgement]:
    judged: dict[str, Judgement] = {}
    draws = 0
    while draws < fewest_draws or min(j.values for j in judged.values()) < fewest_values:
        draws += 1
        call = away_from_the_kink(make().to(device=exact_on))
        # PyTorch's operators sum in another order for another layout: they are given the one in which the op computes.
        same = call.to(layout=layout, device=device)
        rows = same if layout in ROWS else call.to(layout="channels_last", device=device)
        exact, ours, stock = call.run_exact(), same.run(), rows.run_stock()
        assert ours.keys() == exact.keys()
        for name, result in ours.items():
            assert result.shape == exact[name].shape, f"{name}: shape {result.shape}, expected {exact[name].shape}"
            if result.is_floating_point():
                judged.setdefault(name, Judgement()).add(result, stock[name], exact[name])
            else:
                assert torch.equal(result.cpu(), exact[name].cpu()), name
    return judged


@dataclass
class Judgement:
    """Squared L2 norms of errors and of the exact result, summed over draws."""

    ours: float = 0.0
    stock: float = 0.0
    exact: float = 0.0
    values: int = 0
    eps: float = 0.0

    def add(self, ours: Tensor, stock: Tensor, exact: Tensor) -> None:
        self.ours += (ours.to(exact.device).double() - exact).square().sum().item()
        self.stock += (stock.to(exact.device).double() - exact).square().sum().item()
        self.exact += exact.square().sum().item()
        self.values += exact.numel()
        self.eps = torch.finfo(ours.dtype).eps

    @property
    def allowed(self) -> float:
        # "Exact" is float64, and has rounding errors of its own.
        rounding = 1e-12 if self.eps == torch.finfo(torch.float64).eps else self.eps / 2
        return max(4 * self.stock, rounding**2 * self.exact)

    @property
    def ratio(self) -> float:
        return self.ours / self.allowed if self.allowed else self.ours

    def __str__(self) -> str:
        ours, stock = (math.sqrt(error / self.exact) if self.exact else error for error in (self.ours, self.stock))
        return f"relative error {ours:.3g}, PyTorch's own {stock:.3g}, over {self.values} values"


def assert_exact(call: Call, layout: str = "channels_last", device: str = "cpu") -> None:
    """For calls whose every intermediate sum is exact in float32: the results are the exact ones, rounded once."""
    exact = call.run_exact()
    results = call.to(layout=layout, device=device).run()
    for name in results:
        expected = exact[name].to(results[name].dtype)
        assert torch.equal(results[name].cpu(), expected), f"{name} is not the exact result rounded once"


def assert_same_for_any_number_of_threads(call: Call) -> None:
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 5, 1):
            torch.set_num_threads(count)
            runs.append(call.run())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, result in run.items():
            assert torch.equal(result, runs[0][name]), name


def assert_autocast(call: Call, dtype: torch.dtype, device: str) -> None:
    """A float32 call under autocast is the call on activations and weight cast to ``dtype``, bit for bit: the vectors
    are not cast, the output is in ``dtype`` and gradients come back in float32."""
    call = call.to(device=device)

    def as_float32(**kwargs: Any) -> Tensor:
        out = getattr(ops, call.op)(**kwargs)
        assert out.dtype == dtype
        return out.float()

    with torch.autocast(device, dtype):
        results = call.run(as_float32)
    cast = {name: tensor.to(dtype) if tensor.dim() == 5 else tensor for name, tensor in call.tensors.items()}
    expected = replace(call, tensors=cast, grad=None if call.grad is None else call.grad.to(dtype)).run()
    for name, result in results.items():
        assert result.dtype == (torch.int64 if name == "num_batches_tracked" else torch.float32), name
        assert torch.equal(result, expected[name].to(result.dtype)), name


def assert_same_alone_and_in_a_batch(call: Call) -> None:
    """What one clip gives does not depend on the others."""
    together = call.run()["output"]
    for i in range(len(together)):
        alone = replace(call, tensors=call.tensors | {"x": call.tensors["x"][i : i + 1]}).run()["output"]
        assert torch.equal(alone, together[i : i + 1])


def assert_checkpoint(call: Call, use_reentrant: bool) -> None:
    """Gradients are the same through a checkpoint, which runs the forward again."""
    names = call.differentiable

    def checkpointed(**kwargs: Any) -> Tensor:
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return torch.utils.checkpoint.checkpoint(
            lambda *tensors: getattr(ops, call.op)(**dict(zip(names, tensors, strict=True)), **rest),
            *(kwargs[name] for name in names),
            use_reentrant=use_reentrant,
        )

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        tensors = {name: tensor.detach().clone() for name, tensor in call.tensors.items()}
        for name in names:
            tensors[name].requires_grad_()
        function(**tensors, **call.options).backward(call.grad)
        return [tensors[name].grad for name in names]

    for name, ours, plain in zip(names, gradients(checkpointed), gradients(getattr(ops, call.op)), strict=True):
        torch.testing.assert_close(ours, plain, msg=lambda message, n=name: f"{n}: {message}")


def assert_dense(out: Tensor) -> None:
    """Outputs are dense channels_last_3d."""
    assert out.stride() == torch.empty(out.shape, memory_format=CHANNELS_LAST).stride(), out.stride()
