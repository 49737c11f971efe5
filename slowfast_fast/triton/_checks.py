"""The checks that a direct call of torch.ops.slowfast_fast_triton needs in order not to read out of bounds. The
messages meant for users are raised earlier, in slowfast_fast/ops/."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._layout import places

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Conv(NamedTuple):
    """y[n, k, t, p] = sum over c, tap of weight[k, c, tap] * x[n, c, t * stride + tap * dilation - padding, p], frames
    outside the clip being 0."""

    n: int
    c: int
    k: int
    t_in: int
    t_out: int
    h: int
    w: int
    taps: int
    stride: int
    padding: int
    dilation: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Conv:
        n, c, t_in, h, w = x.shape
        k, _, taps, _, _ = weight.shape
        t_out = places(t_in, taps, stride, padding, dilation)
        return cls(n, c, k, t_in, t_out, h, w, taps, stride, padding, dilation)

    @property
    def positions(self) -> int:
        return self.h * self.w

    @property
    def rows(self) -> int:
        return self.n * self.t_out * self.h * self.w

    @property
    def output(self) -> tuple[int, ...]:
        return self.n, self.k, self.t_out, self.h, self.w

    def check(self, x: Tensor, weight: Tensor) -> None:
        require(x.dtype in DTYPES, f"x must be float32, float16 or bfloat16; got {x.dtype}")
        check_rows("x", x, tuple(x.shape), x)
        _check_like("weight", weight, x)
        expected = (self.k, self.c, self.taps, 1, 1)
        require(
            tuple(weight.shape) == expected and weight.is_contiguous() and weight.numel() > 0,
            f"weight must be a contiguous {expected}; got {tuple(weight.shape)}, strides {weight.stride()}",
        )
        require(
            self.stride >= 1 and self.padding >= 0 and self.dilation >= 1,
            f"stride and dilation must be positive, padding not negative; got {self.stride}, {self.dilation} and "
            f"{self.padding}",
        )
        require(self.t_out >= 1, f"the kernel is longer than the padded clip of {self.t_in} frames")


def check_rows(name: str, rows: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """``rows``, if given, must be rows of channels (docs/design.md) of this shape, beside x."""
    if rows is None:
        return
    _check_like(name, rows, x)
    require(tuple(rows.shape) == tuple(shape), f"{name} must have shape {tuple(shape)}; got {tuple(rows.shape)}")
    _, c, _, h, w = rows.shape
    _, s_c, _, s_h, s_w = rows.stride()
    adjacent = (c == 1 or s_c == 1) and (h == 1 or w == 1 or s_h == w * s_w)
    require(adjacent or rows.numel() == 0, f"{name} must be rows of channels; got strides {rows.stride()}")


def check_vector(name: str, vector: Tensor | None, k: int, x: Tensor) -> None:
    """``vector``, if given, must be one float32 per output channel."""
    if vector is None:
        return
    require(
        tuple(vector.shape) == (k,) and vector.is_contiguous() and vector.dtype == torch.float32,
        f"{name} must be {k} contiguous float32 values; got {tuple(vector.shape)} of {vector.dtype}",
    )
    require(vector.device == x.device, f"{name} must be on {x.device}; got {vector.device}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    require(tensor.dim() == 5, f"{name} must have 5 dimensions; got {tensor.dim()}")
    require(tensor.dtype == x.dtype, f"{name} must have the dtype of the input, {x.dtype}; got {tensor.dtype}")
    require(tensor.device == x.device, f"{name} must be on the device of the input, {x.device}; got {tensor.device}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
