"""The frozen network: frozen blocks in a row behind the checks of what is given to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..explanation import because, recording
from ..nn.network_units import Sampling
from ..ops._layout import as_rows, places
from . import choices, parts
from .inference import Inference


@dataclass(frozen=True)
class Clips:
    """What a network takes: channels of each pathway's clip, and how its frames relate.

    ``frames`` has for each pathway the (kernel, stride, padding, dilation) in T of the layers between its clip and
    the first lateral connection, that of the fast pathway with the lateral convolution last; empty where nothing
    relates the pathways' frames.
    """

    channels: tuple[int, ...]
    alone: bool = False  # one clip by itself, not a list
    sampling: Sampling | None = None  # the pathways' frames of that clip
    frames: tuple[tuple[tuple[int, int, int, int], ...], ...] = ()

    def met(self, pathway: int, frames: int) -> int:
        """Frames of a pathway where it meets the others."""
        for kernel, stride, padding, dilation in self.frames[pathway]:
            frames = places(frames, kernel, stride, padding, dilation)
        return frames


class FrozenNetwork(Inference):
    """What :func:`slowfast_fast.freeze` returns: a network for inference, with the call of the original."""

    def __init__(
        self, blocks: Sequence[nn.Module], head: nn.Module | None, clips: Clips, dtype: torch.dtype, cuda_graph: bool
    ) -> None:
        super().__init__(dtype, cuda_graph)
        self.blocks = nn.ModuleList(blocks)
        self.detection_head = head  # takes features and what is given beside the clips
        self.clips = clips
        super().train(False)

    def forward(self, x: Sequence[Tensor] | Tensor, bboxes: Any = None) -> Any:
        """[slow (N, C, T, H, W), fast (N, C, alpha * T, H, W)] -> logits (N, classes), dtype in and out. A network of
        one pathway, or one that samples the pathways' frames itself, takes its clip alone.

        explain() sees the layers of a call without a CUDA graph.

        ``bboxes``: what a detection network takes beside the clips, in any dtype.

        Raises TypeError or ValueError for a clip that the network does not take.
        """
        x = self._checked(x)
        if (bboxes is None) != (self.detection_head is None):
            wanted = "no bboxes" if bboxes is not None else "bboxes"
            raise TypeError(f"the network was frozen from one that takes {wanted} beside the clips")
        for boxes in tree_leaves(bboxes):
            if isinstance(boxes, Tensor):
                self._check_device("bboxes", boxes)
        if torch.compiler.is_compiling():
            return self._run(list(x), bboxes)
        with torch.no_grad(), torch.autocast(x[0].device.type, enabled=False):
            if self.cuda_graph and not recording():
                return self._replay(self._run, list(x), bboxes)
            return self._run(list(x), bboxes)

    def _run(self, x: list[Tensor], bboxes: Any) -> Any:
        in_parts = not torch.compiler.is_compiling() and x[0].device.type == "cpu"
        out = self._in_parts(x) if in_parts else self._features(x)
        return out if self.detection_head is None else self.detection_head(out, bboxes).flatten(1)

    def _in_parts(self, x: list[Tensor]) -> Any:
        if len(x[0]) <= choices.MOST_CLIPS:
            return self._features(x)
        why_whole = parts.why_whole(self.blocks)
        if why_whole is None:
            return parts.in_turn(self._features, x, choices.MOST_CLIPS)
        with because(f"all {len(x[0])} clips at once: {why_whole}"):
            return self._features(x)

    def _features(self, x: list[Tensor]) -> Any:
        """What the blocks give: logits, or what a detection head takes."""
        out: Any = x
        if self.clips.sampling is not None:
            out = list(self.clips.sampling(x[0]))
        elif self.clips.alone:
            out = as_rows(x[0], "x")
        for block in self.blocks:
            out = block(out)
        return out

    def _checked(self, x: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
        """The clips, one for each pathway."""
        if self.clips.alone:
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be one clip (N, C, T, H, W), a torch.Tensor; got {type(x).__name__}")
            x = [x]
        names = ("slow", "fast") if len(self.clips.channels) == 2 else tuple(map(str, range(len(self.clips.channels))))
        if not isinstance(x, (list, tuple)) or len(x) != len(names):
            got = f"{len(x)} entries" if isinstance(x, (list, tuple)) else type(x).__name__
            raise ValueError(f"x must be a list of {len(names)} clips, [{', '.join(names)}]; got {got}")
        for index, (name, clip, channels) in enumerate(zip(names, x, self.clips.channels, strict=True)):
            said = "x" if self.clips.alone else f"x[{index}], the {name} clip,"
            if not isinstance(clip, Tensor):
                raise TypeError(f"{said} must be a torch.Tensor; got {type(clip).__name__}")
            if clip.dim() != 5 or clip.shape[1] != channels or 0 in clip.shape[2:]:
                raise ValueError(
                    f"{said} must be (N, {channels}, T, H, W), T, H and W at least 1; got shape {tuple(clip.shape)}"
                )
            self._check_clip(said, clip)
            self._check_agreement(said, clip, x[0])
        self._check_frames(x, names)
        return x

    def _check_agreement(self, said: str, clip: Tensor, first: Tensor) -> None:
        if (clip.shape[0], *clip.shape[3:]) != (first.shape[0], *first.shape[3:]):
            raise ValueError(
                f"{said} must have N, H and W of x[0], {(first.shape[0], *first.shape[3:])}; "
                f"got {(clip.shape[0], *clip.shape[3:])}"
            )
        self._check_device(said, clip)

    def _check_frames(self, x: Sequence[Tensor], names: tuple[str, ...]) -> None:
        if not self.clips.frames:
            return
        slow, fast = (x[pathway].shape[2] for pathway in (0, 1))
        meeting = self.clips.met(0, slow), self.clips.met(1, fast)
        if meeting[0] == meeting[1] and min(meeting) > 0:
            return
        fitting = [frames for frames in range(1, 65 * slow) if self.clips.met(1, frames) == meeting[0] > 0]
        advice = (
            f"for {slow} slow frames it takes {_span(fitting)} fast ones" if fitting else "no number of frames fits"
        )
        raise ValueError(
            f"x[0] has T = {slow} and x[1] T = {fast}: where the pathways meet these are {meeting[0]} and "
            f"{meeting[1]} frames; {advice}"
        )


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
