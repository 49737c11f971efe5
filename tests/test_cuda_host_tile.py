"""The tiled kernels of the wide layers (csrc/cuda/tile*.cuh), on the host as in test_cuda_host.py."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cuda_host.build import TILE_SIZES, Harness
from cuda_host.cases import (
    Case,
    Inputs,
    assert_as_exact_as_pytorch,
    conv,
    far_apart,
    integer_inputs,
    pitched,
    random_inputs,
    rows,
    run_op,
    stock,
    to_tf32,
)
from cuda_host.schedules import assert_all_needed, assert_same_under_all
from op_testing import Judgement, lay_out

TILED = {"tile_product_kernel", "tile_wgrad_kernel"}
GENERAL = {"forward_kernel", "dgrad_kernel", "wgrad_kernel"}
PLANS = (("wide", 1), ("tall", 1), ("small", 1), ("small", 3))
# Float64 has no tiled kernels.
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
CASES = (
    Case(2, 72, 136, 2, 5, 9, 3, padding=1),  # two tiles of everything, none of them full; clips that share a tile
    Case(1, 64, 72, 9, 3, 3, 7, stride=4, padding=3),  # a lateral connection
    Case(1, 72, 64, 4, 4, 5, 3, padding=2, dilation=2),
    Case(1, 136, 64, 2, 5, 7, 1),  # pointwise
    Case(1, 32, 72, 7, 3, 4, 2, stride=3),  # frames that no window sees
)
SMALL_CASE = Case(1, 136, 64, 2, 5, 7, 3, padding=1)  # more tiles of depth than stages


@pytest.fixture
def tiles(host: Harness) -> Iterator[Harness]:
    yield host
    host.force_plan(None)


def run_tiled(host: Harness, inputs: Inputs, case: Case, bn: bool, tf32: bool = False) -> dict[str, torch.Tensor]:
    """The op by tiled kernels alone."""
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, bn, tf32)))
    assert kernels >= TILED
    assert not kernels & GENERAL
    return got


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_pytorch(tiles: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    tiles.force_plan(*PLANS[(CASES.index(case) + bn + 2 * full) % len(PLANS)])
    inputs = random_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    got = run_tiled(tiles, inputs, case, bn)
    assert_as_exact_as_pytorch(got, inputs, case, dtype, bn)


class ConvInTf32(torch.autograd.Function):
    """A convolution as PyTorch's cuDNN makes it in TF32: the factors of each of its three products are rounded."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, case: Case) -> torch.Tensor:
        ctx.save_for_backward(to_tf32(x), to_tf32(weight))
        ctx.case = case
        return conv(to_tf32(x), to_tf32(weight), case)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = conv(*leaves, ctx.case)
        return *torch.autograd.grad(out, leaves, to_tf32(grad)), None


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_products_in_tf32(tiles: Harness, case: Case) -> None:
    """Nothing but the products' factors is rounded: the judge is given factors that are rounded already."""
    tiles.force_plan(*PLANS[CASES.index(case)])
    inputs = random_inputs(case, torch.float32, False, seed=3)
    rounded = dataclasses.replace(inputs, x=to_tf32(inputs.x), weight=to_tf32(inputs.weight), grad=to_tf32(inputs.grad))
    rounded.x, rounded.grad = rows(rounded.x), rows(rounded.grad)
    got = run_tiled(tiles, inputs, case, False, tf32=True)
    assert_as_exact_as_pytorch(got, rounded, case, torch.float32, False)


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_tf32_is_as_exact_as_pytorch(tiles: Harness, bn: bool) -> None:
    case = CASES[1]
    tiles.force_plan("wide")
    inputs = random_inputs(case, torch.float32, True, seed=5)
    got = run_tiled(tiles, inputs, case, bn, tf32=True)
    own = stock(inputs, case, torch.float32, bn, got["y"], convolve=ConvInTf32.apply)
    for name, value in stock(inputs, case, torch.float64, bn, got["y"]).items():
        judgement = Judgement()
        judgement.add(got[name], own[name], value)
        assert judgement.ours <= judgement.allowed, f"{name}: {judgement}"


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "tf32"])
def test_small_integers_are_exact(tiles: Harness, tf32: bool, plan: tuple[str, int]) -> None:
    case, dtype = CASES[0], torch.float32
    tiles.force_plan(*plan)
    inputs = integer_inputs(case, dtype)
    got = run_tiled(tiles, inputs, case, False, tf32)
    for name, value in stock(inputs, case, torch.float64, False, got["y"]).items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name


@pytest.mark.parametrize("size", TILE_SIZES)
def test_sizes_agree_to_the_bit(tiles: Harness, size: str) -> None:
    """A sum is taken in the order of its terms, whatever tile it is in."""
    inputs = random_inputs(CASES[1], torch.bfloat16, True, seed=6)
    tiles.force_plan("small")
    expected = run_tiled(tiles, inputs, CASES[1], False)
    tiles.force_plan(size)
    for name, value in run_tiled(tiles, inputs, CASES[1], False).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["pitched", "time_slice", "batch_slice", "width_slice", "32_bits"])
