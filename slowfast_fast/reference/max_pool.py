"""Max pooling of the stem, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def max_pool(x: Tensor, *, kernel: int, stride: int, padding: int) -> Tensor:
    """Max over kernel x kernel windows in H and W."""
    return F.max_pool3d(x, (1, kernel, kernel), (1, stride, stride), (0, padding, padding))
