"""A max pool along T, position by position."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from ..backend import Choice
from ..explanation import note, note_call, recording
from ..ops._layout import as_rows


class FrozenFrameMax(nn.Module):
    """The largest of ``kernel`` frames at every ``stride``-th place, as ``nn.MaxPool3d`` with windows along T alone.

    ``padding`` frames before and behind the clip count as none; it is at most half of ``kernel``.
    """

    explains_itself = True

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def frames(self) -> tuple[int, int, int, int]:
        """Kernel, stride, padding and dilation in T."""
        return self.kernel, self.stride, self.padding, 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, C, T', H, W)."""
        frames = x.shape[2]
        count = (frames + 2 * self.padding - self.kernel) // self.stride + 1
        if count < 1:
            raise ValueError(f"a max pool takes {self.kernel} frames at least; got x of shape {tuple(x.shape)}")
        y = as_rows(reduce(torch.maximum, (self._tap(x, j, count) for j in range(self.kernel))), "the result")
        if recording():
            note((self,), "frame_max")
            note_call("frame_max", Choice("aten", f"the largest of {self.kernel} frames"), (x,), y)
        return y

    def _tap(self, x: Tensor, j: int, count: int) -> Tensor:
        """The j-th frame of every window. Beyond an end of the clip it is the last one there, of that window too."""
        first, last = j - self.padding, j - self.padding + (count - 1) * self.stride
        if first >= 0 and last < x.shape[2]:
            return x[:, :, first : last + 1 : self.stride]
        places = torch.arange(first, last + 1, self.stride, device=x.device)
        return x.index_select(2, places.clamp(0, x.shape[2] - 1))
