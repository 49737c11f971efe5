"""frames_concat and its backward, with the schemas of csrc/ops.cpp."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._checks import DTYPES, check_rows, require
from ._configs import Config, row_tile
from ._convolution import copy_rows, planned
from ._device import row_offset, tile_rows
from ._launch import Launch, common_unit, geometry, in_units, on_device, passes_int32, strides, wrap_triton
from ._register import register
from .temporal_conv import empty_rows


@triton.jit
def move_frames(
    fast, wide,
    N, T, P, T_FAST, T_WIDE, f_n, f_t, f_p, w_n, w_t, w_p,
    C: tl.constexpr, FIRST: tl.constexpr, ALPHA: tl.constexpr, TAPS: tl.constexpr, SLOTS: tl.constexpr,
    BACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Channel FIRST + tap * C + c of frame t of ``wide`` is channel c of frame ALPHA * t + tap of ``fast``.

    A tile goes along the rows of ``wide``, where the frames of a group of ALPHA lie side by side. Forward, from fast to
    wide, it covers TAPS slots and T_WIDE frames. BACK, from wide to fast, it covers whole groups (SLOTS = ALPHA) and as
    many as fast has (T, rounded up), and what nobody took gets 0.
    """
    K_TILES: tl.constexpr = (SLOTS * C + BN - 1) // BN
    k = (tl.program_id(0) % K_TILES * BN + tl.arange(0, BN))[None, :]
    n, t, p, valid = tile_rows(tl.program_id(0) // K_TILES, N, T, P, BM, 1, WIDE)
    frame = ALPHA * t[:, None] + k // C
    inside = valid[:, None] & (k < SLOTS * C) & (frame < T_FAST)
    of_fast = fast + row_offset(n[:, None], frame, p[:, None], f_n, f_t, f_p, UNIT) + k % C
    of_wide = wide + row_offset(n, t, p, w_n, w_t, w_p, UNIT)[:, None] + FIRST + k
    if BACK:
        taken = inside & (k < TAPS * C) & (t < T_WIDE)[:, None]
        tl.store(of_fast, tl.load(of_wide, mask=taken, other=0.0), mask=inside)
    else:
        tl.store(of_wide, tl.load(of_fast, mask=inside, other=0.0), mask=inside)


def _move(fast: Tensor, wide: Tensor, first: int, alpha: int, taps: int, back: bool) -> None:
    kernel = wrap_triton(move_frames, fast)
    n, c, t_fast, h, w = fast.shape
    t_wide = wide.shape[2]
    frames, slots = (triton.cdiv(t_fast, alpha), alpha) if back else (t_wide, taps)

    def build(config: Config) -> Launch:
        of_rows = strides(fast), strides(wide)
        unit = common_unit(*of_rows)
        return Launch(
            (triton.cdiv(n * frames * h * w, config.bm) * triton.cdiv(slots * c, config.bn),),
            (n, frames, h * w, t_fast, t_wide, *in_units(unit, *of_rows)),
            {
                **{"C": c, "FIRST": first, "ALPHA": alpha, "TAPS": taps, "SLOTS": slots, "BACK": back},
                **{"BM": config.bm, "BN": config.bn, "UNIT": unit, "WIDE": passes_int32(fast, wide)},
            },
            config.warps,
        )

    bm, bn = row_tile(slots * c)
    key = ("frames", geometry(fast), geometry(wide), first, alpha, taps, back)
    planned(
        kernel, key, fast.device, lambda: [Config(bm, bn, 0, 8, 1)], build, lambda launch: launch(kernel, fast, wide)
    )


@register
def frames_concat(slow: Tensor, fast: Tensor, alpha: int, taps: int) -> Tensor:
    n, c, _, h, w = fast.shape
    channels, frames = slow.shape[1:3]
    _check("fast", fast, alpha, taps, frames)
    check_rows("slow", slow, (n, channels, frames, h, w), fast)
    with on_device(fast):
        out = empty_rows(fast, (n, channels + taps * c, frames, h, w))
        copy_rows(slow, out)
        _move(fast, out, channels, alpha, taps, back=False)
    return out


@register
def frames_concat_backward(grad: Tensor, t_fast: int, alpha: int, taps: int) -> Tensor:
    n, channels, frames, h, w = grad.shape
    require(taps >= 1 and channels % taps == 0, f"grad must have {taps} times the channels of fast; got {channels}")
    with on_device(grad):
        dfast = empty_rows(grad, (n, channels // taps, t_fast, h, w))
        _check("grad", grad, alpha, taps, frames, t_fast)
        _move(dfast, grad, 0, alpha, taps, back=True)
    return dfast


def _check(name: str, rows: Tensor, alpha: int, taps: int, frames: int, t_fast: int | None = None) -> None:
    """``rows`` is fast, or the gradient of its channels in the result; ``frames`` those of the slow pathway."""
    require(rows.dtype in DTYPES, f"{name} must be float32, float16 or bfloat16; got {rows.dtype}")
    check_rows(name, rows, tuple(rows.shape), rows)
    require(1 <= taps <= alpha, f"taps must be from 1 to alpha, {alpha}; got {taps}")
    t_fast = rows.shape[2] if t_fast is None else t_fast
    given = (t_fast - taps) // alpha + 1
    require(given == frames, f"{t_fast} fast frames give {given} of the slow pathway, which has {frames}")
