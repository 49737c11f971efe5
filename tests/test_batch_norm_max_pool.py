"""batch_norm_max_pool: the training form of a stem, on every backend and on the CUDA kernels that the host runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import device_of
from cuda_host.build import SCHEDULES, Harness
from op_arguments import RUNNING, Normal, without
from op_testing import (
    LAYOUTS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_checkpoint,
    assert_dense,
    assert_same_for_any_number_of_threads,
    dtypes,
)
from torch import Tensor, nn

from slowfast_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

STEM = {"kernel": 3, "stride": 2, "padding": 1}
CASES = {
    "stem": ((2, 8, 3, 9, 7), STEM),
    "slow stem": ((1, 64, 2, 10, 6), STEM),
    "odd channels": ((1, 11, 2, 8, 9), STEM),
    "gaps between windows": ((2, 24, 2, 7, 6), {"kernel": 2, "stride": 3, "padding": 0}),
    "large windows": ((1, 17, 2, 9, 7), {"kernel": 5, "stride": 1, "padding": 2}),
    "several packs": ((1, 1032, 1, 5, 4), STEM),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random_call(case: tuple[tuple[int, ...], dict[str, int]], dtype: torch.dtype, *absent: str, **options: Any) -> Call:
    """A training step. Values of x are multiples of 1 / 256, so that windows have equal maxima, and two that differ
    stay apart when they are normalised."""
    shape, pool = case
    n, c, t, h, w = shape
    draw = Normal(dtype)
    tensors = {"x": torch.randn(shape).mul(256).round().div(256).to(dtype), **draw.norm(c)}
    tensors["gamma"] *= 2 * torch.randint(2, (c,)) - 1
    tensors = without(tensors, absent)
    missing = {name: None for name in ("gamma", "beta") if name in absent}
    out = [(size + 2 * pool["padding"] - pool["kernel"]) // pool["stride"] + 1 for size in (h, w)]
    return Call(
        "batch_norm_max_pool",
        tensors,
        {"relu": True} | pool | missing | options,
        tuple(name for name in ("x", "gamma", "beta") if name in tensors),
        draw(n, c, t, *out),
    )


@dtypes
@cases
def test_training_step(backend: str, case: tuple, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(case, dtype), device=device_of(backend))


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("gamma", "beta", *RUNNING)], ids=str)
def test_optional_arguments(backend: str, absent: tuple[str, ...], relu: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        make = partial(random_call, CASES["stem"], dtype, *absent, relu=relu)
        assert_as_exact_as_pytorch(make, device=device_of(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(CASES["stem"], dtype), layout, device_of(backend))


def far_from_zero() -> Call:
    """A mean of 256 standard deviations: E[x^2] - E[x]^2 would have nothing left in float32. The gradient of the ReLU
    is left out, whose mask depends on the mean's last bits."""
    call = random_call(((2, 16, 3, 19, 17), STEM), torch.float32, relu=False)
    call.tensors["x"] = call.tensors["x"].add(256).mul(256).round().div(256)
    return call


def test_values_far_from_zero(compiled_backend: str) -> None:
    assert_as_exact_as_pytorch(far_from_zero, device=device_of(compiled_backend), fewest_draws=3)


def test_as_stock_modules(backend: str) -> None:
    """Two steps beside the modules, which also decide to which of equal maxima a gradient goes."""
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    norm = nn.BatchNorm3d(8).double()
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.uniform_(norm.bias)  # or what equals the mean would be 0 but for rounding, on either side of the ReLU
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    for _ in range(2):
        call = random_call(CASES["stem"], torch.float64, "gamma", "beta")
        call.tensors["x"] = call.tensors["x"].mul(4).round().div(4)  # many equal maxima
        x = call.tensors["x"].requires_grad_()
        out = ops.batch_norm_max_pool(x, norm.weight, norm.bias, **buffers, relu=True, **STEM)
        ours = torch.autograd.grad(out, (x, norm.weight, norm.bias), call.grad)
        stock = pool(norm(x).relu())
        torch.testing.assert_close(out, stock, rtol=1e-12, atol=1e-12)
        for got, expected in zip(ours, torch.autograd.grad(stock, (x, *norm.parameters()), call.grad), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12)


def test_nan_and_infinity(compiled_backend: str) -> None:
    """They reach what they reach in stock: their channel and no other."""
    call = random_call(CASES["stem"], torch.float32, "gamma", "beta").to(device=device_of(compiled_backend))
    x = call.tensors["x"]
    x[1, 2, 1, 4, 4], x[0, 5, 0, 0, 0] = math.nan, math.inf
    results, stock = call.run(), call.run_stock()
    for name in ("output", "grad of x", "running_mean"):
        assert torch.equal(results[name].isnan(), stock[name].isnan()), name
    others = [channel for channel in range(8) if channel not in (2, 5)]
    torch.testing.assert_close(results["output"][:, others], stock["output"][:, others])


def test_a_channel_of_one_value(compiled_backend: str) -> None:
    """A constant channel and one whose gamma is 0 are beta everywhere; no gradient but beta's comes of them."""
    call = random_call(CASES["stem"], torch.float32).to(device=device_of(compiled_backend))
    call.tensors["x"][:, 1] = 0.75
    call.tensors["gamma"][3] = 0
    results = call.run()
    for channel in (1, 3):
        torch.testing.assert_close(
            results["output"][:, channel].unique(), call.tensors["beta"][channel : channel + 1].relu()
        )
    assert results["grad of x"][:, 3].abs().max() == 0
    assert results["grad of x"].isfinite().all()


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's own, for the reference backend
def test_empty_batch(backend: str) -> None:
    call = random_call(((0, 8, 2, 6, 6), STEM), torch.float32).to(device=device_of(backend))
    results = call.run()
    assert results["output"].shape == (0, 8, 2, 3, 3)
    assert results["num_batches_tracked"] == 4
    assert torch.equal(results["running_mean"], call.tensors["running_mean"])
    assert results["grad of gamma"].abs().max() == results["grad of beta"].abs().max() == 0


def test_output_and_gradient_are_dense(backend: str) -> None:
    results = random_call(CASES["stem"], torch.bfloat16).to(layout="contiguous", device=device_of(backend)).run()
    assert_dense(results["output"])
    assert results["output"].dtype == results["grad of x"].dtype == torch.bfloat16
    assert results["grad of gamma"].dtype == torch.float32


