"""Decoded frames as the input of both pathways, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_pathways(
    frames: Tensor, *, slow_frames: Sequence[int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """[slow, fast]: frames / 255, less the mean, by the standard deviation; channels first; some frames again."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    clip = frames.to(work) / 255
    clip = (clip - clip.new_tensor(mean)) / clip.new_tensor(std)
    fast = clip.permute(0, 4, 1, 2, 3).to(dtype)
    return [fast[:, :, list(slow_frames)], fast]
