"""Lateral connections that only move frames (paper section 3.4, time-to-channel and time-strided sampling), written
straight into the wide input of a slow stage."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from ..explanation import note_call
from . import _checks
from ._common import (
    accumulator,
    allows_tf32,
    autocast,
    call,
    define_inference_op,
    define_op,
    forbid_gradient,
    register_fake,
)
from ._common import kernel as library_kernel
from ._gradients import Gradients
from ._kernels import note
from ._layout import as_dense, as_rows, empty_channels_last, output_shape, places
from .max_pool import pooled_shape


def frames_concat(slow: Tensor, fast: Tensor, *, alpha: int, taps: int) -> Tensor:
    """[slow, fast[:, :, ::alpha], fast[:, :, 1::alpha], ... (taps of them)] along the channels, as one write of the
    result. Stock: slices and torch.cat.

    With taps = 1 that is time-strided sampling, with taps = alpha time-to-channel.

    Args:
        slow: (N, C_slow, T, H, W), of fast's dtype. Read in place where its memory is rows of channels
            (torch.channels_last_3d, or a slice of it in any dimension), else copied once; fast likewise.
        fast: (N, C, T_fast, H, W), float32, float16, bfloat16 or float64; N may be 0.
        alpha: the ratio of the frame rates.
        taps: how many of every alpha frames are taken, from the first on; 1 to alpha.

    Under autocast both are cast to the active dtype.

    Returns:
        (N, C_slow + taps * C, T, H, W), dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above, or (T_fast - taps) // alpha + 1 is not T; the message names
        it. RuntimeError: the backend that was asked for cannot run the call. A double backward raises too.
    """
    slow, fast = autocast(slow, fast)
    _checks.activation("slow", slow)
    _check_frames("slow", slow, tuple(slow.shape), fast, alpha, taps)
    slow, fast = as_rows(slow, "slow"), as_rows(fast, "fast")
    choice = choose("frames_concat", fast)
    if choice.backend == "reference":
        out = reference.frames_concat(slow, fast, alpha=alpha, taps=taps)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        out = call(library_kernel(choice.backend, "frames_concat"), slow, fast, alpha, taps)
    note_call("frames_concat", choice, (slow, fast), out)
    return out


def temporal_conv_frames_concat(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    fast: Tensor,
    *,
    alpha: int,
    taps: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """:func:`frames_concat` with act(conv(x) + shift + residual) as slow, for inference: the last convolution of a slow
    stage writes into the wide tensor, too.

    Args:
        x, weight, shift, residual, stride, padding, dilation, relu: as :func:`temporal_conv` has them, without scale.
        fast, alpha, taps: as :func:`frames_concat`; of x's dtype.

    There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, K + taps * C, T', H, W), dense channels_last_3d.

    Raises:
        As :func:`temporal_conv` and :func:`frames_concat`.
    """
    padding, shape = _checks.convolution(x, weight, residual, stride, padding, dilation, relu)
    _checks.vector("shift", shift, weight)
    residual = None if residual is None else as_rows(residual, "residual")
    _check_frames("x", x, shape, fast, alpha, taps)
    x, fast, weight = as_rows(x, "x"), as_rows(fast, "fast"), as_dense(weight, "weight")
    tf32 = allows_tf32(x)
    choice = choose("temporal_conv_frames_concat", x, weight, stride, tf32=tf32)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "relu": relu}
    if choice.backend == "reference":
        conv = (x, weight, shift, residual)
        out = reference.temporal_conv_frames_concat(*conv, fast, alpha=alpha, taps=taps, **geometry)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        conv = (x, weight, accumulator(shift, x, "shift"), residual)
        op = library_kernel(choice.backend, "temporal_conv_frames_concat")
        out = call(op, *conv, *geometry.values(), fast, alpha, taps, tf32)
    places_of = (stride, padding, dilation)
    note("temporal_conv_frames_concat", choice, (x, residual, fast), out, x, weight, places_of, tf32)
    return out


def max_pool_frames_concat(
    x: Tensor, fast: Tensor, *, kernel: int, stride: int, padding: int = 0, alpha: int, taps: int
) -> Tensor:
    """:func:`frames_concat` with :func:`max_pool` of x as slow, for inference: behind the stems.

    Args:
        x, kernel, stride, padding: as :func:`max_pool`.
        fast, alpha, taps: as :func:`frames_concat`; of x's dtype, H and W those of the pooled x.

    There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, C + taps * C_fast, T, H', W'), dense channels_last_3d.

    Raises:
        As :func:`max_pool` and :func:`frames_concat`.
    """
    _checks.activation("x", x)
    _checks.pool(x, kernel, stride, padding)
    _check_frames("x", x, pooled_shape(x, kernel, stride, padding), fast, alpha, taps)
    x, fast = as_rows(x, "x"), as_rows(fast, "fast")
    choice = choose("max_pool_frames_concat", x)
    if choice.backend == "reference":
        window = {"kernel": kernel, "stride": stride, "padding": padding}
        out = reference.max_pool_frames_concat(x, fast, **window, alpha=alpha, taps=taps)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        op = library_kernel(choice.backend, "max_pool_frames_concat")
        out = call(op, x, kernel, stride, padding, fast, alpha, taps)
    note_call("max_pool_frames_concat", choice, (x, fast), out)
    return out


def _check_frames(name: str, first: Tensor, slow: tuple[int, ...], fast: Tensor, alpha: int, taps: int) -> None:
    """``slow``: the shape of the slow pathway's channels, which ``first``, the argument ``name``, is or gives."""
    _checks.activation("fast", fast)
    if fast.dtype != first.dtype or fast.device != first.device:
        raise TypeError(
            f"fast must have the dtype and the device of {name}, {first.dtype} on {first.device}; got {fast.dtype} on "
            f"{fast.device}"
        )
    _checks.integer("alpha", alpha, 1)
    _checks.integer("taps", taps, 1)
    if taps > alpha:
        raise ValueError(f"taps must be at most alpha, {alpha}; got {taps}")
    if (fast.shape[0], *fast.shape[3:]) != (slow[0], *slow[3:]):
        raise ValueError(
            f"the pathways must agree in N, H and W; got {(slow[0], *slow[3:])} and, of fast, "
            f"{(fast.shape[0], *fast.shape[3:])}"
        )
    frames = places(fast.shape[2], taps, alpha, 0, 1)
    if frames != slow[2]:
        raise ValueError(
            f"slow has T = {slow[2]} and fast T = {fast.shape[2]}, of which alpha = {alpha} and taps = {taps} make "
            f"{frames}"
        )


