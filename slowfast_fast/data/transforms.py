"""Scaling, cropping, flipping and normalising decoded frames.

Frames are uint8 (..., T, H, W, 3) until ``to_pathways`` normalises them: a quarter of float32's bytes on their way from
the workers to the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .sampling import slow_indices

# Of the Kinetics models of the SlowFast paper's authors and of pytorchvideo, for pixels in 0..1.
MEAN, STD = 0.45, 0.225


def short_side_scale(frames: Tensor, size: int, antialias: bool = False) -> Tensor:
    """Bilinear, to a shorter side of ``size``, the longer one rounded down: (T, H, W, 3) -> (T, H', W', 3), uint8.

    Args:
        antialias: False, as in pytorchvideo and PySlowFast, on whose frames the published weights were trained: every
            new pixel is made of four. True: of all that it covers, as PIL does; finer where videos are much reduced.
    """
    check_frames(frames, 4)
    height, width = frames.shape[1:3]
    shorter = min(height, width)
    if shorter == size:
        return frames
    shape = [math.floor(side / shorter * size) if side != shorter else size for side in (height, width)]
    # The permuted tensor is channels_last, which interpolate reads as it is.
    scaled = F.interpolate(
        frames.permute(0, 3, 1, 2), size=shape, mode="bilinear", align_corners=False, antialias=antialias
    )
    return scaled.permute(0, 2, 3, 1)


def spatial_crops(frames: Tensor, size: int, crops: int = 3) -> Tensor:
    """Square crops spread over the longer side, midway of the shorter: (T, H, W, 3) -> (crops, T, size, size, 3).

    Three are left, centre and right of a wide video, and top, centre and bottom of a high one; one is the centre.
    """
    height, width = _check_crop(frames, size)
    if crops < 1:
        raise ValueError(f"crops: expected at least 1, got {crops}")
    parts = [i / (crops - 1) for i in range(crops)] if crops > 1 else [0.5]
    places = []
    for part in parts:
        top, left = (part, 0.5) if height > width else (0.5, part)
        places.append((math.ceil((height - size) * top), math.ceil((width - size) * left)))
    return torch.stack([frames[:, top : top + size, left : left + size] for top, left in places])


def random_crop(frames: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """A square crop anywhere, the same of every frame: (T, H, W, 3) -> (T, size, size, 3), a view."""
    height, width = _check_crop(frames, size)
    top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in (height - size, width - size))
    return frames[:, top : top + size, left : left + size]


def random_flip(frames: Tensor, probability: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Left for right, of all frames or none: (T, H, W, 3) -> (T, H, W, 3)."""
    return frames.flip(2) if float(torch.rand((), generator=generator)) < probability else frames


def random_short_side(sides: Sequence[int], generator: torch.Generator | None = None) -> int:
    """A whole number of pixels from sides[0] to sides[1], both included, all equally likely."""
    return int(torch.randint(sides[0], sides[1] + 1, (), generator=generator))


def normalise(
    frames: Tensor,
    *,
    mean: float | Sequence[float] = MEAN,
    std: float | Sequence[float] = STD,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """uint8 frames (N, T, H, W, 3) -> (N, 3, T, H, W) in channels_last_3d: the input of a network with one pathway.

    Args:
        mean, std: of pixels in 0..1, one for all channels or one for each.
        dtype: None: PyTorch's default.
    """
    check_frames(frames, 5)
    return ops.pack_pathways(frames, alpha=None, mean=mean, std=std, dtype=dtype or torch.get_default_dtype())[0]


def to_pathways(
    frames: Tensor,
    alpha: int = 4,
    *,
    rule: str = "pytorchvideo",
    mean: float | Sequence[float] = MEAN,
    std: float | Sequence[float] = STD,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """uint8 frames of the fast pathway (N, T, H, W, 3) -> [slow (N, 3, T / alpha, H, W), fast (N, 3, T, H, W)],
    normalised, in channels_last_3d.

    ``rule`` says which frames the slow pathway takes, as in ``slow_indices``; the rest is as in ``normalise``.
    """
    check_frames(frames, 5)
    slow_indices(frames.shape[1], alpha, rule)  # for its errors
    dtype = dtype or torch.get_default_dtype()
    return ops.pack_pathways(frames, alpha=alpha, mean=mean, std=std, dtype=dtype, rule=rule)


def check_frames(frames: Tensor, dims: int) -> None:
    if frames.dtype is not torch.uint8:
        raise TypeError(f"frames: expected torch.uint8, got {frames.dtype}")
    if frames.ndim != dims or frames.shape[-1] != 3:
        shape = "(N, T, H, W, 3)" if dims == 5 else "(T, H, W, 3)"
        raise ValueError(f"frames: expected {shape}, got {tuple(frames.shape)}")


def _check_crop(frames: Tensor, size: int) -> tuple[int, int]:
    check_frames(frames, 4)
    height, width = frames.shape[1:3]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: expected 1 to {min(height, width)}, the shorter side of the frames, got {size}")
    return height, width
