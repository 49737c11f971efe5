"""max_pool: the same values as PyTorch's pool, from any layout, in every build of its kernels."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host.build import Harness
from cuda_host.cases import far_apart
from op_testing import LAYOUTS, assert_dense, dtypes, lay_out

from slowfast_fast import ops, reference

# (N, C, T, H, W), kernel, stride, padding
CASES = (
    ((2, 8, 3, 9, 7), 3, 2, 1),  # a stem
    ((1, 11, 2, 8, 8), 3, 2, 1),
    ((1, 64, 1, 6, 5), 2, 2, 0),
    ((2, 3, 2, 5, 4), 1, 3, 0),
    ((1, 17, 2, 7, 9), 5, 1, 2),
    ((0, 8, 2, 6, 6), 3, 2, 1),
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


@dtypes
@cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_pytorch(poisoned: None, case: tuple, dtype: torch.dtype, layout: str) -> None:
    shape, kernel, stride, padding = case
    x = torch.randn(shape).to(dtype)
    options = {"kernel": kernel, "stride": stride, "padding": padding}
    y = ops.max_pool(lay_out(x, layout), **options)
    assert_dense(y)
    assert torch.equal(y, reference.max_pool(x, **options))


@dtypes
@cases
def test_cuda_kernels_on_the_host(host: Harness, case: tuple, dtype: torch.dtype) -> None:
    shape, *options = case
    for layout in ("channels_last", "channel_slice", "time_slice"):
        x = torch.randn(shape).to(dtype)
        y = host.max_pool(lay_out(x, layout), *options)
        assert torch.equal(y, reference.max_pool(x, **dict(zip(("kernel", "stride", "padding"), options, strict=True))))


def test_offsets_beyond_32_bits_on_the_host(host: Harness) -> None:
    x = torch.randn(2, 8, 2, 5, 7).half().contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(host.max_pool(far_apart(x), 3, 2, 1), host.max_pool(x, 3, 2, 1))


def test_special_values(host: Harness) -> None:
    """A NaN anywhere in a window is its maximum; where all is -inf, that is."""
    x = torch.randn(1, 8, 1, 9, 9)
    x[0, :, 0, 4, 4] = math.nan
    x[0, :, 0, 0, 0] = math.nan
    x[0, :, 0, 6:, 6:] = -math.inf
    x = x.contiguous(memory_format=torch.channels_last_3d)
    expected = reference.max_pool(x, kernel=3, stride=2, padding=1)
    for y in (ops.max_pool(x, kernel=3, stride=2, padding=1), host.max_pool(x, 3, 2, 1)):
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@dtypes
@cases
def test_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    shape, kernel, stride, padding = case
    if dtype == torch.float64:
        pytest.skip("the cuda backend has no float64")
    x = torch.randn(shape).to(dtype)
    options = {"kernel": kernel, "stride": stride, "padding": padding}
    assert torch.equal(ops.max_pool(x.cuda(), **options).cpu(), reference.max_pool(x, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel": 0, "stride": 1}, ValueError, "kernel must be at least 1"),
        ({"kernel": (3, 3), "stride": 1}, TypeError, "kernel must be an int"),
        ({"kernel": 3, "stride": 1, "padding": 2}, ValueError, "padding must be at most half of the kernel, 1; got 2"),
        ({"kernel": 9, "stride": 1}, ValueError, "kernel 9 does not fit H = 4 and W = 5"),
    ],
)
def test_wrong_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.max_pool(torch.randn(1, 2, 1, 4, 5), **options)


def test_a_gradient_is_refused() -> None:
    x = torch.randn(1, 2, 1, 4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="max_pool has no gradient: it is made for inference"):
        ops.max_pool(x, kernel=2, stride=2).sum().backward()


def test_opcheck() -> None:
    x = torch.randn(1, 5, 2, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    torch.library.opcheck(torch.ops.slowfast_fast.max_pool.default, (x, 3, 2, 1))
