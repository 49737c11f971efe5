"""The installed pytorchvideo, also where torchvision, which it imports, is not installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


class RoIAlign(nn.Module):
    """Stands in for torchvision's where that is not installed: a bilinear sample in the middle of every output cell."""

    def __init__(self, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        height, width = self.output_size
        rows = (torch.arange(height, dtype=x.dtype) + 0.5) / height
        columns = (torch.arange(width, dtype=x.dtype) + 0.5) / width
        samples = []
        for clip, x1, y1, x2, y2 in (boxes * self.spatial_scale).tolist():
            vertical = (y1 + rows * (y2 - y1)) / x.shape[2] * 2 - 1
            horizontal = (x1 + columns * (x2 - x1)) / x.shape[3] * 2 - 1
            grid = torch.stack(torch.meshgrid(horizontal, vertical, indexing="xy"), -1)[None]
            index = round(clip / self.spatial_scale)
            samples.append(nn.functional.grid_sample(x[index : index + 1], grid, align_corners=False))
        return torch.cat(samples)


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
