"""Frozen lateral connections from fast to slow, concatenated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..explanation import note, recording
from ..nn.rearrange import SampleFrames, TimeToChannel
from .convolution import FrozenConv


class FrozenLateral(nn.Module):
    """The lateral connection: the time-strided convolution of the fast pathway beside the slow pathway's channels."""

    explains_itself = True
    op = "lateral_concat"  # what there is by itself, and behind max_pool_ and temporal_conv_
    join = "concat"
    group = 1  # frames of the slow pathway by themselves, as FrozenJoin has it

    def __init__(self, conv: FrozenConv) -> None:
        super().__init__()
        self.weight: Tensor
        self.shift: Tensor
        self.register_buffer("weight", conv.weight)
        self.register_buffer("shift", conv.shift)
        self.alpha, self.padding, self.relu = conv.stride[0], conv.padding[0], conv.relu

    def window(self) -> tuple[int, int, int, int]:
        """Kernel, stride, padding and dilation in T."""
        return self.weight.shape[2], self.alpha, self.padding, 1

    def arguments(self) -> dict[str, Any]:
        """As the ops that fill a wide tensor name them."""
        return {
            "lateral_weight": self.weight,
            "lateral_shift": self.shift,
            "alpha": self.alpha,
            "lateral_padding": self.padding,
            "lateral_relu": self.relu,
        }

    def gained(self, fast: Tensor) -> int:
        """Channels that the slow pathway gains."""
        return self.weight.shape[0]

    def given(self, fast: Tensor, frames: int) -> Tensor:
        """What the ops take beside the arguments."""
        return fast

    def forward(self, slow: Tensor, fast: Tensor, overwrite: bool = False) -> Tensor:
        """For a slow part that could not be written beside it: (N, C, T, H, W) and (N, C_fast, alpha * T, H, W) ->
        (N, C + K, T, H, W)."""
        if recording():
            note((self,), "lateral_concat")
        options: dict[str, Any] = {"alpha": self.alpha, "padding": self.padding, "relu": self.relu}
        return ops.lateral_concat(slow, fast, self.weight, None, self.shift, **options)


class FrozenFrames(nn.Module):
    """A lateral connection that only moves frames; the parts are those of ``FrozenLateral``."""

    explains_itself = True
    op = "frames_concat"
    join = "concat"
    group = 1

    def __init__(self, moved: TimeToChannel | SampleFrames) -> None:
        super().__init__()
        self.moved = moved

    def window(self) -> tuple[int, int, int, int]:
        return self.moved.taps, self.moved.alpha, 0, 1

    def arguments(self) -> dict[str, Any]:
        return {"alpha": self.moved.alpha, "taps": self.moved.taps}

    def gained(self, fast: Tensor) -> int:
        return fast.shape[1] * self.moved.taps

    def given(self, fast: Tensor, frames: int) -> Tensor:
        return fast

    def forward(self, slow: Tensor, fast: Tensor, overwrite: bool = False) -> Tensor:
        """As ``FrozenLateral.forward``."""
        if recording():
            note((self,), "frames_concat")
        return ops.frames_concat(slow, fast, **self.arguments())
