"""Frozen lateral connections that are added, or go from slow to fast.

A group is the alpha fast frames that belong to a slow one. Groups can stand as clips of their own, (N * T, C, alpha, H,
W): of a dense tensor that is a view. So is what came out beside each other for one slow frame, channels r * C + c, and
a fast frame r of a group is joined to it without being moved first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..backend import Choice
from ..explanation import note, note_call, recording
from ..nn.rearrange import ChannelToTime, RepeatFrames, SampleFrames, TimeToChannel
from ..ops._layout import as_rows
from .convolution import FrozenConv

Move = TimeToChannel | SampleFrames | ChannelToTime | RepeatFrames


def groups(fast: Tensor, alpha: int) -> Tensor:
    """(N, C, T * alpha, H, W) as (N, C, T, alpha, H, W), frames left over left out; a view."""
    frames = fast.shape[2] // alpha
    return fast[:, :, : frames * alpha].unflatten(2, (frames, alpha))


def apart(slow: Tensor, alpha: int) -> Tensor:
    """(N, alpha * C, T, H, W) as (N, C, T, alpha, H, W); a view."""
    return slow.unflatten(1, (alpha, slow.shape[1] // alpha)).permute(0, 2, 3, 1, 4, 5)


def as_clips(groups: Tensor) -> Tensor:
    """(N, C, T, alpha, H, W) as (N * T, C, alpha, H, W); a view where N and T of the tensor lie evenly."""
    return groups.transpose(1, 2).flatten(0, 1)


class FrozenJoin(nn.Module):
    """What a source pathway has for a target, beside the target's channels or added to them.

    Args:
        move: how frames become channels or the other way round; None where ``layer`` does that.
        layer: what follows, or the convolution; None: nothing.
        alpha: fast frames of a group.
        to_fast: from slow to fast. A convolution then gives the frames of a group as channels (folding.as_plain).
        join: "concat" or "sum".
    """

    explains_itself = True
    op = "frames_concat"  # what writes both, by itself, and behind max_pool_ and temporal_conv_

    def __init__(self, move: Move | None, layer: nn.Module | None, alpha: int, to_fast: bool, join: str) -> None:
        super().__init__()
        self.move = move
        self.layer = layer
        self.alpha, self.to_fast, self.join = alpha, to_fast, join

    @property
    def group(self) -> int:
        """Frames of the target that stand as a clip of their own."""
        return self.alpha if self.to_fast else 1

    def window(self) -> tuple[int, int, int, int]:
        """Kernel, stride, padding and dilation in T by which fast frames meet slow ones."""
        if isinstance(self.layer, FrozenConv) and self.move is None and not self.to_fast:
            (stride, padding, dilation) = self.layer.temporal_geometry().values()
            return self.layer.weight.shape[2], stride, padding, dilation
        return (1 if isinstance(self.move, SampleFrames) else self.alpha), self.alpha, 0, 1

    def arguments(self) -> dict[str, Any]:
        """As the ops that fill a wide tensor name them: every frame of what is given to them."""
        return {"alpha": 1, "taps": 1}

    def gained(self, source: Tensor) -> int:
        """Channels that the slow pathway gains where they are concatenated."""
        if isinstance(self.layer, FrozenConv):
            return self.layer.weight.shape[0]
        return source.shape[1] * (self.alpha if isinstance(self.move, TimeToChannel) else 1)

    def given(self, source: Tensor, frames: int) -> Tensor:
        """What goes beside the channels of a target of so many frames: (N, C, T, H, W), or where a group has several
        (N * T, C, alpha, H, W)."""
        self._check(source, frames)
        if self.group == 1:
            return as_rows(self._moved(source), "the frames moved")
        seen = self._groups(source)
        return as_rows(as_clips(seen.expand(*seen.shape[:3], self.alpha, *seen.shape[4:])), "the frames moved")

    def _frames(self, source: Tensor) -> Tensor:
        """What the layer takes."""
        if self.move is None:
            return source
        if isinstance(self.move, SampleFrames):
            return source[:, :, :: self.alpha]
        if recording():
            note((self.move,), None, "no op moves frames for a norm or an activation")
        return self.move(source)

    def _moved(self, source: Tensor) -> Tensor:
        """(N, C, T, H, W), in the target's frames."""
        frames = self._frames(source)
        return frames if self.layer is None else self.layer(frames)

    def _groups(self, source: Tensor) -> Tensor:
        """(N, C, T, alpha, H, W), or 1 for alpha where all frames of a group are the same."""
        if self.move is None:
            return apart(self._moved(source), self.alpha)
        if isinstance(self.move, RepeatFrames):
            return (source if self.layer is None else self.layer(source)).unsqueeze(3)
        return apart(source, self.alpha) if self.layer is None else groups(self._moved(source), self.alpha)

    def forward(self, target: Tensor, source: Tensor, overwrite: bool = False) -> Tensor:
        """For a target that is there already. ``overwrite``: nobody else needs it."""
        if self.join == "sum":
            self._check(source, target.shape[2])
            return self._sum(target, source, overwrite)
        seen = self.given(source, target.shape[2])
        if recording():
            note((self,), self.op)
        return ungrouped(
            ops.frames_concat(grouped(target, self.group), seen, **self.arguments()), target.shape[2], self.group
        )

    def _check(self, source: Tensor, frames: int) -> None:
        if self.to_fast and frames != self.alpha * source.shape[2]:
            raise ValueError(
                f"where the pathways meet the fast one must have {self.alpha} times the frames of the slow one; got "
                f"{frames} and {source.shape[2]}"
            )

    def _sum(self, target: Tensor, source: Tensor, overwrite: bool) -> Tensor:
        layer = self.layer
        if isinstance(layer, FrozenConv) and not (layer.relu or self.to_fast):
            return layer(self._frames(source), target, overwrite)
        out = target if overwrite else target.clone()
        if self.to_fast:
            seen, place = self._groups(source), groups(out, self.alpha)
        elif isinstance(self.move, TimeToChannel) and layer is None:
            seen, place = groups(source, self.alpha), apart(out, self.alpha)
        else:
            seen, place = self._moved(source), out
        place.add_(seen)
        if recording():
            why = "frames that lie apart" if self.to_fast or layer is None else "behind an activation"
            note((self,), "sum")
            note_call("sum", Choice("torch", f"in place; no op adds {why}"), (target, seen), out)
        return out

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, to_fast={self.to_fast}, join={self.join}"


class FrozenLaterals(nn.Module):
    """Connections both ways, or from slow to fast alone; both read what the pathways were before."""

    def __init__(self, to_slow: nn.Module | None, to_fast: FrozenJoin) -> None:
        super().__init__()
        self.to_slow = to_slow
        self.to_fast = to_fast


def grouped(target: Tensor, group: int) -> Tensor:
    """A target in the form of what is given beside it."""
    return target if group == 1 else as_rows(as_clips(groups(target, group)), "the fast pathway")


def ungrouped(out: Tensor, frames: int, group: int) -> Tensor:
    """A dense result of ``frames`` frames from that form; a view."""
    if group == 1:
        return out
    slow = frames // group
    return out.unflatten(0, (out.shape[0] // slow, slow)).transpose(1, 2).flatten(2, 3)
