"""Decoded frames as the normalised input of both pathways, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from ..explanation import note_call, note_copy
from ..pathways import pathway_frames
from . import _checks
from ._common import call, register_fake
from ._common import kernel as library_kernel


def pack_pathways(
    frames: Tensor,
    *,
    alpha: int | None,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
    dtype: torch.dtype | None = None,
    rule: str = "pytorchvideo",
) -> list[Tensor]:
    """What a SlowFast network takes, from the frames of its fast pathway as a decoder leaves them. Stock: uint8 to
    float, / 255, - mean, / std, permute, and PackPathway (pytorchvideo) or pack_pathway_output (PySlowFast).

    Args:
        frames: (N, T, H, W, 3) uint8; N may be 0. Read in place where a row of pixels is 3 * W adjacent bytes: dense
            clips, and slices of them in N, T and H, W (``frames[:, ::2]``, a crop). Anything else is copied once.
        alpha: frames of the fast pathway for one of the slow; None: a network of one pathway, which sees all frames.
        mean, std: of values between 0 and 1; a number, or one for each colour. Defaults: those of Kinetics as the stock
            libraries give them.
        dtype: of the results: float32, float16, bfloat16 or float64. None: the autocast dtype of the device where
            autocast is on, else float32.
        rule: whose slow frames: see :func:`slowfast_fast.pathway_frames`.

    Arithmetic is in float32 (float64 for float64), rounded once to ``dtype``. uint8 has no gradient.

    Returns:
        [slow, fast]: (N, 3, T', H, W) and (N, 3, T, H, W), dense channels_last_3d, fresh memory. [fast] where ``alpha``
        is None.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. RuntimeError: the backend that was
        asked for cannot run the call.
    """
    _check(frames)
    dtype = _dtype(dtype, frames)
    means, stds = _per_colour("mean", mean), _per_colour("std", std)
    if min(stds) <= 0:
        raise ValueError(f"std must be positive; got {std!r}")
    seen = pathway_frames(frames.shape[1], alpha=1 if alpha is None else alpha, rule=rule)[0]
    slow_frames = () if alpha is None else seen
    if not _is_rows(frames):
        note_copy("frames", frames)
        frames = frames.contiguous()
    choice = choose("pack_pathways", frames, dtype=dtype)
    if choice.backend == "reference":
        packed = reference.pack_pathways(frames, slow_frames=slow_frames, mean=means, std=stds, dtype=dtype)
        slow, fast = (clip.contiguous(memory_format=torch.channels_last_3d) for clip in packed)
    else:
        scale = [1 / (255 * s) for s in stds]
        shift = [-m / s for m, s in zip(means, stds, strict=True)]
        slow, fast = call(library_kernel(choice.backend, "pack_pathways"), frames, slow_frames, scale, shift, dtype)
    note_call("pack_pathways", choice, (frames,), fast)
    return [fast] if alpha is None else [slow, fast]


def _check(frames: Tensor) -> None:
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames must be a torch.Tensor; got {type(frames).__name__}")
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, as decoded; got {frames.dtype}")
    shape = tuple(frames.shape)
    if len(shape) != 5 or shape[4] != 3:
        raise ValueError(f"frames must be (N, T, H, W, 3); got shape {shape}")
    if 0 in shape[1:]:
        raise ValueError(f"frames may be empty in N only; got (N, T, H, W, 3) = {shape}")


def _dtype(dtype: torch.dtype | None, frames: Tensor) -> torch.dtype:
    if dtype is None:
        device = frames.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    if dtype not in _checks.DTYPES:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64; got {dtype!r}")
    return dtype


def _per_colour(name: str, value: float | Sequence[float]) -> list[float]:
    values = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be a number, or one for each colour; got {value!r}")
    if len(values) != 3:
        raise ValueError(f"{name} must be a number, or one for each of 3 colours; got {len(values)} values")
    return [float(v) for v in values]


def _is_rows(frames: Tensor) -> bool:
    return frames.stride(4) == 1 and (frames.shape[3] == 1 or frames.stride(3) == 3)


def _fake(frames, slow_frames, scale, shift, dtype):
    n, t, h, w, _ = frames.shape
    return tuple(
        torch.empty((n, 3, count, h, w), dtype=dtype, device=frames.device, memory_format=torch.channels_last_3d)
        for count in (len(slow_frames), t)
    )


@for_every_library
def _define(library: str) -> None:
    register_fake(f"{library}::pack_pathways", _fake)
