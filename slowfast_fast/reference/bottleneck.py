"""A whole bottleneck block in plain PyTorch: the judge of every faster implementation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .temporal_conv import per_channel


def bottleneck(
    x: Tensor,
    weight_a: Tensor,
    shift_a: Tensor,
    weight_b: Tensor,
    shift_b: Tensor,
    weight_c: Tensor,
    shift_c: Tensor,
    shortcut_weight: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    *,
    padding_a: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """relu(c(relu(b(relu(a(x))))) + residual), each convolution with its shift. Shapes as in ops/bottleneck.py."""
    padding_a = weight_a.shape[2] // 2 if padding_a is None else padding_a
    padding, step, steps = (0, dilation, dilation), (1, stride, stride), (1, dilation, dilation)
    residual = x
    if shortcut_weight is not None and shortcut_shift is not None:
        residual = F.conv3d(x, shortcut_weight, stride=step) + per_channel(shortcut_shift)
    a = (F.conv3d(x, weight_a, padding=(padding_a, 0, 0)) + per_channel(shift_a)).relu().to(x.dtype)
    b = (F.conv3d(a, weight_b, stride=step, padding=padding, dilation=steps) + per_channel(shift_b)).relu().to(x.dtype)
    y = (F.conv3d(b, weight_c) + per_channel(shift_c) + residual).relu().to(x.dtype)
    return y if out is None else out.copy_(y)
