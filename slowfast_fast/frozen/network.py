"""The frozen network: frozen blocks in a row behind the checks of what is given to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..explanation import recording
from ..ops._layout import as_rows, places
from .graphs import CudaGraphs

# Clips that the CPU takes at a time: enough work for its cores, and no more activations than these have.
MOST_CLIPS = 4


@dataclass(frozen=True)
class Clips:
    """What a network takes: channels of each pathway's clip, and how its frames relate.

    ``frames`` has for each pathway the (kernel, stride, padding, dilation) in T of the layers between its clip and
    the first lateral connection, that of the fast pathway with the lateral convolution last; empty where nothing
    relates the pathways' frames.
    """

    channels: tuple[int, ...]
    alone: bool = False  # one clip by itself, not a list
    frames: tuple[tuple[tuple[int, int, int, int], ...], ...] = ()

    def met(self, pathway: int, frames: int) -> int:
        """Frames of a pathway where it meets the others."""
        for kernel, stride, padding, dilation in self.frames[pathway]:
            frames = places(frames, kernel, stride, padding, dilation)
        return frames


class FrozenNetwork(nn.Module):
    """What :func:`slowfast_fast.freeze` returns: a network for inference, with the call of the original.

    It has no gradient and no training mode, takes clips of its ``dtype`` on its device, and ignores autocast. Its
    ``state_dict`` holds the folded weights: ``load_state_dict`` takes that of another network frozen from the same
    architecture to the same dtype. ``to(device)`` moves it; weights are prepared anew, for the new device, at the next
    call of each shape of clips.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], head: nn.Module | None, clips: Clips, dtype: torch.dtype, cuda_graph: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.detection_head = head  # takes features and what is given beside the clips
        self.clips = clips
        self.dtype = dtype
        self.cuda_graph = cuda_graph
        self._graphs = CudaGraphs(self._run_flat) if cuda_graph else None
        super().train(False)

    def forward(self, x: Sequence[Tensor] | Tensor, *others: Tensor) -> Any:
        """[slow (N, C, T, H, W), fast (N, C, alpha * T, H, W)] -> logits (N, classes), dtype in and out. A network of
        one pathway takes its clip alone.

        explain() sees the layers of a call without a CUDA graph.

        ``others``: what a detection network takes beside the clips.

        Raises TypeError or ValueError for a clip that the network does not take.
        """
        x = self._checked(x)
        if torch.compiler.is_compiling():
            return self._run(list(x), others)
        with torch.no_grad(), torch.autocast(x[0].device.type, enabled=False):
            if self._graphs is not None and not recording():
                return self._graphs([*x, *others])
            if x[0].device.type == "cpu" and len(x[0]) > MOST_CLIPS and not others and self.detection_head is None:
                return self._run_in_turn(x)
            return self._run(list(x), others)

    def _run_in_turn(self, x: Sequence[Tensor]) -> Any:
        """A large batch on the CPU, MOST_CLIPS clips after the others."""
        result: Any = None
        for first in range(0, len(x[0]), MOST_CLIPS):
            part = self._run([clip[first : first + MOST_CLIPS] for clip in x], ())
            if not isinstance(part, Tensor) or len(part) != len(x[0][first : first + MOST_CLIPS]):
                return self._run(list(x), ())  # the head does not give a row a clip
            if result is None:
                result = part.new_empty((len(x[0]), *part.shape[1:]))
            result[first : first + MOST_CLIPS].copy_(part)
        return result

    def _run(self, x: list[Tensor], others: Sequence[Tensor]) -> Any:
        out: Any = as_rows(x[0], "x") if self.clips.alone else x
        for block in self.blocks:
            out = block(out)
        return out if self.detection_head is None else self.detection_head(out, *others).flatten(1)

    def _run_flat(self, tensors: list[Tensor]) -> Any:
        pathways = len(self.clips.channels)
        return self._run(tensors[:pathways], tensors[pathways:])

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Only ``train(False)``: a frozen network has nothing to train. Raises RuntimeError else."""
        if mode:
            raise RuntimeError(
                "a frozen network cannot train: its BatchNorm is folded into the weights. Train the model that it was "
                "made from, and call slowfast_fast.freeze on that again"
            )
        return super().train(False)

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
            if clip.dim() != 5 or clip.shape[1] != channels:
                raise ValueError(f"{said} must be (N, {channels}, T, H, W); got shape {tuple(clip.shape)}")
            if clip.dtype != self.dtype:
                raise TypeError(
                    f"{said} must be {self.dtype}, for which the network was frozen; got {clip.dtype}: convert the "
                    f"clip, or freeze the model with dtype={clip.dtype}"
                )
            if clip.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{said} must not require a gradient, which a frozen network does not have: detach it, or take "
                    "the model that was frozen"
                )
            self._check_agreement(said, clip, x[0])
        self._check_frames(x, names)
        return x

    def _check_agreement(self, said: str, clip: Tensor, first: Tensor) -> None:
        if (clip.shape[0], *clip.shape[3:]) != (first.shape[0], *first.shape[3:]):
            raise ValueError(
                f"{said} must have N, H and W of x[0], {(first.shape[0], *first.shape[3:])}; "
                f"got {(clip.shape[0], *clip.shape[3:])}"
            )
        device = next(self.buffers()).device
        if clip.device != device:
            raise ValueError(f"{said} must be on {device}, as the network is; got {clip.device}: move one of them")

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

    def _forget(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenNetwork:
        self._forget()
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; what was prepared from the weights before is forgotten."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = CudaGraphs(self._run_flat) if self.cuda_graph else None


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
