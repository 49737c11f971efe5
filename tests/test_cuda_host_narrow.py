"""The narrow convolutions (csrc/cuda/narrow.cuh), on the host as in test_cuda_host.py."""

import dataclasses
from functools import partial

import pytest
import torch
from cuda_host.build import Harness
from cuda_host.cases import (
    Case,
    Inputs,
    assert_as_exact_as_pytorch,
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
from op_testing import lay_out

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
narrow_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# The layers of the fast pathway and the lateral ones: channels, taps, strides and paddings as they are; few positions,
# in numbers that no warp's rows divide; clips that are cut into items, end amid one, or are shorter than the kernel.
TEMPORAL = (
    Case(2, 8, 8, 9, 5, 7, 3, padding=1),
    Case(1, 16, 8, 5, 3, 7, 3, padding=1),
    Case(1, 32, 8, 6, 3, 7, 3, padding=1),
    Case(2, 32, 16, 2, 3, 3, 3, padding=1),
    Case(1, 64, 16, 6, 3, 7, 3, padding=1),
    Case(1, 64, 32, 3, 5, 5, 3, padding=1),
    Case(3, 128, 32, 5, 3, 3, 3, padding=1),
    Case(1, 16, 32, 4, 3, 3, 3),
)
LATERAL = (
    Case(1, 8, 16, 16, 5, 7, 5, stride=4, padding=2),
    Case(2, 8, 16, 17, 3, 3, 7, stride=8, padding=3),
    Case(1, 16, 32, 9, 3, 3, 7, stride=4, padding=3),
    Case(1, 32, 64, 16, 3, 3, 5, stride=4, padding=2),
    Case(1, 32, 64, 2, 3, 3, 7, stride=4, padding=3),
    WIDEST := Case(1, 64, 128, 16, 3, 3, 5, stride=8, padding=2),  # but for wgrad, which takes tiles
)
POINTWISE = (
    Case(1, 8, 32, 3, 5, 5, 1),
    Case(2, 16, 64, 2, 3, 3, 1),
    Case(1, 32, 128, 2, 3, 5, 1),
    Case(2, 64, 64, 1, 3, 5, 1),
)
CASES = TEMPORAL + LATERAL + POINTWISE
# Frames that no window sees, at the end and between windows; a window wider than the padded clip's rest.
DGRADS = (
    Case(1, 32, 32, 11, 3, 3, 3, stride=4),
    Case(1, 16, 8, 8, 3, 3, 5, stride=3, padding=4),
)
OTHER_DGRADS = {"dgrad_kernel", "tile_product_kernel"}
OTHER_WGRADS = {"wgrad_kernel", "tile_wgrad_kernel", "output_gradient"}


def forward(host: Harness, i: Inputs, case: Case, bn: bool, tf32: bool = True) -> dict[str, torch.Tensor]:
    """By the narrow kernel."""
    results: list[torch.Tensor] = []
    if bn:
        arguments = (i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, i.relu, tf32)
        kernels = host.kernels(lambda: results.extend(host.temporal_conv_bn(*arguments)))
    else:
        arguments = (i.x, i.weight, i.v1, i.v2, i.residual, *case.window, i.relu, tf32)
        kernels = host.kernels(lambda: results.append(host.temporal_conv(*arguments)))
    assert "narrow_kernel" in kernels
    return dict(zip(("y", "raw", "mean", "invstd", "unbiased_var"), results, strict=False))


def narrow_inputs(case: Case, dtype: torch.dtype, full: bool, seed: int) -> Inputs:
    """In float32 with factors that TF32 holds, so that rounding them changes nothing and the judge is float32."""
    inputs = random_inputs(case, dtype, full, seed)
    if dtype == torch.float32:
        inputs.x, inputs.weight = rows(to_tf32(inputs.x)), to_tf32(inputs.weight)
    return inputs


def suits(case: Case, dtype: torch.dtype) -> bool:
    """In float32, 5 taps of 64 -> 128 channels are more than a block should gather."""
    return dtype != torch.float32 or case.c * case.k * case.kt <= 64 * 64 * 3


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case in CASES for dtype in DTYPES if suits(case, dtype)], ids=str
)
def test_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    inputs = narrow_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    got = forward(host, inputs, case, bn)
    assert got["y"].is_contiguous(memory_format=torch.channels_last_3d)
    assert_as_exact_as_pytorch({"y": got["y"]}, inputs, case, dtype, bn)
    if bn:
        raw = got["raw"].double().transpose(0, 1).flatten(1)
        biased, eps = raw.var(1, correction=0), 16 * torch.finfo(torch.float32).eps
        assert torch.allclose(got["mean"].double(), raw.mean(1), rtol=0, atol=eps * raw.abs().max())
        assert torch.allclose(got["invstd"].double(), (biased + 1e-5).rsqrt(), rtol=eps, atol=0)
        assert torch.allclose(got["unbiased_var"].double(), raw.var(1), rtol=eps, atol=0)


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *DGRADS], ids=str)
def test_dgrad_is_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    inputs = random_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, bn)))
    assert "narrow_kernel" in kernels
    assert not kernels & OTHER_DGRADS
    assert case == WIDEST or not kernels & OTHER_WGRADS
    assert got["dx"].is_contiguous(memory_format=torch.channels_last_3d)
    assert_as_exact_as_pytorch(got, inputs, case, dtype, bn)


