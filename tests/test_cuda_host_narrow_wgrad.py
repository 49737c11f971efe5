"""wgrad of the narrow layers, and the gradient formed as it is read (csrc/cuda/narrow_wgrad.cuh), on the host as in
test_cuda_host.py. test_cuda_host_narrow.py has the layers of the network."""

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

BY_OTHERS = {"tile_wgrad_kernel", "wgrad_kernel"}
CASES = (
    Case(2, 8, 8, 5, 3, 53, 3, padding=1),  # two tiles of positions, in one of which clips meet; three blocks
    Case(1, 128, 32, 9, 5, 8, 3, padding=1),  # a block whose steps pass from one tile to the next
    Case(5, 64, 32, 1, 3, 7, 3, padding=1),  # every step has a window of its own
    Case(3, 32, 32, 2, 5, 7, 5, padding=2),  # five taps, two frames
    Case(1, 128, 64, 3, 3, 3, 3, padding=1),  # two slices of the channels
    Case(1, 16, 24, 9, 3, 7, 2, stride=3),  # frames that no window holds; octets in odd numbers
    Case(1, 40, 16, 4, 2, 11, 3, padding=3),  # frames that see nothing but padding
    Case(1, 32, 64, 16, 3, 3, 7, stride=4, padding=3),
)
# In exact float32 a warp holds the sums of half as many channels: four slices of 64 behind so many of x.
EXACT = tuple(case for case in CASES if case.k < 64)


def run(host: Harness, inputs: Inputs, case: Case, bn: bool, tf32: bool = False) -> dict[str, torch.Tensor]:
    """All gradients, that of the weight by the narrow kernel, without a pass that forms the gradient before."""
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, bn, tf32)))
    assert "narrow_wgrad_kernel" in kernels
    assert not kernels & (BY_OTHERS | {"output_gradient"})
    return got


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in (torch.float16, torch.bfloat16)]
    + [(case, torch.float32) for case in EXACT],
    ids=str,
)
def test_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    inputs = random_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    assert_as_exact_as_pytorch(run(host, inputs, case, bn), inputs, case, dtype, bn)


@pytest.mark.parametrize(
    ("case", "dtype", "tf32"),
    [(case, dtype, True) for case in CASES for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    + [(case, torch.float32, False) for case in EXACT],
    ids=str,
)
def test_small_integers_are_exact(host: Harness, case: Case, dtype: torch.dtype, tf32: bool) -> None:
    """Also in TF32, which holds them."""
    inputs = integer_inputs(case, dtype)
    got = run(host, inputs, case, False, tf32)
    for name, value in stock(inputs, case, torch.float64, False, got["y"]).items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_tf32_rounds_its_operands_and_nothing_else(host: Harness, case: Case) -> None:
    inputs = random_inputs(case, torch.float32, False, seed=3)
    rounded = dataclasses.replace(inputs, x=to_tf32(inputs.x), weight=to_tf32(inputs.weight), grad=to_tf32(inputs.grad))
    rounded.x, rounded.grad = rows(rounded.x), rows(rounded.grad)
    assert_as_exact_as_pytorch(run(host, inputs, case, False, tf32=True), rounded, case, torch.float32, False)


def backward(host: Harness, i: Inputs, case: Case, needs: tuple[bool, ...]) -> tuple[set[str], list[torch.Tensor]]:
    """The kernels and the results of the backward in the BatchNorm form."""
    _, *saved, _ = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, i.relu, False)
    arguments = (i.grad, i.x, i.weight, i.v1, i.v2, i.residual, *saved, *case.window, i.relu, *needs, False)
    results: list[torch.Tensor] = []
    kernels = host.kernels(lambda: results.extend(host.temporal_conv_bn_backward(*arguments)))
    return kernels, results


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_each_gradient_alone_is_the_same(host: Harness, has_residual: bool) -> None:
    """Whoever forms the gradient: wgrad for itself and dgrad, or, for dgrad alone or with a residual that masks but is
    not a gradient's, a pass before them."""
    case = CASES[0]
    i = random_inputs(case, torch.bfloat16, True, seed=5)
    if not has_residual:
        i.residual = None
    _, (dx, dweight, *_) = backward(host, i, case, (True, True, False, False, has_residual))
    for needs in ((True, False), (False, True), (True, True)):
        kernels, results = backward(host, i, case, (*needs, False, False, False))
        assert ("output_gradient" in kernels) == (has_residual or not needs[1])
        for result, right, needed in zip(results, (dx, dweight), needs, strict=False):
            assert torch.equal(result, right) or not needed


