"""Blocks in training whose last convolution the CUDA kernels compute again wherever its raw output is needed
(csrc/cuda/recompute.cuh), on the host as in test_cuda_host.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from block_testing import PARAMETERS, BlockCall, Shape, badly_scaled, call_of, layers_of, random_call
from cuda_host.block import HostCall, on_host
from cuda_host.build import Harness
from cuda_host.schedules import assert_all_needed, assert_same_under_all
from op_testing import allocations, assert_as_exact_as_pytorch, dtypes
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

# By the kernels that have the products of c in 16 bits.
BLOCKS = {
    "narrow": Shape(n=1, c=32, j=8, k=32, t=4, h=5, w=7, shortcut=False),
    "narrow_shortcut": Shape(c=8, j=16, k=64, t=2, stride=2, h=9, w=6),
    "tiles": Shape(n=1, c=136, j=64, k=136, t=3, h=5, w=6, shortcut=False),
    "tiles_shortcut": Shape(c=72, j=40, k=144, kt=1, t=2, stride_a=2, stride=2, h=8, w=7),  # clips of one frame
    "general": Shape(n=1, c=66, j=33, k=66, t=3, h=4, w=5, shortcut=False),
    "general_shortcut": Shape(c=9, j=5, k=70, t=2, h=5, w=6),
}
KERNELS = {"narrow": "narrow_kernel", "tiles": "tile_product_kernel", "general": "sum_gradient_kernel"}
blocks = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def harness(host: Harness, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(HostCall, "host", host, raising=False)
    yield
    host.force_plan(None)


def on_harness(call: BlockCall) -> HostCall:
    return HostCall(**vars(call))


@dtypes
@blocks
def test_as_exact_as_pytorch(name: str, dtype: torch.dtype) -> None:
    judged = {"trials": 3, "fewest_values": 256} if dtype == torch.float32 else {}
    assert_as_exact_as_pytorch(lambda: on_harness(random_call(BLOCKS[name], dtype)), **judged)


@pytest.mark.parametrize("plan", [("wide", 1), ("tall", 1), ("small", 1), ("small", 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tile(host: Harness, dtype: torch.dtype, plan: tuple[str, int]) -> None:
    """And a depth that is split, whose parts the epilogue adds up."""
    shape = replace(BLOCKS["tiles"], c=136, j=136, k=272, t=2, shortcut=True)
    host.force_plan(*plan)
    assert_as_exact_as_pytorch(lambda: on_harness(random_call(shape, dtype)))


@pytest.mark.parametrize("name", ["mean_100", "constant", "correlated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [32, 40], ids=["narrow", "tiles"])
def test_badly_scaled(name: str, dtype: torch.dtype, k: int) -> None:
    shape = Shape(n=1, c=8, j=16, k=k, t=4, h=9, w=10, kt=1)
    assert_as_exact_as_pytorch(lambda: on_harness(badly_scaled(name, shape, dtype)), trials=7)


@dtypes
@blocks
def test_which_kernels(host: Harness, name: str, dtype: torch.dtype) -> None:
    call = call_of(BLOCKS[name], dtype)
    launched = host.kernels(lambda: call.run(on_host(host, False)))
    family = KERNELS[name.removesuffix("_shortcut")]
    if dtype == torch.float64:
        family = "sum_gradient_kernel"
    elif dtype == torch.float32 and family == "narrow_kernel":
        family = "tile_product_kernel"
    assert {family, "merge_gradient_sums", "normalising_scale", "gradient_coefficients"} <= launched
    assert ("sum_gradient_kernel" in launched) == (family == "sum_gradient_kernel")


@blocks
def test_no_raw_output(host: Harness, name: str) -> None:
    """As wide as the result are the result and what a shortcut adds to it, in the backward the gradient past the ReLU
    and that of c's output. The shortcut's is formed in the memory of the former."""
    shape = BLOCKS[name]
    call = call_of(shape, torch.bfloat16).to(layout="channels_last")
    tensors = {key: value.detach().clone() for key, value in call.tensors.items()}
    for key in call.differentiable:
        tensors[key].requires_grad_()
    wide = torch.empty(shape.out).numel() * 2
    results: list[Tensor] = []

    function, layers = on_host(host, False), layers_of(tensors)
    forward = allocations(lambda: results.append(function(tensors["x"], *layers, **call.options)))
    assert forward.count(wide) == 1 + shape.shortcut
    assert allocations(lambda: results[0].backward(call.grad)).count(wide) == 2


@pytest.mark.parametrize("name", ["narrow", "narrow_shortcut", "tiles"])
def test_tf32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of 11 bits leave errors of 2^-11, eight of them at most one upon the other. Where channels are on or off
    for good, as those of a and b are here, the gradient of their beta is nothing but errors."""
    monkeypatch.setattr(HostCall, "tf32", True)
    call = random_call(BLOCKS[name], torch.float32, active=6.0)
    exact = call.run_exact()
    for result, value in on_harness(call).run().items():
        if result in ("grad of a_beta", "grad of b_beta"):
            continue
        distance = (value.double() - exact[result]).norm() / exact[result].double().norm()
        assert distance < 2**-8, f"{result} is {distance:.2g} off"


