"""The first convolution of a pathway, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .temporal_conv import activate, per_channel


def stem_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """act(conv(x) + shift). x (N, C, T, H, W), weight (K, C, kt, kh, kw), shift (K)."""
    y = F.conv3d(x, weight, stride=tuple(stride), padding=tuple(padding))
    if shift is not None:
        y = y + per_channel(shift)
    return activate(y, None, relu).to(x.dtype)
