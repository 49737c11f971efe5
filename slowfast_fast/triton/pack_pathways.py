"""pack_pathways, with the schema of csrc/ops.cpp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import DTYPES, require
from ._launch import Launch, on_device, passes_int32, wrap_triton
from ._register import register

BLOCK = 1024  # values of a program: 8 for each thread of four warps, 16 bytes of a half-precision result


@triton.jit
def normalise_frames(
    frames, slow, fast,
    T, ROWS, LENGTH, f_n, f_t, f_h,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SLOW: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A part of a row of LENGTH values, which are one pixel's three colours after the other. SLOW: the COUNT frames
    that the slow pathway sees, in ascending order."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    blocks = tl.cdiv(LENGTH, BLOCK)
    row = program // blocks
    t = row // ROWS % T
    n = row // (ROWS * T)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < LENGTH
    byte = tl.load(frames + n * f_n + t * f_t + row % ROWS * f_h + column, mask=inside, other=0)
    colour = column % 3
    scale = tl.where(colour == 0, scale_r, tl.where(colour == 1, scale_g, scale_b))
    shift = tl.where(colour == 0, shift_r, tl.where(colour == 1, shift_g, shift_b))
    value = tl.fma(byte.to(tl.float32), scale, shift).to(fast.dtype.element_ty)
    tl.store(fast + row * LENGTH + column, value, mask=inside)
    first = t * 0
    last = t * 0
    for i in tl.static_range(COUNT):
        first += (SLOW[i] < t).to(tl.int32)
        last += (SLOW[i] <= t).to(tl.int32)
    for s in range(first, last):
        tl.store(slow + ((n * COUNT + s) * ROWS + row % ROWS) * LENGTH + column, value, mask=inside)


@register
def pack_pathways(
    frames: Tensor, slow_frames: list[int], scale: list[float], shift: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n, t, h, w, _ = frames.shape
    _check(frames, slow_frames, scale, shift, dtype)
    slow, fast = (
        torch.empty((n, 3, count, h, w), dtype=dtype, device=frames.device, memory_format=torch.channels_last_3d)
        for count in (len(slow_frames), t)
    )
    f_n, f_t, f_h, _, _ = frames.stride()
    # Frames without gaps are one long row each.
    rows, length = (1, h * w * 3) if f_h == 3 * w or h == 1 else (h, w * 3)
    launch = Launch(
        (n * t * rows * triton.cdiv(length, BLOCK),),
        (t, rows, length, f_n, f_t, f_h, *scale, *shift),
        {
            "SLOW": tuple(slow_frames),
            "COUNT": len(slow_frames),
            "BLOCK": BLOCK,
            "WIDE": passes_int32(frames, slow, fast),
        },
        stages=1,
    )
    with on_device(frames):
        launch(wrap_triton(normalise_frames, frames), frames, slow, fast)
    return slow, fast


def _check(frames: Tensor, slow_frames: list[int], scale: list[float], shift: list[float], dtype: torch.dtype) -> None:
    require(
        frames.dtype == torch.uint8 and frames.dim() == 5 and frames.shape[4] == 3,
        f"frames must be (N, T, H, W, 3) of uint8; got {tuple(frames.shape)} of {frames.dtype}",
    )
    adjacent = frames.stride(4) == 1 and (frames.shape[3] == 1 or frames.stride(3) == 3)
    require(adjacent, f"a row of frames must be 3 * W adjacent bytes; got strides {frames.stride()}")
    require(dtype in DTYPES, f"dtype must be float32, float16 or bfloat16; got {dtype}")
    ordered = list(slow_frames) == sorted(slow_frames) and all(0 <= s < frames.shape[1] for s in slow_frames)
    require(ordered, f"slow_frames must be in ascending order and among the {frames.shape[1]} frames")
    require(len(scale) == 3 and len(shift) == 3, "scale and shift must have a value for each colour")
