"""The kernels of csrc/cuda, compiled and run by the host compiler (tests/cuda_host), against float64.

This shows that the kernels compute the right thing and keep to their barriers and buffers. It shows nothing about a
GPU: neither its compiler's code generation nor its speed.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_host.build import ROOT, SANITIZED, SCHEDULES, Harness, compiler
from cuda_host.cases import (
    CASES,
    TINY_CASES,
    Case,
    assert_as_exact_as_pytorch,
    conv,
    far_apart,
    integer_inputs,
    random_inputs,
    rows,
    run_op,
    stock,
)
from cuda_host.schedules import assert_same_under_all
from op_arguments import accumulation
from op_testing import Judgement, dtypes, lay_out


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    inputs = random_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    got = run_op(host, inputs, case, bn)
    assert_as_exact_as_pytorch(got, inputs, case, dtype, bn)
    assert got["y"].is_contiguous(memory_format=torch.channels_last_3d)
    assert got["dx"].is_contiguous(memory_format=torch.channels_last_3d)
    if full:
        assert (got["y"] >= 0).all()


@dtypes
@pytest.mark.parametrize("case", CASES[:2] + TINY_CASES, ids=str)
def test_small_integers_are_exact(host: Harness, case: Case, dtype: torch.dtype) -> None:
    inputs = integer_inputs(case, dtype)
    got = run_op(host, inputs, case, bn=False)
    for name, value in stock(inputs, case, torch.float64, False, got["y"]).items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name


@pytest.mark.parametrize("layout", ["channel_slice", "time_slice", "batch_slice", "width_slice"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_reads_slices_in_place(host: Harness, bn: bool, layout: str) -> None:
    case = Case(2, 3, 5, 4, 3, 2, 3, padding=1)
    inputs = random_inputs(case, torch.float32, True, seed=4)
    expected = run_op(host, inputs, case, bn)
    parts = {name: lay_out(getattr(inputs, name), layout) for name in ("x", "residual", "grad")}
    got = run_op(host, dataclasses.replace(inputs, **parts), case, bn)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_offsets_beyond_32_bits(host: Harness, bn: bool) -> None:
    case = Case(2, 3, 5, 3, 2, 2, 3, padding=1)
    inputs = random_inputs(case, torch.float16, True, seed=11)

    expected = run_op(host, inputs, case, bn)
    far = dataclasses.replace(inputs, **{n: far_apart(getattr(inputs, n)) for n in ("x", "residual", "grad")})
    for name, value in run_op(host, far, case, bn).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_more_tiles_than_a_grid_has_blocks(host: Harness, bn: bool, most: int) -> None:
    case = Case(1, 70, 140, 3, 2, 2, 3, padding=1)  # 2 tiles of C, 3 of K and 4 of C in all taps
    inputs = random_inputs(case, torch.float64, True, seed=12)
    expected = run_op(host, inputs, case, bn)
    host.force_grid(most)
    for name, value in run_op(host, inputs, case, bn).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_each_gradient_alone_is_the_same(host: Harness, bn: bool) -> None:
    case = Case(2, 9, 5, 4, 3, 2, 3, stride=2, padding=1)
    i = random_inputs(case, torch.float32, True, seed=5)
    if bn:
        _, *saved, _ = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, True, False)
        arguments = (i.grad, i.x, i.weight, i.v1, i.v2, i.residual, *saved, *case.window, True)
        backward = host.temporal_conv_bn_backward
    else:
        y = host.temporal_conv(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, True, False)
        arguments = (i.grad, i.x, i.weight, i.v1, y, *case.window)
        backward = host.temporal_conv_backward
    together = backward(*arguments, *[True] * 5, False)
    for wanted in range(5):
        needs = [index == wanted for index in range(5)]
        assert torch.equal(backward(*arguments, *needs, False)[wanted], together[wanted]), wanted


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@dtypes
@pytest.mark.parametrize("alpha", [1, 4])
def test_lateral_concat(host: Harness, alpha: int, dtype: torch.dtype, bn: bool) -> None:
    case = Case(2, 6, 64, 3 * alpha, 5, 3, 5, stride=alpha, padding=2)
    i = random_inputs(case, dtype, True, seed=alpha)
    i.residual = None
    slow = rows(
        torch.arange(case.n * 7 * case.t_out * case.h * case.w)
        .remainder(251)
        .view(case.n, 7, case.t_out, case.h, case.w)
        .to(dtype)
    )
    if bn:
        out, raw, mean, invstd, _ = host.lateral_concat_bn(slow, i.x, i.weight, i.v1, i.v2, alpha, 2, 1e-5, True, False)
    else:
        out = host.lateral_concat(slow, i.x, i.weight, i.v1, i.v2, alpha, 2, True, False)
    assert torch.equal(out[:, :7], slow)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    lateral, grad = out[:, 7:], lay_out(i.grad, "channel_slice")
    if bn:
        arguments = (grad, i.x, i.weight, i.v1, i.v2, None, raw, mean, invstd, *case.window, True)
        grads = host.temporal_conv_bn_backward(*arguments, True, True, True, True, False, False)
    else:
        arguments = (grad, i.x, i.weight, i.v1, lateral, *case.window)
        grads = host.temporal_conv_backward(*arguments, True, True, True, True, False, False)
    got = dict(zip(("y", "dx", "dweight", "dv1", "dv2"), (lateral, *grads[:4]), strict=True))
    assert_as_exact_as_pytorch(got, i, case, dtype, bn)


@dtypes
def test_frozen_statistics(host: Harness, dtype: torch.dtype) -> None:
    """The fold, judged through the op; k is no multiple of a block."""
    case = Case(1, 3, 300, 2, 1, 2, 3, padding=1)
    i = random_inputs(case, dtype, True, seed=12)
    mean, var = torch.randn(case.k).to(i.v1.dtype), torch.rand(case.k).to(i.v1.dtype) + 0.1
    slow = rows(torch.randn(case.n, 4, case.t_out, case.h, case.w).to(dtype))

    def exact(precision: torch.dtype) -> torch.Tensor:
        x, weight, gamma, beta, average, variance, residual = (
            t.to(precision) for t in (i.x, i.weight, i.v1, i.v2, mean, var, i.residual)
        )
        return (F.batch_norm(conv(x, weight, case), average, variance, gamma, beta) + residual).relu()

    frozen = (i.v1, i.v2, mean, var)
    y = host.temporal_conv_bn_frozen(i.x, i.weight, *frozen, i.residual, *case.window, 1e-5, True, False)
    judgement = Judgement()
    judgement.add(y, exact(dtype), exact(torch.float64))
    assert judgement.ours <= judgement.allowed, str(judgement)
    bare = host.temporal_conv_bn_frozen(i.x, i.weight, *frozen, None, *case.window, 1e-5, False, False)
    out = host.lateral_concat_bn_frozen(slow, i.x, i.weight, *frozen, 1, 1, 1e-5, False, False)
    assert torch.equal(out, torch.cat([slow, bare], 1))


@dtypes
def test_batch_statistics(host: Harness, dtype: torch.dtype) -> None:
    """Blocks of several tiles each, and a mean that dwarfs the deviation. The judge is raw as stored, summed exactly.

    Chan, Golub and LeVeque (1983) bound the relative error of such a variance by a few eps times mean / deviation;
    E[x^2] - E[x]^2 has the square of that ratio, which float32 does not survive at 1000.
    """
    ratio = 1000
    generator = torch.Generator().manual_seed(10)
    x = rows((torch.randn(1, 2, 1, 261, 256, generator=generator) + ratio).to(dtype))
    weight = torch.eye(2).to(dtype).view(2, 2, 1, 1, 1)
    _, raw, mean, invstd, unbiased_var = host.temporal_conv_bn(x, weight, None, None, None, 1, 0, 1, 1e-5, False, False)
    assert torch.equal(raw, x)
    limit = 4 * torch.finfo(accumulation(dtype)).eps * ratio
    for k in range(2):
        values = x[:, k].flatten().tolist()
        exact_mean = math.fsum(values) / len(values)
        square = math.fsum((value - exact_mean) ** 2 for value in values)
        assert mean[k].item() == pytest.approx(exact_mean, abs=limit)
        assert invstd[k].item() == pytest.approx((square / len(values) + 1e-5) ** -0.5, rel=limit)
        assert unbiased_var[k].item() == pytest.approx(square / (len(values) - 1), rel=limit)


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2), (2, 3, 4, 0, 2)], ids=str)
def test_without_rows(host: Harness, shape: tuple[int, ...], bn: bool) -> None:
    n, c, t, h, w = shape
    case = Case(n, c, 5, t, h, w, 3, padding=1)
    got = run_op(host, random_inputs(case, torch.float32, True, seed=0), case, bn)
    assert got["y"].shape == (n, 5, t, h, w)
    assert got["dx"].shape == shape
    assert got["dresidual"].shape == got["y"].shape
    for name in ("dweight", "dv1", "dv2", *(("mean", "unbiased_var") if bn else ())):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_nan_passes_the_relu(host: Harness) -> None:
    case = Case(1, 2, 2, 3, 2, 2, 1)
    inputs = random_inputs(case, torch.float32, True, seed=6)
    inputs.x[0, 0, 1, 1, 1] = float("nan")
    y = host.temporal_conv(inputs.x, inputs.weight, None, None, None, 1, 0, 1, True, False)
    assert y[0, :, 1, 1, 1].isnan().all()
    assert y.isnan().sum() == 2
    needs = (False, False, False, False, True)
    grads = host.temporal_conv_backward(inputs.grad, inputs.x, inputs.weight, None, y, 1, 0, 1, *needs, False)
    assert torch.equal(grads[4], torch.ops.aten.threshold_backward(inputs.grad, y, 0))
    assert host.temporal_conv_bn(inputs.x, inputs.weight, None, None, None, 1, 0, 1, 1e-5, True, False)[0].isnan().all()


@dtypes
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch_dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics(
    host: Harness, batch_dtype: torch.dtype, momentum: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(9)
    mean, var = torch.rand(2, 300, dtype=batch_dtype, generator=generator)
    running_mean, running_var = torch.rand(2, 300, generator=generator).to(dtype)
    tracked = torch.tensor(2)
    factor = 1 / 3 if momentum is None else momentum
    exact = [(1 - factor) * a.double() + factor * b.double() for a, b in ((running_mean, mean), (running_var, var))]
    host.update_running_stats(running_mean, running_var, tracked, mean, var, momentum)
    assert tracked == 3
    for running, value in zip((running_mean, running_var), exact, strict=True):
        assert torch.equal(running, value.to(accumulation(dtype)).to(dtype))
    host.update_running_stats(None, None, tracked, mean, var, momentum)
    assert tracked == 4


def everything(host: Harness) -> list[torch.Tensor]:
    """Results of every kernel, at sizes that take each loop around a barrier at least twice."""
    case = Case(1, 9, 20, 8, 3, 3, 3, padding=1)
    results = []
    for bn in (False, True):
        results += run_op(host, random_inputs(case, torch.float32, True, seed=7), case, bn).values()
    i = random_inputs(case, torch.float32, True, seed=8)
    results.append(host.lateral_concat(i.grad, i.x, i.weight, i.v1, i.v2, 1, 1, True, False))
    running = torch.ones(case.k)
    host.update_running_stats(running, None, torch.tensor(0), i.v1, i.v2, None)
    return [*results, running]


def everything_under(host: Harness, schedule: str) -> list[torch.Tensor]:
    host.set_schedule(schedule)
    return everything(host)


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    assert_same_under_all(partial(everything_under, host))


def test_a_missing_barrier_is_noticed(host: Harness) -> None:
    """For each barrier of the kernels; so each of them is also needed."""
    expected: list[torch.Tensor] = []
    sites = host.barriers(lambda: expected.extend(everything(host)))
    assert {site.split(":")[0] for site in sites} >= {"product.cuh", "forward.cuh", "moments.cuh"}
    for site in sites:
        host.skip_barrier(site)
        assert any(
            not torch.equal(value, right)
            for schedule in SCHEDULES
            for value, right in zip(everything_under(host, schedule), expected, strict=True)
        ), f"nothing changes without the barrier at {site}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", ["product of half", "product of bfloat16", "product of tf32", "copies", "shuffles"])
def test_instructions_of_the_harness(host: Harness, kernel: str, schedule: str) -> None:
    host.set_schedule(schedule)
    assert host.attempt(kernel) == ""


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("divergent barrier", "have diverged"),
        ("divergent warp", "have diverged"),
        ("absent lane", "have diverged"),
        ("misaligned ldmatrix", "no multiple of 16"),
        ("ldmatrix of global memory", "outside of shared memory"),
        ("copies without commit", "wrong value"),
        ("copies without wait", "ended with copies"),
    ],
)
def test_a_mistake_is_an_error(host: Harness, kernel: str, error: str) -> None:
    host.set_schedule("descending")
    assert error in host.attempt(kernel)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitised run")
def test_under_sanitizers(session_harness: Harness) -> None:
    """Part of these files again, with AddressSanitizer and UndefinedBehaviorSanitizer in kernels and harness."""
    runtimes = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).is_file() for runtime in runtimes):
        pytest.skip(f"{compiler()[0]} has no AddressSanitizer runtime")
    chosen = "exact_as_pytorch and full and (float32 or bfloat16)"
    chosen = f"({chosen}) or slices or 32_bits or alone or without_rows or schedule"
    environment = os.environ | {
        "CUDA_HOST_SANITIZED": "1",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command += map(str, sorted(Path(__file__).parent.glob("test_cuda_host*.py")))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout
