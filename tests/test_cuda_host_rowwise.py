"""The row-wise kernels in 16-byte packs (csrc/cuda/rowwise.cuh), on the host as in test_cuda_host.py."""

import dataclasses

import pytest
import torch
from cuda_host.build import SCHEDULES, Harness
from cuda_host.cases import Case, Inputs, assert_as_exact_as_pytorch, far_apart, pitched, random_inputs, rows, run_op
from op_arguments import small_integers
from op_testing import dtypes, lay_out

BY_PACKS = {"normalise_rows", "gradient_sum_rows"}
ONE_BY_ONE = {"normalise_kernel", "gradient_sums"}
# Packs in a number that divides no block, and more of them than a block has threads.
CASES = (Case(1, 2, 72, 2, 9, 31, 1), Case(2, 1, 2056, 1, 3, 1, 1))


def without_products(
    host: Harness, inputs: Inputs, case: Case, bn: bool, expected: set[str]
) -> dict[str, torch.Tensor]:
    """Results of the forward and the row-wise part of the backward, by the kernels that are expected."""
    got: dict[str, torch.Tensor] = {}
    kernels = host.kernels(lambda: got.update(run_op(host, inputs, case, bn, products=False)))
    assert kernels & (BY_PACKS | ONE_BY_ONE) == {kernel for kernel in expected if bn or kernel.startswith("gradient")}
    return got


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool) -> None:
    inputs = random_inputs(case, dtype, True, seed=hash((case, bn)) % 2**31)
    assert_as_exact_as_pytorch(without_products(host, inputs, case, bn, BY_PACKS), inputs, case, dtype, bn)


@pytest.mark.parametrize("left_out", ["v1", "v2", "residual", "relu"])
def test_with_parts_left_out(host: Harness, left_out: str) -> None:
    inputs = random_inputs(CASES[0], torch.float16, True, seed=8)
    inputs = dataclasses.replace(inputs, **{left_out: False if left_out == "relu" else None})
    got = without_products(host, inputs, CASES[0], True, BY_PACKS)
    assert_as_exact_as_pytorch(got, inputs, CASES[0], torch.float16, True)


@pytest.mark.parametrize("layout", ["pitched", "time_slice", "batch_slice", "width_slice"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@dtypes
def test_slices(host: Harness, dtype: torch.dtype, bn: bool, layout: str) -> None:
    """Runs of whole tensors, of clips and of frames; the same bits as from the kernels that take one value at a time.
    One pack of channels; gradients whose sum is exact in any order."""
    case = Case(3, 2, 8, 4, 3, 5, 1)
    inputs = random_inputs(case, dtype, True, seed=4)
    inputs.grad = rows(small_integers(*inputs.grad.shape, dtype=dtype))

    def laid_out(layout: str) -> Inputs:
        parts = {name: getattr(inputs, name) for name in ("residual", "grad")}
        parts = {name: pitched(t) if layout == "pitched" else lay_out(t, layout) for name, t in parts.items()}
        return dataclasses.replace(inputs, **parts)

    by_packs = without_products(host, laid_out(layout), case, bn, BY_PACKS)
    one_by_one = without_products(host, laid_out("channel_slice"), case, bn, ONE_BY_ONE)
    for name in ("y", "dresidual", "dv2"):
        assert torch.equal(by_packs[name], one_by_one[name]), name


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_offsets_beyond_32_bits(host: Harness, bn: bool) -> None:
    case = Case(2, 2, 8, 4, 3, 5, 1)
    inputs = random_inputs(case, torch.float16, True, seed=9)
    far = dataclasses.replace(inputs, **{name: far_apart(getattr(inputs, name)) for name in ("residual", "grad")})
    got = without_products(host, far, case, bn, BY_PACKS)
    expected = without_products(host, inputs, case, bn, BY_PACKS)
    for name in ("y", "dresidual"):  # sums are cut otherwise where clips do not join
        assert torch.equal(got[name], expected[name]), name
    assert_as_exact_as_pytorch(got, inputs, case, torch.float16, bn)


def test_long_chunks(host: Harness) -> None:
    """So many rows that a thread takes several turns, ending in the middle of one."""
    case = Case(1, 1, 1024, 3, 29, 27, 1)
    inputs = random_inputs(case, torch.float32, True, seed=5)
    got = without_products(host, inputs, case, True, BY_PACKS)
    assert_as_exact_as_pytorch(got, inputs, case, torch.float32, bn=True)


@pytest.mark.parametrize("layout", ["channels_last", "time_slice", "batch_slice"])
@pytest.mark.parametrize(("channels", "kernel"), [(24, "copy_rows"), (7, "copy_kernel")])
@dtypes
def test_copies_into_a_slice(host: Harness, dtype: torch.dtype, channels: int, kernel: str, layout: str) -> None:
    case = Case(2, 4, 16, 8, 3, 5, 5, stride=4, padding=2)
    i = random_inputs(case, dtype, True, seed=6)
    slow = torch.randn(case.n, channels, case.t_out, case.h, case.w).to(dtype)
    arguments = (lay_out(slow, layout), i.x, i.weight, i.v1, i.v2, 4, 2, True, False)
    results = []
    assert kernel in host.kernels(lambda: results.append(host.lateral_concat(*arguments)))
    assert torch.equal(results[0][:, :channels], slow)


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    case = Case(2, 2, 40, 3, 5, 7, 1)
    inputs = random_inputs(case, torch.bfloat16, True, seed=7)

    def under(schedule: str) -> dict[str, torch.Tensor]:
        host.set_schedule(schedule)
        return run_op(host, inputs, case, bn=True)

    first, *others = [under(schedule) for schedule in SCHEDULES]
    for other in others:
        for name, value in other.items():
            assert torch.equal(value, first[name]), name