def test_saved_for_backward(compiled_backend: str) -> None:
    """x, gamma, beta and the statistics."""
    call = random_call(CASES["stem"], torch.float32).to(layout="channels_last", device=device_of(compiled_backend))
    tensors = {name: t.requires_grad_() if name in call.differentiable else t for name, t in call.tensors.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.batch_norm_max_pool(**tensors, **call.options)
    assert {t.data_ptr() for t in saved} >= {tensors[name].data_ptr() for name in call.differentiable}
    assert sorted(tuple(t.shape) for t in saved) == sorted([tuple(tensors["x"].shape), *[(8,)] * 4])


def test_gradcheck_and_double_backward(compiled_backend: str) -> None:
    if device_of(compiled_backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    call = random_call(((2, 3, 2, 5, 4), STEM), torch.float64).to(layout="channels_last")
    # Values so far apart that a difference quotient changes no maximum, and beta so large that none is near the ReLU.
    x = torch.randperm(call.tensors["x"].numel()).double().view(call.tensors["x"].shape) / 64
    inputs = [t.requires_grad_() for t in (x, call.tensors["gamma"], call.tensors["beta"] + 9)]
    assert torch.autograd.gradcheck(lambda *t: ops.batch_norm_max_pool(*t, relu=True, **STEM), inputs)
    (gradient,) = torch.autograd.grad(
        ops.batch_norm_max_pool(*inputs, **STEM).square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward through batch_norm_max_pool is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    assert_autocast(random_call(CASES["stem"], torch.float32), dtype, device_of(backend))


def test_checkpoint(backend: str) -> None:
    assert_checkpoint(random_call(CASES["stem"], torch.float32).to(device=device_of(backend)), use_reentrant=False)


def test_same_bits_for_any_number_of_threads(compiled_backend: str) -> None:
    call = random_call(((3, 24, 3, 23, 19), STEM), torch.float32)
    assert_same_for_any_number_of_threads(call.to(device=device_of(compiled_backend)))


def test_opcheck() -> None:
    call = random_call(CASES["stem"], torch.float32).to(layout="channels_last")
    x, gamma, beta = (call.tensors[name].requires_grad_() for name in call.differentiable)
    torch.library.opcheck(torch.ops.slowfast_fast.batch_norm_max_pool.default, (x, gamma, beta, 3, 2, 1, 1e-5, True))
    mean = x.detach().mean((0, 2, 3, 4))
    arguments = (call.grad, x.detach(), gamma.detach(), None, mean, mean.abs() + 1, 3, 2, 1, False, True, True, False)
    torch.library.opcheck(torch.ops.slowfast_fast.batch_norm_max_pool_backward.default, arguments)


WRONG = [
    (TypeError, {"x": torch.zeros(2, 8, 3, 9, 7, dtype=torch.int32)}, "x must be float32, float16, bfloat16 or"),
    (ValueError, {"x": torch.zeros(1, 8, 1, 1, 1)}, "Expected more than 1 value per channel when training, got input"),
    (ValueError, {"gamma": torch.zeros(5)}, "gamma must be (8,), one value per output channel; got (5,)"),
    (TypeError, {"beta": torch.zeros(8).half()}, "beta must be float32 or of the dtype of x, torch.float32; got"),
    (ValueError, {"beta": torch.zeros(8, device="meta")}, "beta must be on the device of x, cpu; got meta"),
    (ValueError, {"running_var": None}, "running_mean and running_var must be given together; got None for running_v"),
    (ValueError, {"kernel": 17, "padding": 8}, "kernel must be at most 15; got 17"),
    (TypeError, {"relu": 1}, "relu must be True or False; got int 1"),
    (ValueError, {"eps": 0.0}, "eps must be positive for batch statistics; got 0.0"),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = random_call(CASES["stem"], torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        ops.batch_norm_max_pool(**call.tensors | call.options | changes)


# The CUDA kernels on the host


def run_on(host: Harness, call: Call) -> dict[str, Tensor]:
    """What of a step the kernels compute, under the names of Call.run."""
    t, o = call.tensors, call.options
    pool = (o["kernel"], o["stride"], o["padding"])
    x, gamma, beta = t["x"], t.get("gamma"), t.get("beta")
    y, mean, invstd, unbiased = host.batch_norm_max_pool(x, gamma, beta, *pool, 1e-5, o["relu"])
    grads = host.batch_norm_max_pool_backward(
        call.grad, x, gamma, beta, mean, invstd, *pool, o["relu"], True, gamma is not None, beta is not None
    )
    named = {f"grad of {name}": g for name, g in zip(("x", "gamma", "beta"), grads, strict=True) if name in t}
    return {"output": y, "running_mean": mean, "running_var": unbiased, **named}


class OnTheHost(Call):
    """A call whose kernels are the harness's; the running statistics are then the batch's (momentum 1)."""

    host: Harness

    def run(self, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
        results = run_on(self.host, self) if function is None else super().run(function)
        results.pop("num_batches_tracked", None)
        return results


def host_call(host: Harness, *arguments: Any, **options: Any) -> OnTheHost:
    call = random_call(*arguments, momentum=1.0, **options)
    OnTheHost.host = host
    return OnTheHost(**vars(call))


@dtypes
@cases
def test_cuda_kernels_on_the_host(host: Harness, case: tuple, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: host_call(host, case, dtype))


@pytest.mark.parametrize("layout", ["channel_slice", "time_slice", "batch_slice", "width_slice"])
def test_slices_on_the_host(host: Harness, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_exact_as_pytorch(lambda dtype=dtype: host_call(host, CASES["stem"], dtype), layout)


def test_values_far_from_zero_on_the_host(host: Harness) -> None:
    OnTheHost.host = host

    def make() -> OnTheHost:
        call = far_from_zero()
        return OnTheHost(**vars(call) | {"options": call.options | {"momentum": 1.0}})

    assert_as_exact_as_pytorch(make, fewest_draws=3)


def test_results_on_the_host_do_not_depend_on_the_schedule(host: Harness) -> None:
    call = host_call(host, ((2, 40, 2, 13, 9), STEM), torch.bfloat16).to(layout="channels_last")

    def under(schedule: str) -> dict[str, Tensor]:
        host.set_schedule(schedule)
        return call.run()

    first, *others = [under(schedule) for schedule in SCHEDULES]
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)