def test_reads_slices_in_place(tiles: Harness, layout: str) -> None:
    case = Case(2, 32, 136, 3, 3, 4, 3, padding=1)
    inputs = random_inputs(case, torch.float16, True, seed=4)
    change = {"pitched": pitched, "32_bits": far_apart}.get(layout, lambda t: lay_out(t, layout))
    parts = {name: change(getattr(inputs, name)) for name in ("x", "residual", "grad")}
    got = run_tiled(tiles, dataclasses.replace(inputs, **parts), case, True)
    assert torch.equal(got["y"], run_tiled(tiles, inputs, case, True)["y"])
    assert_as_exact_as_pytorch(got, inputs, case, torch.float16, True)


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_lateral_concat(tiles: Harness, bn: bool) -> None:
    case = Case(1, 32, 72, 8, 3, 3, 5, stride=4, padding=2)
    dtype = torch.bfloat16
    i = random_inputs(case, dtype, True, seed=9)
    i.residual = None
    slow = rows(torch.randn(case.n, 16, case.t_out, case.h, case.w).to(dtype))
    if bn:
        out, raw, mean, invstd, _ = tiles.lateral_concat_bn(slow, i.x, i.weight, i.v1, i.v2, 4, 2, 1e-5, True, False)
    else:
        out = tiles.lateral_concat(slow, i.x, i.weight, i.v1, i.v2, 4, 2, True, False)
    assert torch.equal(out[:, :16], slow)
    lateral, grad = out[:, 16:], pitched(i.grad)
    if bn:
        arguments = (grad, i.x, i.weight, i.v1, i.v2, None, raw, mean, invstd, *case.window, True)
        grads = tiles.temporal_conv_bn_backward(*arguments, True, True, True, True, False, False)
    else:
        arguments = (grad, i.x, i.weight, i.v1, lateral, *case.window)
        grads = tiles.temporal_conv_backward(*arguments, True, True, True, True, False, False)
    got = dict(zip(("y", "dx", "dweight", "dv1", "dv2"), (lateral, *grads[:4]), strict=True))
    assert_as_exact_as_pytorch(got, i, case, dtype, bn)


def test_statistics_of_a_mean_that_dwarfs_the_deviation(tiles: Harness) -> None:
    ratio = 1000
    x = rows(torch.randn(1, 4, 2, 13, 11) + ratio)
    weight = torch.eye(4).view(4, 4, 1, 1, 1)
    _, raw, mean, invstd, unbiased_var = tiles.temporal_conv_bn(
        x, weight, None, None, None, 1, 0, 1, 1e-5, False, False
    )
    assert torch.equal(raw, x)
    limit = 4 * torch.finfo(torch.float32).eps * ratio
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=0, atol=limit)
    torch.testing.assert_close(unbiased_var.double(), exact.var(1), rtol=limit, atol=0)
    torch.testing.assert_close(invstd.double(), (exact.var(1, correction=0) + 1e-5) ** -0.5, rtol=limit, atol=0)


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        (Case(1, 12, 64, 2, 2, 2, 1), torch.float16, GENERAL),
        (Case(1, 16, 64, 2, 2, 2, 1), torch.float64, GENERAL),
        (
            Case(1, 16, 64, 5, 2, 2, 2, stride=2, dilation=2),
            torch.float16,
            {"tile_product_kernel", "dgrad_kernel", "tile_wgrad_kernel"},
        ),
    ],
    ids=["channels", "float64", "stride and dilation"],
)
def test_the_rest_runs_on_the_general_kernels(
    tiles: Harness, case: Case, dtype: torch.dtype, expected: set[str]
) -> None:
    inputs = random_inputs(case, dtype, True, seed=2)
    got: dict[str, torch.Tensor] = {}
    kernels = tiles.kernels(lambda: got.update(run_op(tiles, inputs, case, False)))
    assert kernels & (TILED | GENERAL) == expected
    assert_as_exact_as_pytorch(got, inputs, case, dtype, False)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            Case(8, 1024, 256, 8, 16, 16, 3, padding=1),
            "forward: 128 x 128 tiles on tensor cores; dgrad: 128 x 128 tiles on tensor cores; "
            "wgrad: 128 x 128 tiles on tensor cores, 5 parts of the rows",
        ),
        (
            Case(1, 2048, 512, 8, 7, 7, 3, padding=1),
            "forward: 64 x 64 tiles on tensor cores, 4 parts of the depth; dgrad: 64 x 64 tiles on tensor cores; "
            "wgrad: 128 x 128 tiles on tensor cores",
        ),
        (
            Case(1, 12, 64, 2, 2, 2, 1),
            "; ".join(
                f"{product}: general kernels: C or K is no multiple of 16 bytes"
                for product in ("forward", "dgrad", "wgrad")
            ),
        ),
    ],
    ids=str,
)
def test_explains(host: Harness, case: Case, said: str) -> None:
    assert host.explain(case.shape, torch.bfloat16) == said


def test_explains_misaligned_tensors(host: Harness) -> None:
    assert "no multiple of 16 bytes" in host.explain(CASES[0].shape, torch.float16, aligned=False)


def everything(host: Harness, schedule: str) -> list[torch.Tensor]:
    """Results of every tiled kernel, at sizes that take the loop of the pipeline several times around."""
    host.set_schedule(schedule)
    results: list[torch.Tensor] = []
    for dtype, parts, bn in ((torch.float16, 1, True), (torch.float32, 2, True)):
        host.force_plan("small", parts)
        results += run_tiled(host, random_inputs(SMALL_CASE, dtype, True, seed=7), SMALL_CASE, bn).values()
    return results


def test_results_do_not_depend_on_the_schedule(tiles: Harness) -> None:
    assert_same_under_all(partial(everything, tiles))


def test_a_missing_barrier_or_wait_is_noticed(tiles: Harness) -> None:
    expected: list[torch.Tensor] = []
    sites = tiles.barriers(lambda: expected.extend(everything(tiles, "random")))
    sites = {site for site in sites if site.startswith("tile")}
    assert {site.split(":")[0] for site in sites} == {"tile.cuh", "tile_kernels.cuh", "tile_epilogue.cuh"}
    assert_all_needed(tiles, sites, partial(everything, tiles), expected)
