"""What a block in training asks of the CUDA kernels (csrc/bottleneck_bn.h), on the host as in test_cuda_host.py: a sum
in dgrad's epilogue, the gradient of a convolution's output in memory that is read for it, and the block itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from block_testing import Shape, random_call
from cuda_host.block import HostCall, on_host
from cuda_host.build import SCHEDULES, Harness
from cuda_host.cases import (
    Case,
    Inputs,
    conv,
    integer_inputs,
    pitched,
    random_inputs,
    rows,
    stock,
)
from cuda_host.schedules import assert_same_under_all
from op_arguments import small_integers
from op_testing import Judgement, assert_as_exact_as_pytorch, dtypes
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW, TILED, GENERAL = "narrow_kernel", "tile_product_kernel", "dgrad_kernel"
FAMILIES = {NARROW, TILED, GENERAL}
# Of each case: the kernel of its dgrad in 16 bits, and the plan that tiles are forced to. float32 has narrow kernels
# only in TF32, float64 the general ones.
LAYERS = {
    Case(2, 8, 8, 5, 3, 7, 3, padding=1): (NARROW, None),
    Case(1, 32, 64, 9, 3, 3, 7, stride=4, padding=3): (NARROW, None),
    Case(1, 32, 32, 11, 3, 3, 3, stride=4): (NARROW, None),  # frames that no window sees
    Case(2, 72, 136, 2, 5, 9, 3, padding=1): (TILED, ("wide", 1)),
    Case(1, 136, 64, 2, 5, 7, 3, padding=1): (TILED, ("small", 3)),
    Case(1, 32, 72, 7, 3, 4, 2, stride=3): (TILED, ("tall", 1)),  # with the wgrad of narrow layers
    Case(1, 16, 16, 9, 2, 3, 3, stride=2, padding=2, dilation=2): (GENERAL, None),
    Case(2, 3, 65, 9, 1, 3, 5, stride=2, padding=4, dilation=3): (GENERAL, None),
}
layers = pytest.mark.parametrize("case", LAYERS, ids=str)


@pytest.fixture(autouse=True)
def tiles(host: Harness) -> Iterator[None]:
    yield
    host.force_plan(None)


def planned(host: Harness, case: Case) -> None:
    plan = LAYERS[case][1]
    host.force_plan(*plan) if plan else host.force_plan(None)


def family(case: Case, dtype: torch.dtype, tf32: bool = False) -> str:
    named = LAYERS[case][0]
    if dtype == torch.float64:
        return GENERAL
    return TILED if named == NARROW and dtype == torch.float32 and not tf32 else named


def empty_like_x(case: Case, dtype: torch.dtype) -> Tensor:
    return rows(torch.full((case.n, case.c, case.t, case.h, case.w), torch.nan, dtype=dtype))


@dtypes
@layers
def test_dgrad_adds(host: Harness, case: Case, dtype: torch.dtype) -> None:
    """Small integers, whose sums are exact: to another tensor, in place, and to a channel slice."""
    planned(host, case)
    i = integer_inputs(case, dtype)
    added = rows(small_integers(*i.x.shape, dtype=dtype))
    inputs = replace(i, v1=None, v2=None, residual=None, relu=False)
    expected = (stock(inputs, case, torch.float64, False, i.grad)["dx"] + added).to(dtype)
    for place in ("apart", "in place", "pitched"):
        residual = {"apart": rows, "in place": torch.clone, "pitched": pitched}[place](added)
        dx = residual if place == "in place" else empty_like_x(case, dtype)

        def run(dx: Tensor = dx, residual: Tensor = residual) -> None:
            absent = (None,) * 5
            host.layer_backward(
                i.grad, i.x, i.weight, *absent, dx, residual, None, None, None, None, *case.window, False, True
            )

        assert host.kernels(run) & FAMILIES == {family(case, dtype, tf32=True)}
        assert torch.equal(dx, expected), place


def layer_backward(
    host: Harness, i: Inputs, case: Case, place: str, products: bool = True, sums: bool = True
) -> dict[str, Tensor]:
    """The BatchNorm form, with dconv at ``place`` and, with products, dx in the memory of what is added to it."""
    y, raw, mean, invstd, _ = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, None, *case.window, 1e-5, i.relu, False)
    grad = pitched(i.grad) if place == "pitched grad" else i.grad.clone()
    given = {"grad": grad, "pitched grad": grad, "raw": raw}
    dconv = given.get(place, torch.full_like(i.grad, torch.nan))
    dx = added_to(i) if products else None
    dweight = torch.full_like(i.weight, torch.nan) if products else None
    dv1, dv2 = (torch.full_like(mean, torch.nan) if sums else None for _ in range(2))
    host.layer_backward(
        *(grad, i.x, i.weight, i.v1, i.v2, raw, mean, invstd, dx, dx, dconv, dweight, dv1, dv2),
        *(*case.window, i.relu, False),
    )
    results = {"y": y, "dconv": dconv, "dx": dx, "dweight": dweight, "dv1": dv1, "dv2": dv2}
    return {name: result for name, result in results.items() if result is not None}


def added_to(i: Inputs) -> Tensor:
    """The gradient that x has from elsewhere."""
    return (
        torch.linspace(-3, 3, i.x.numel())
        .to(i.x.dtype)
        .view(i.x.shape)
        .contiguous(memory_format=torch.channels_last_3d)
    )


def stock_layer(i: Inputs, case: Case, dtype: torch.dtype, y: Tensor) -> dict[str, Tensor]:
    """As PyTorch computes it in ``dtype``."""
    outputs: list[Tensor] = []

    def convolve(x: Tensor, weight: Tensor, case: Case) -> Tensor:
        outputs.append(conv(x, weight, case))
        outputs[0].retain_grad()
        return outputs[0]

    results = stock(i, case, dtype, True, y, convolve)
    assert outputs[0].grad is not None
    return results | {"dconv": outputs[0].grad, "dx": results["dx"] + added_to(i).to(dtype)}


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@dtypes
@layers
def test_gradient_of_the_convolution(host: Harness, case: Case, dtype: torch.dtype, relu: bool) -> None:
    """The products read what was left there, wherever it is, and whatever is in that memory before."""
    planned(host, case)
    inputs = replace(random_inputs(case, dtype, True, seed=hash((case, relu)) % 2**31), residual=None, relu=relu)
    got: dict[str, Tensor] = {}
    kernels = host.kernels(lambda: got.update(layer_backward(host, inputs, case, "apart")))
    assert family(case, dtype) in kernels
    own, exact = (stock_layer(inputs, case, precision, got["y"]) for precision in (dtype, torch.float64))
    for name in set(got) - {"y"}:
        judgement = Judgement()
        judgement.add(got[name], own[name], exact[name])
        assert judgement.ours <= judgement.allowed, f"{name}: {judgement}"
    for place in ("grad", "raw", "pitched grad"):
        if place == "pitched grad" and family(case, dtype) != NARROW:
            continue
        for name, result in layer_backward(host, inputs, case, place).items():
            assert torch.equal(result, got[name]), f"{name} with dconv at {place}"


@pytest.mark.parametrize("sums", [False, True], ids=["alone", "with_sums"])
@dtypes
@layers
def test_gradient_without_products(host: Harness, case: Case, dtype: torch.dtype, sums: bool) -> None:
    """As for the spatial convolution, whose products are a library's."""
    inputs = replace(random_inputs(case, dtype, True, seed=hash(case) % 2**31), residual=None)
    got = layer_backward(host, inputs, case, "grad", products=False, sums=sums)
    own, exact = (stock_layer(inputs, case, precision, got["y"]) for precision in (dtype, torch.float64))
    for name in set(got) - {"y"}:
        judgement = Judgement()
        judgement.add(got[name], own[name], exact[name])
        assert judgement.ours <= judgement.allowed, f"{name}: {judgement}"