# What PyTorch must know of the kernels.


def _wide(x: Tensor, slow: tuple[int, ...], fast: Tensor, taps: int) -> Tensor:
    return empty_channels_last(x, (slow[0], slow[1] + taps * fast.shape[1], *slow[2:]))


def _fake(slow, fast, alpha, taps):
    return _wide(slow, tuple(slow.shape), fast, taps)


def _fake_backward(grad, t_fast, alpha, taps):
    n, channels, _, h, w = grad.shape
    return empty_channels_last(grad, (n, channels // taps, t_fast, h, w))


def _fake_conv(x, weight, shift, residual, stride, padding, dilation, relu, fast, alpha, taps, tf32):
    return _wide(x, output_shape(x, weight, stride, padding, dilation), fast, taps)


def _fake_pool(x, kernel, stride, padding, fast, alpha, taps):
    return _wide(x, pooled_shape(x, kernel, stride, padding), fast, taps)


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    slow, fast, alpha, taps = inputs
    ctx.set_materialize_grads(False)
    ctx.slow_channels, ctx.frames, ctx.geometry, ctx.library = slow.shape[1], fast.shape[2], (alpha, taps), library


def _backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 4
    grad = as_rows(grad, "grad")
    need_slow, need_fast = ctx.needs_input_grad[:2]
    of_slow, of_fast = grad[:, : ctx.slow_channels], grad[:, ctx.slow_channels :]
    backward = getattr(torch.ops, ctx.library).frames_concat_backward.default
    return (
        of_slow if need_slow else None,
        call(backward, of_fast, ctx.frames, *ctx.geometry) if need_fast else None,
        None,
        None,
    )


@for_every_library
def _define(library: str) -> None:
    define_op(f"{library}::frames_concat", _fake, partial(_save, library), _backward)
    register_fake(f"{library}::frames_concat_backward", _fake_backward)
    problem = "double backward through frames_concat is not supported: its gradient has no gradient"
    forbid_gradient(f"{library}::frames_concat_backward", problem)
    define_inference_op(library, "temporal_conv_frames_concat", _fake_conv)
    define_inference_op(library, "max_pool_frames_concat", _fake_pool)
