"""Lateral connections that only move frames: fast frames into channels of slow ones, and back (paper section 3.4)."""

from torch import Tensor, nn


class _Frames(nn.Module):
    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.alpha = alpha

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class TimeToChannel(_Frames):
    """(N, C, alpha * T, H, W) -> (N, alpha * C, T, H, W): channel j * C + c is channel c of frame alpha * t + j.

    Frames at the end that do not make alpha are left out. ``taps`` is how many of every alpha frames are taken, as
    ``ops.frames_concat`` has it.
    """

    @property
    def taps(self) -> int:
        return self.alpha

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, : x.shape[2] // self.alpha * self.alpha]
        return x.unflatten(2, (-1, self.alpha)).movedim(3, 1).flatten(1, 2)


class SampleFrames(_Frames):
    """(N, C, T_fast, H, W) -> every alpha-th frame, from the first one on."""

    taps = 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.alpha]


class ChannelToTime(_Frames):
    """The inverse of ``TimeToChannel``: (N, alpha * C, T, H, W) -> (N, C, alpha * T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.alpha, -1)).movedim(1, 3).flatten(2, 3)


class RepeatFrames(_Frames):
    """(N, C, T, H, W) -> (N, C, alpha * T, H, W): every frame alpha times."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.alpha, 2)
