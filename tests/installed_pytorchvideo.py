"""The installed pytorchvideo, also where torchvision, which it imports, is not installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from family_reference import roi_align
from torch import Tensor, nn


class RoIAlign(nn.Module):
    """Stands in for torchvision's where that is not installed."""

    def __init__(self, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.arguments = (output_size, spatial_scale, sampling_ratio)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(x, boxes, *self.arguments)


def pytorchvideo_slowfast() -> ModuleType:
    """pytorchvideo.models.slowfast. It imports RoIAlign from torchvision once, and keeps what it got."""
    try:
        import torchvision.ops
    except ImportError:
        ops = ModuleType("torchvision.ops")
        ops.RoIAlign = RoIAlign  # type: ignore[attr-defined]
        torchvision = ModuleType("torchvision")
        torchvision.ops = ops  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": torchvision, "torchvision.ops": ops}
    return pytest.importorskip("pytorchvideo.models.slowfast", reason="pytorchvideo is in the test extra")