@pytest.mark.parametrize("case", [*TEMPORAL[:5], LATERAL[0], *DGRADS], ids=str)
def test_dgrad_in_tf32(host: Harness, case: Case) -> None:
    inputs = narrow_inputs(case, torch.float32, False, seed=10)
    inputs.grad = rows(to_tf32(inputs.grad))
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, False, tf32=True)))
    assert "narrow_kernel" in kernels
    assert not kernels & OTHER_DGRADS
    assert_as_exact_as_pytorch(got, inputs, case, torch.float32, False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_about_a_large_mean(host: Harness, dtype: torch.dtype) -> None:
    """See test_batch_statistics in test_cuda_host.py. Several items for every warp."""
    ratio, c = 1000, 8
    x = rows((torch.randn(1, c, 3, 131, 67) + ratio).to(dtype))
    weight = torch.eye(c).to(dtype).view(c, c, 1, 1, 1).expand(c, c, 3, 1, 1) * torch.tensor([0, 1, 0]).view(
        1, 1, 3, 1, 1
    )
    case = Case(1, c, c, 3, 131, 67, 3, padding=1)
    inputs = Inputs(x, weight.to(dtype).contiguous(), None, None, None, x, relu=False)
    got = forward(host, inputs, case, bn=True)
    assert torch.equal(got["raw"], x)
    exact = x.double().transpose(0, 1).flatten(1)
    limit = 4 * torch.finfo(torch.float32).eps * ratio
    assert torch.allclose(got["mean"].double(), exact.mean(1), rtol=0, atol=limit)
    assert torch.allclose(got["unbiased_var"].double(), exact.var(1), rtol=limit, atol=0)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case in CASES for dtype in DTYPES if suits(case, dtype)], ids=str
)
def test_small_integers_are_exact(host: Harness, case: Case, dtype: torch.dtype) -> None:
    inputs = integer_inputs(case, dtype)
    got = forward(host, inputs, case, bn=False)
    assert torch.equal(got["y"], stock(inputs, case, torch.float64, False, got["y"])["y"].to(dtype))


@pytest.mark.parametrize("case", [TEMPORAL[0], LATERAL[3]], ids=str)
def test_tf32_rounds_its_operands(host: Harness, case: Case) -> None:
    inputs = random_inputs(case, torch.float32, True, seed=9)
    rounded = dataclasses.replace(inputs, x=rows(to_tf32(inputs.x)), weight=to_tf32(inputs.weight))
    assert torch.equal(forward(host, inputs, case, bn=False)["y"], forward(host, rounded, case, bn=False)["y"])


@pytest.mark.parametrize("layout", ["pitched", "time_slice", "batch_slice", "width_slice", "32_bits"])
@pytest.mark.parametrize("case", [TEMPORAL[0], dataclasses.replace(LATERAL[3], n=2)], ids=str)
def test_reads_slices_in_place(host: Harness, case: Case, layout: str) -> None:
    inputs = random_inputs(case, torch.bfloat16, True, seed=4)
    change = {"pitched": pitched, "32_bits": far_apart}.get(layout, lambda t: lay_out(t, layout))
    parts = {name: change(getattr(inputs, name)) for name in ("x", "residual")}
    expected = forward(host, inputs, case, bn=False)["y"]
    assert torch.equal(forward(host, dataclasses.replace(inputs, **parts), case, bn=False)["y"], expected)