@pytest.mark.parametrize("name", ["narrow", "tiles", "general"])
@pytest.mark.parametrize("offset", [8, 1], ids=["pitched", "misaligned"])
def test_slices(host: Harness, name: str, offset: int) -> None:
    """x and the gradient of the result as channel slices: read in place, by other kernels where they are misaligned."""
    call = random_call(BLOCKS[name], torch.bfloat16)

    def sliced(tensor: Tensor) -> Tensor:
        wider = torch.full((tensor.shape[0], tensor.shape[1] + 16, *tensor.shape[2:]), torch.nan, dtype=tensor.dtype)
        view = wider.contiguous(memory_format=torch.channels_last_3d)[:, offset : offset + tensor.shape[1]]
        return view.copy_(tensor)

    def run(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tensors = {key: value.detach().clone() for key, value in call.tensors.items()}
        tensors["x"] = place(tensors["x"])
        wanted = [tensors[name].requires_grad_() for name in ("x", "a_weight", "b_weight", "c_weight")]
        out = on_host(host, False)(tensors["x"], *layers_of(tensors), **call.options)
        return [out, *torch.autograd.grad(out, wanted, place(call.grad))]

    dense = run(lambda tensor: tensor.contiguous(memory_format=torch.channels_last_3d))
    for value, expected in zip(run(sliced), dense, strict=True):
        distance = (value.double() - expected.double()).norm() / expected.double().norm()
        assert distance <= (2e-2 if offset % 8 else 0)


@pytest.mark.parametrize("name", ["narrow", "tiles", "general"])
def test_without_gamma_and_beta(name: str) -> None:
    def make() -> HostCall:
        call = random_call(BLOCKS[name], torch.bfloat16)
        absent = ("c_gamma", "c_beta")
        tensors = {key: value for key, value in call.tensors.items() if key not in absent}
        wanted = tuple(key for key in call.differentiable if key not in absent)
        return on_harness(replace(call, tensors=tensors, differentiable=wanted))

    assert_as_exact_as_pytorch(make)


def test_constant_channels() -> None:
    """Far from zero, where invstd is 316: what is left of them is beta, exactly."""
    call = random_call(BLOCKS["tiles"], torch.float32)
    tensors = dict(call.tensors)
    tensors["b_gamma"] = torch.zeros_like(tensors["b_gamma"])
    tensors["b_beta"] = torch.full_like(tensors["b_beta"], 100.0)
    tensors["x"] = torch.zeros_like(tensors["x"])
    out = on_harness(replace(call, tensors=tensors)).run()
    result = next(value for value in out.values() if value.shape == BLOCKS["tiles"].out)
    assert torch.equal(result, tensors["c_beta"].relu().view(1, -1, 1, 1, 1).expand_as(result))


@blocks
def test_each_gradient_by_itself(host: Harness, name: str) -> None:
    shape = BLOCKS[name]
    call = on_harness(random_call(shape, torch.bfloat16))
    every = call.run()
    wanted = [("x",), ("x", "c_gamma"), ("c_weight", "c_beta")]
    wanted += [(f"{layer}_{parameter}",) for layer in shape.layers for parameter in PARAMETERS]
    if shape.shortcut:
        wanted += [("c_weight", "shortcut_weight"), ("c_beta", "shortcut_beta"), ("c_gamma", "shortcut_gamma")]
    for names in wanted:
        for result, value in replace(call, differentiable=names).run().items():
            torch.testing.assert_close(value, every[result], msg=lambda message, n=result: f"{n}: {message}")


@pytest.mark.parametrize("name", ["narrow", "tiles", "general"])
def test_nan_of_a_gradient(name: str) -> None:
    """It spoils what BatchNorm's backward spoils with it."""
    call = random_call(BLOCKS[name], torch.float32)
    call.grad[0, 3, 0, 0, 0] = float("nan")
    ours, stock = on_harness(call).run(), call.run_stock()
    for result, value in ours.items():
        assert torch.equal(value.isnan(), stock[result].isnan()), result


@blocks
def test_results_do_not_depend_on_the_schedule(host: Harness, name: str) -> None:
    call = random_call(BLOCKS[name], torch.bfloat16)

    def run(schedule: str) -> list[Tensor]:
        host.set_schedule(schedule)
        return list(call.run(on_host(host, False)).values())

    assert_same_under_all(run)


def test_every_barrier_is_needed(host: Harness) -> None:
    """Of the general sums; those of the others are barriers of the forward."""
    call = random_call(BLOCKS["general"], torch.float64)

    def run(schedule: str) -> list[Tensor]:
        host.set_schedule(schedule)
        return list(call.run(on_host(host, False)).values())

    expected: list[Tensor] = []
    sites = host.barriers(lambda: expected.extend(run("random")))
    assert_all_needed(host, (site for site in sites if site.startswith("forward.cuh")), run, expected)
