"""Which frames of a clip each pathway sees, by the rule of a library."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

# pytorchvideo's PackPathway and PySlowFast's pack_pathway_output are one rule.
RULES = ("pytorchvideo", "pyslowfast", "mmaction2", "gluoncv", "r1c7")
Frames = tuple[int, ...]


def pathway_frames(
    frames: int, *, alpha: int, tau: int | None = None, rule: str = "pytorchvideo"
) -> tuple[Frames, Frames]:
    """The frames of a clip that the slow and the fast pathway see (paper, section 3), in ascending order.

    Args:
        frames: T of the clip.
        alpha: how many frames the fast pathway sees for one of the slow pathway's.
        tau: the stride of the slow pathway over the clip, a multiple of alpha. None: alpha, which makes the clip that
            of the fast pathway.
        rule: what a library does. With s = tau // alpha:

            - ``"pytorchvideo"`` (PackPathway, UniformTemporalSubsample) and ``"pyslowfast"`` (pack_pathway_output):
              the fast pathway T // s frames from the first to the last, evenly, and the slow one so among these:
              linspace, rounded down.
            - ``"mmaction2"`` (ResNet3dSlowFast): F.interpolate, nearest, by 1 / s and by 1 / tau.
            - ``"gluoncv"``, ``"r1c7"``: slices, [::s] and [::tau]. gluoncv's network takes the fast pathway's clip
              (tau = alpha), r1c7's 64 frames (tau = 16, alpha = 8).

    Returns:
        (slow, fast), indices of frames.

    Raises:
        TypeError, ValueError: an argument is not as above, or the clip is too short for one slow frame.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    tau = alpha if tau is None else tau
    for name, value in (("frames", frames), ("alpha", alpha), ("tau", tau)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if tau % alpha != 0:
        raise ValueError(f"tau must be a multiple of alpha = {alpha}; got {tau}")
    slow, fast = _frames(int(frames), int(alpha), int(tau), rule)
    if not slow:
        raise ValueError(f"the clip is too short: {frames} frames give the slow pathway none with tau = {tau} ({rule})")
    return slow, fast


def _frames(frames: int, alpha: int, tau: int, rule: str) -> tuple[Frames, Frames]:
    return _known_frames(frames, alpha, tau, rule)


# torch.compile evaluates this when it traces and keeps the result; what assume_constant_result does, which would import
# the whole compiler with the package.
_frames._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _known_frames(frames: int, alpha: int, tau: int, rule: str) -> tuple[Frames, Frames]:
    step = tau // alpha
    if rule in ("pytorchvideo", "pyslowfast"):
        fast = _evenly(frames, frames // step) if step > 1 else tuple(range(frames))
        return tuple(fast[i] for i in _evenly(len(fast), len(fast) // alpha)), fast
    if rule == "mmaction2":
        return _nearest(frames, tau), _nearest(frames, step)
    return tuple(range(0, frames, tau)), tuple(range(0, frames, step))


def _evenly(frames: int, count: int) -> Frames:
    # PyTorch's own linspace, on the CPU: where its float32 comes out below a whole number, so does the libraries'.
    return tuple(torch.linspace(0, frames - 1, count, device="cpu").long().tolist())


def _nearest(frames: int, step: int) -> Frames:
    if frames < step:  # F.interpolate raises
        return ()
    clip = torch.arange(frames, dtype=torch.float64, device="cpu").view(1, 1, frames, 1, 1)
    return tuple(F.interpolate(clip, scale_factor=(1.0 / step, 1.0, 1.0), mode="nearest").long().flatten().tolist())
