"""RoIAlign (He et al., "Mask R-CNN", ICCV 2017, section 3), with the numbers of ``torchvision.ops.RoIAlign``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RoIAlign(nn.Module):
    """The features under each box, resampled to one size.

    A box is cut into cells, and a cell gives the mean over a grid of samples, each interpolated between the four
    positions around it. Such a sample is a weight for rows times one for columns, and so is their mean: a box is two
    small matrix products, and no number of samples is asked of the device.

    Args:
        output_size: cells of a box, (H, W) or one number for both.
        spatial_scale: factor from box coordinates to feature coordinates.
        sampling_ratio: samples of a cell in each direction; 0 takes as many as the cell has positions, rounded up.
        aligned: feature (y, x) lies at y + 0.5, x + 0.5 rather than at y, x, and boxes may be smaller than a position.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
        self.output_size = (height, width)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """x (N, C, H, W) and boxes (B, 5) of (clip, x1, y1, x2, y2), or for each clip (B_n, 4) -> (B, C, H', W').

        Any float dtype; weights are made in float32 at least, from boxes in whatever dtype, which get no gradient.
        Raises ValueError for boxes of another shape.
        """
        found = _numbered(boxes) if isinstance(boxes, (list, tuple)) else boxes
        if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != 5:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"boxes must be (B, 5) of (clip, x1, y1, x2, y2), or for each clip (B_n, 4); got {got}")
        with torch.no_grad():
            exact = torch.promote_types(torch.promote_types(x.dtype, found.dtype), torch.float32)
            x1, y1, x2, y2 = (found[:, 1:].to(exact) * self.spatial_scale - (0.5 if self.aligned else 0.0)).unbind(1)
            rows = self._weights(y1, y2, self.output_size[0], x.shape[2]).to(x.dtype)
            columns = self._weights(x1, x2, self.output_size[1], x.shape[3]).to(x.dtype)
        features = x.permute(0, 2, 3, 1).index_select(0, found[:, 0].long())  # (B, H, W, C), of each box its clip's
        by_row = (rows @ features.flatten(2)).unflatten(2, features.shape[2:])
        return (columns[:, None] @ by_row).permute(0, 3, 1, 2)

    def _weights(self, first: Tensor, last: Tensor, cells: int, length: int) -> Tensor:
        """(B, cells, length): how much each of ``length`` positions counts in each cell, in one direction."""
        size = last - first
        cell = (size if self.aligned else size.clamp_min(1.0)) / cells
        count = torch.full_like(cell, self.sampling_ratio) if self.sampling_ratio > 0 else cell.ceil()
        step = (cell / count.clamp_min(1.0))[:, None, None]
        begin = first[:, None, None] + torch.arange(cells, device=first.device)[:, None] * cell[:, None, None]
        # More than one sample a cell lie at least half a position apart (all of them, where their number is given), so
        # no more than these can lie on the features; the first that can is not before -1.
        most = self.sampling_ratio or 2 * length + 4
        number = torch.arange(most, device=first.device)
        if not self.sampling_ratio:
            number = number + ((-1.0 - begin) / step - 0.5).floor().clamp_min(0.0)
        at = begin + (number + 0.5) * step
        seen = (at >= -1.0) & (at <= length) & (number < count[:, None, None])
        positions = torch.arange(length, device=first.device)
        near = 1.0 - (at.clamp(0.0, length - 1.0)[..., None] - positions).abs()
        return near.clamp_min(0.0).where(seen[..., None], 0.0).sum(2) / count.clamp_min(1.0)[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


def _numbered(boxes: Sequence[Tensor]) -> Tensor | None:
    """(B, 5) from the boxes of each clip; None if these are not (B_n, 4)."""
    if not boxes or any(of_clip.dim() != 2 or of_clip.shape[1] != 4 for of_clip in boxes):
        return None
    return torch.cat([nn.functional.pad(of_clip, (1, 0), value=clip) for clip, of_clip in enumerate(boxes)])