def test_no_pass_but_one_forms_the_gradient(host: Harness) -> None:
    """A narrow wgrad does on its way; else one row-wise pass, in packs where rows are."""
    for case in LAYERS:
        for dtype in (torch.bfloat16, torch.float32):
            planned(host, case)
            inputs = replace(random_inputs(case, dtype, True, seed=1), residual=None)
            kernels = host.kernels(lambda i=inputs, c=case: layer_backward(host, i, c, "raw"))
            forming = kernels & {"narrow_wgrad_kernel", "output_gradient", "output_gradient_kernel"}
            row_wise = "output_gradient_kernel" if case.k % 8 else "output_gradient"
            narrow = "narrow_wgrad_kernel" in kernels
            assert forming == {"narrow_wgrad_kernel" if narrow else row_wise}, (case, dtype)


@layers
def test_results_do_not_depend_on_the_schedule(host: Harness, case: Case) -> None:
    planned(host, case)
    inputs = replace(random_inputs(case, torch.bfloat16, True, seed=2), residual=None)

    def run(schedule: str) -> list[Tensor]:
        host.set_schedule(schedule)
        return list(layer_backward(host, inputs, case, "raw").values())

    assert_same_under_all(run)


# Odd channels, which the general kernels take; the fast pathway's; tiles; and the geometry of a first block.
BLOCKS = {
    "odd": Shape(n=1, c=43, j=45, k=47, t=2, stride=2, h=6, w=5),
    "odd_identity": Shape(n=1, c=43, j=33, k=43, dilation_a=2, t=3, w=3, shortcut=False),
    "fast_res2_first": Shape(n=1, c=8, j=8, k=32, t=3, h=5, w=7),
    "fast_res3_first": Shape(n=2, c=32, j=16, k=64, t=2, stride=2, h=5, w=6),
    "fast_res4": Shape(n=1, c=128, j=32, k=128, t=2, h=3, w=5, shortcut=False),
    "wide": Shape(c=136, j=72, k=144, t=2, stride_a=2, stride=2, kt=1, h=4, w=6),  # clips of one frame
    "wide_identity": Shape(n=1, c=136, j=64, k=136, t=3, h=3, w=4, shortcut=False),
}
SEVERAL = ("odd", "fast_res3_first", "wide_identity")
CASES = [(name, dtype) for name in BLOCKS for dtype in DTYPES if dtype == torch.float32 or name in SEVERAL]
CASES += [("fast_res2_first", torch.bfloat16), ("fast_res4", torch.float16)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda case: str(case).removeprefix("torch."))
def test_block_is_as_exact_as_pytorch(
    host: Harness, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCall, "host", host, raising=False)
    judged = {"trials": 3, "fewest_values": 256} if dtype == torch.float32 else {}
    assert_as_exact_as_pytorch(lambda: HostCall(**vars(random_call(BLOCKS[name], dtype))), **judged)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SEVERAL)
def test_block_under_schedules(host: Harness, name: str) -> None:
    call = random_call(BLOCKS[name], torch.bfloat16)
    runs = []
    for schedule in SCHEDULES:
        host.set_schedule(schedule)
        runs.append(call.run(on_host(host, False)))
    for run in runs[1:]:
        for result, value in run.items():
            assert torch.equal(value, runs[0][result]), result
