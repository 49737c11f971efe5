"""The wide input of a slow stage: the slow pathway's last layer and the lateral convolution, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .max_pool import max_pool
from .temporal_conv import temporal_conv


def temporal_conv_lateral_concat(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    fast: Tensor,
    lateral_weight: Tensor,
    lateral_shift: Tensor | None,
    *,
    alpha: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = True,
    lateral_padding: int | None = None,
    lateral_relu: bool = True,
) -> Tensor:
    """cat([act(conv(x) + shift + residual), act(conv(fast) + lateral_shift)]) over channels."""
    slow = temporal_conv(x, weight, None, shift, residual, stride=stride, padding=padding, dilation=dilation, relu=relu)
    lateral = temporal_conv(
        fast, lateral_weight, None, lateral_shift, stride=alpha, padding=lateral_padding, relu=lateral_relu
    )
    return torch.cat([slow, lateral], 1)


def max_pool_lateral_concat(
    x: Tensor,
    fast: Tensor,
    lateral_weight: Tensor,
    lateral_shift: Tensor | None,
    *,
    kernel: int,
    stride: int,
    padding: int,
    alpha: int,
    lateral_padding: int | None = None,
    lateral_relu: bool = True,
) -> Tensor:
    """cat([max_pool(x), act(conv(fast) + lateral_shift)]) over channels."""
    lateral = temporal_conv(
        fast, lateral_weight, None, lateral_shift, stride=alpha, padding=lateral_padding, relu=lateral_relu
    )
    return torch.cat([max_pool(x, kernel=kernel, stride=stride, padding=padding), lateral], 1)
