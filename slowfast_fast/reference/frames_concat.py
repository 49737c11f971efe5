"""Fast frames as channels beside the slow pathway's, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .max_pool import max_pool
from .temporal_conv import temporal_conv


def frames_concat(slow: Tensor, fast: Tensor, *, alpha: int, taps: int) -> Tensor:
    """cat([slow, fast[:, :, ::alpha], fast[:, :, 1::alpha], ...]) over channels, with ``taps`` parts of fast."""
    frames = slow.shape[2]
    return torch.cat([slow, *(fast[:, :, tap::alpha][:, :, :frames] for tap in range(taps))], 1)


def temporal_conv_frames_concat(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    fast: Tensor,
    *,
    alpha: int,
    taps: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """``frames_concat`` with act(conv(x) + shift + residual) as slow."""
    slow = temporal_conv(x, weight, None, shift, residual, stride=stride, padding=padding, dilation=dilation, relu=relu)
    return frames_concat(slow, fast, alpha=alpha, taps=taps)


def max_pool_frames_concat(
    x: Tensor, fast: Tensor, *, kernel: int, stride: int, padding: int, alpha: int, taps: int
) -> Tensor:
    """``frames_concat`` with max_pool(x) as slow."""
    return frames_concat(max_pool(x, kernel=kernel, stride=stride, padding=padding), fast, alpha=alpha, taps=taps)
