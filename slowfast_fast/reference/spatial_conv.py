"""The spatial convolution in plain PyTorch: the judge of every faster implementation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .temporal_conv import activate, per_channel


def spatial_conv(
    x: Tensor, weight: Tensor, shift: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """act(conv(x) + shift + residual). Shapes as in ops/spatial_conv.py."""
    y = F.conv3d(x, weight, padding=(0, 1, 1))
    y = y if shift is None else y + per_channel(shift)
    return activate(y, residual, relu).to(x.dtype)