@narrow_dtypes
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_writes_a_channel_slice(host: Harness, dtype: torch.dtype, bn: bool) -> None:
    case = LATERAL[0]
    i = narrow_inputs(case, dtype, True, seed=5)
    slow = rows(torch.randn(case.n, 24, case.t_out, case.h, case.w).to(dtype))
    i.residual = None
    results: list[torch.Tensor] = []
    if bn:
        arguments = (slow, i.x, i.weight, i.v1, i.v2, case.stride, case.padding, 1e-5, True, True)
        kernels = host.kernels(lambda: results.extend(host.lateral_concat_bn(*arguments)))
    else:
        arguments = (slow, i.x, i.weight, i.v1, i.v2, case.stride, case.padding, True, True)
        kernels = host.kernels(lambda: results.append(host.lateral_concat(*arguments)))
    assert "narrow_kernel" in kernels
    assert torch.equal(results[0][:, :24], slow)
    assert_as_exact_as_pytorch({"y": results[0][:, 24:]}, i, case, dtype, bn)


@pytest.mark.parametrize(
    ("case", "dtype", "tf32"),
    [
        (TEMPORAL[0], torch.float64, True),
        (TEMPORAL[0], torch.float32, False),
        (Case(1, 8, 8, 9, 3, 3, 3, padding=2, dilation=2), torch.float16, False),
        (Case(1, 8, 8, 5, 3, 3, 5, padding=2), torch.float16, False),  # five outputs share a frame
        (Case(1, 12, 8, 5, 3, 3, 3, padding=1), torch.float16, False),
        (Case(1, 8, 12, 5, 3, 3, 3, padding=1), torch.float16, False),
        (Case(1, 136, 8, 2, 3, 3, 3, padding=1), torch.float16, False),
    ],
    ids=str,
)
def test_what_does_not_suit_runs_elsewhere(host: Harness, case: Case, dtype: torch.dtype, tf32: bool) -> None:
    i = random_inputs(case, dtype, True, seed=6)
    results: list[torch.Tensor] = []
    arguments = (i.x, i.weight, i.v1, i.v2, i.residual, *case.window, i.relu, tf32)
    kernels = host.kernels(lambda: results.append(host.temporal_conv(*arguments)))
    assert "narrow_kernel" not in kernels
    assert_as_exact_as_pytorch({"y": results[0]}, i, case, dtype, False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_explains(host: Harness, case: Case) -> None:
    said = host.explain(case.shape, torch.float16)
    assert said.startswith("forward: narrow kernels; dgrad: narrow kernels; wgrad: ")
    assert said.endswith("wgrad: narrow kernels") == (case != WIDEST)
    exact = host.explain(case.shape, torch.float32).split("; ")
    assert "narrow" not in "".join(exact[:2])
    four_slices = (WIDEST, LATERAL[4])  # of the sums that a warp on FMA holds
    assert (exact[2] == "wgrad: narrow kernels") == (case not in four_slices)


def under_schedule(host: Harness, schedule: str) -> list[torch.Tensor]:
    host.set_schedule(schedule)
    results = []
    for case, dtype in ((TEMPORAL[0], torch.float16), (LATERAL[3], torch.bfloat16), (TEMPORAL[3], torch.float32)):
        results += forward(host, random_inputs(case, dtype, True, seed=7), case, bn=True).values()
    return results


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    assert_same_under_all(partial(under_schedule, host))


def test_a_missing_barrier_is_noticed(host: Harness) -> None:
    expected: list[torch.Tensor] = []
    seen = host.barriers(lambda: expected.extend(under_schedule(host, "random")))
    sites = [site for site in seen if site.startswith(("narrow.cuh", "narrow_weight.cuh"))]
    assert len(sites) == 4
    assert_all_needed(host, sites, partial(under_schedule, host), expected)