def test_nan_passes_the_mask(host: Harness) -> None:
    """As in torch's threshold_backward: where the output is NaN, the gradient is passed."""
    case = Case(1, 8, 8, 2, 3, 3, 1)
    i = random_inputs(case, torch.float16, True, seed=6)
    y = host.temporal_conv(i.x, i.weight, i.v1, i.v2, None, *case.window, True, False)
    y[0, 3, 1, 2, 2] = torch.nan
    needs = (True, True, False, False, False)
    dx, dweight, *_ = host.temporal_conv_backward(i.grad, i.x, i.weight, i.v1, y, *case.window, *needs, False)
    passed = torch.ops.aten.threshold_backward(i.grad, y, 0)
    plain = host.temporal_conv_backward(passed, i.x, i.weight, i.v1, None, *case.window, *needs, False)
    assert torch.equal(dx, plain[0])
    assert torch.equal(dweight, plain[1])


@pytest.mark.parametrize("layout", ["pitched", "time_slice", "batch_slice", "width_slice", "32_bits"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_reads_slices_in_place(host: Harness, bn: bool, layout: str) -> None:
    case = Case(2, 16, 32, 3, 3, 5, 3, padding=1)
    inputs = random_inputs(case, torch.float16, True, seed=4)
    change = {"pitched": pitched, "32_bits": far_apart}.get(layout, lambda t: lay_out(t, layout))
    inputs.residual = None
    got = run(host, dataclasses.replace(inputs, **{n: change(getattr(inputs, n)) for n in ("x", "grad")}), case, bn)
    for name, value in run(host, inputs, case, bn).items():
        if name in ("dx", "dweight"):
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("case", "dtype", "tf32"),
    [
        (CASES[0], torch.float64, False),
        (CASES[4], torch.float32, False),
        (Case(1, 8, 8, 9, 3, 3, 3, padding=2, dilation=2), torch.float16, False),
        (Case(1, 136, 8, 2, 3, 3, 1), torch.float16, False),
        (Case(1, 64, 128, 3, 3, 3, 5, padding=2), torch.float16, False),  # four slices
        (Case(1, 128, 16, 5, 3, 3, 5, padding=2), torch.float16, False),  # more octets than registers
        (Case(1, 12, 8, 5, 3, 3, 3, padding=1), torch.float32, True),
    ],
    ids=str,
)
def test_what_does_not_suit_runs_elsewhere(host: Harness, case: Case, dtype: torch.dtype, tf32: bool) -> None:
    inputs = random_inputs(case, dtype, False, seed=6)
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, False, tf32)))
    assert "narrow_wgrad_kernel" not in kernels
    assert kernels & BY_OTHERS
    if not tf32:
        assert_as_exact_as_pytorch(got, inputs, case, dtype, False)


def under_schedule(host: Harness, schedule: str) -> list[torch.Tensor]:
    host.set_schedule(schedule)
    results = []
    # The last: warps share the positions of a single step, whose frames lie where they leave their sums.
    last = Case(1, 32, 8, 3, 5, 7, 3)
    runs = ((CASES[1], torch.float16, False), (CASES[5], torch.float32, True), (last, torch.bfloat16, False))
    for case, dtype, tf32 in (*runs, (CASES[3], torch.float32, False)):
        results += run(host, random_inputs(case, dtype, True, seed=7), case, True, tf32).values()
    return results


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    assert_same_under_all(partial(under_schedule, host))


def test_a_missing_barrier_or_wait_is_noticed(host: Harness) -> None:
    expected: list[torch.Tensor] = []
    seen = host.barriers(lambda: expected.extend(under_schedule(host, "random")))
    sites = [site for site in seen if site.startswith("narrow_wgrad.cuh")]
    assert len(sites) == 5
    assert_all_needed(host, sites, partial(under_schedule, host), expected)
