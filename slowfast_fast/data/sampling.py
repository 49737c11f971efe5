"""Which frames of a video the two pathways take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pathways import pathway_frames

# How each library spreads n frames over a window. "even": linspace from its first to its last frame, rounded down;
# "strided": every stride-th frame from its first.
RULES = {
    "pytorchvideo": "even",
    "pyslowfast": "even",
    "mmaction2": "strided",
    "gluoncv": "strided",
    "r1c7": "strided",
}
PADDINGS = ("last", "loop", "error")


def slow_indices(frames: int, alpha: int, rule: str = "pytorchvideo") -> Tensor:
    """Which frames of the fast pathway the slow one takes: int64 (frames // alpha,).

    Of 32 frames with alpha 4 these are 0, 4, 8, 13, 17, 22, 26, 31 by the rule of pytorchvideo and PySlowFast, and
    0, 4, ..., 28 by that of mmaction2, gluoncv and r1c7's SlowFastNetworks.

    Args:
        frames: of the fast pathway, a multiple of alpha.
        alpha: frames of the fast pathway for each one of the slow.
        rule: a key of ``RULES``.

    Raises:
        ValueError: an unknown rule; alpha below 1; frames that alpha does not divide.
    """
    _spread(rule)
    if alpha < 1 or frames < 1 or frames % alpha:
        raise ValueError(f"frames: expected a multiple of alpha = {alpha} (at least 1), got {frames}")
    return torch.tensor(pathway_frames(frames, alpha=alpha, rule=rule)[0])


@dataclass(frozen=True)
class ClipSampler:
    """Clips of a video in the terms of the SlowFast paper (section 3): a network "T x tau" sees windows of T * tau raw
    frames, of which the slow pathway takes T, one every tau, and the fast one alpha * T, one every tau / alpha.

    ``ClipSampler(8, 8, 4)``, the default, is the sampling of the 8x8 networks, ``ClipSampler(4, 16, 8)`` that of the
    4x16 ones: both take windows of 64 raw frames, and 32 of them for the fast pathway.

    Args:
        num_frames: T, of the slow pathway.
        tau: its stride in raw frames, a multiple of alpha.
        alpha: frames of the fast pathway for each one of the slow.
        rule: the library whose arithmetic to follow, a key of ``RULES``. The libraries differ in the frames of a clip,
            in those of the slow pathway, and in where uniform clips start; for the last, gluoncv and r1c7 get
            mmaction2's.
        padding: of a video that is shorter than a window. "last": its last frame repeats (as in PySlowFast); "loop": it
            starts again (as in mmaction2); "error": ValueError.
    """

    num_frames: int = 8
    tau: int = 8
    alpha: int = 4
    rule: str = "pytorchvideo"
    padding: str = "last"

    def __post_init__(self) -> None:
        _spread(self.rule)
        for name in ("num_frames", "tau", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.tau % self.alpha:
            raise ValueError(f"tau: expected a multiple of alpha = {self.alpha}, got {self.tau}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding: expected one of {', '.join(PADDINGS)}, got {self.padding!r}")

    @property
    def window(self) -> int:
        """Raw frames that a clip spans."""
        return self.num_frames * self.tau

    @property
    def fast_frames(self) -> int:
        return self.num_frames * self.alpha

    def random(self, total: int, generator: torch.Generator | None = None) -> Tensor:
        """One clip anywhere in a video of ``total`` frames, for training: int64 (fast_frames,).

        The numbers are drawn from ``generator``, or from PyTorch's, which differs from DataLoader worker to worker.
        """
        room = max(total - self.window, 0)
        if _spread(self.rule) == "strided":
            start = torch.randint(room + 1, (1,), generator=generator)
        else:
            start = torch.rand(1, generator=generator) * room
        return self._clips(total, start)[0]

    def uniform(self, total: int, clips: int = 10) -> Tensor:
        """Clips spread over a video of ``total`` frames, for testing: int64 (clips, fast_frames).

        pytorchvideo, PySlowFast: clip i of n starts at i / n of the room that a window leaves, so that a single one
        starts with the video. Others: the first clip starts with the video, the last one ends with it, and a single
        one is in the middle.
        """
        if clips < 1:
            raise ValueError(f"clips: expected at least 1, got {clips}")
        places = torch.arange(clips, dtype=torch.float64)
        if _spread(self.rule) == "even":
            return self._clips(total, places * max(total - self.window, 0) / clips)
        stride = self.tau // self.alpha
        room = max(total - (self.fast_frames - 1) * stride - 1, 0)
        starts = (places * room / (clips - 1)).round() if clips > 1 else torch.tensor([room // 2])
        return self._clips(total, starts)

    def slow(self) -> Tensor:
        """Which frames of such a clip the slow pathway takes: int64 (num_frames,)."""
        return slow_indices(self.fast_frames, self.alpha, self.rule)

    def _clips(self, total: int, starts: Tensor) -> Tensor:
        """The clips that start there, padded."""
        if total < 1:
            raise ValueError(f"total: expected at least 1 frame, got {total}")
        if total < self.window and self.padding == "error":
            raise ValueError(f"a clip spans {self.window} frames and the video has {total}; padding is 'error'")
        if _spread(self.rule) == "strided":
            indices = starts.long()[:, None] + torch.arange(0, self.window, self.tau // self.alpha)
        else:
            # One by one: the rounding of linspace, in float32 as in both libraries, depends on where it starts.
            ends = [(start, start + self.window - 1) for start in starts.tolist()]
            indices = torch.stack([torch.linspace(*end, self.fast_frames) for end in ends]).long()
        return indices % total if self.padding == "loop" else indices.clamp(max=total - 1)


def _spread(rule: str) -> str:
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    return RULES[rule]
