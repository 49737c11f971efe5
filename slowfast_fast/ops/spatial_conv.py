"""The spatial convolution (1 x 3 x 3) of a bottleneck with what follows it, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from ..explanation import note_call
from . import _checks
from ._common import accumulator, autocast, call, define_inference_op, kernel
from ._layout import as_rows, empty_channels_last

# What the op computes: kernel, stride, padding and dilation in (T, H, W) of an nn.Conv3d.
SPATIAL_GEOMETRY = ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1))
# Channels on both sides from which it is faster than oneDNN on the CPU.
SPATIAL_FROM = 32


def sums_few(x: Tensor) -> bool:
    """Whether a convolution of ``x`` sums so few values that Winograd's error could pass twice that of the sum: it is
    twice that with one channel, 1.5 times with two, the same with six and a third with 512; small images have fewer."""
    _, c, _, h, w = x.shape
    return c < 27 and c * min(h, 3) * min(w, 3) < 27  # by c alone wherever that tells: a graph may leave h and w open


def spatial_conv(
    x: Tensor, weight: Tensor, shift: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """y = act(conv(x) + shift + residual): the 1 x 3 x 3 convolution of a SlowFast bottleneck (table 1 of the paper) at
    stride 1, its BatchNorm folded. Stock: nn.Conv3d with kernel (1, 3, 3) and padding (0, 1, 1), then ReLU.

    On the CPU by Winograd's F(2 x 2, 3 x 3) (Lavin & Gray, CVPR 2016): 16 products where the sum has 36, of inputs and
    weights that additions have transformed. Rounding stays at the level of PyTorch's own. What is not finite in x
    reaches the results that it reaches in stock, where an infinity may become a NaN. Where there are fewer than 27
    values to sum, PyTorch's convolution is taken.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows
            of channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        weight: (K, C, 1, 3, 3) of x's dtype, in any layout.
        shift: (K,) in float32 or x's dtype.
        residual: (N, K, T, H, W) of x's dtype, added before the ReLU; read as x is.
        relu: whether act is ReLU or nothing.

    Under autocast x, weight and residual are cast to the active dtype. Sums are kept in float32 (float64 for float64).
    There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, K, T, H, W), dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. RuntimeError: the backend that was
        asked for cannot run the call.
    """
    x, weight, residual = autocast(x, weight, residual)
    _checks.activation("x", x)
    _checks.weight("weight", weight, x, ("K", x.shape[1], 1, 3, 3), "with the C of x")
    _checks.flag("relu", relu)
    if shift is not None:
        _checks.vector("shift", shift, weight)
    if residual is not None:
        _checks.output_like("residual", residual, (x.shape[0], weight.shape[0], *x.shape[2:]), x)
        residual = as_rows(residual, "residual")
    x = as_rows(x, "x")
    choice = choose("spatial_conv", x)
    few = choice.backend != "reference" and sums_few(x)
    if few:
        why = "PyTorch's convolution: of so few values transforms would round more than the sum itself"
        choice = choice._replace(reason=f"{choice.reason}; {why}")
    if few or choice.backend == "reference":
        y = reference.spatial_conv(x, weight, shift, residual, relu=relu)
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        op = kernel(choice.backend, "spatial_conv")
        y = call(op, x, weight, accumulator(shift, x, "shift"), residual, relu)
    note_call("spatial_conv", choice, (x, residual), y)
    return y


def _fake(x, weight, *_):
    return empty_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


@for_every_library
def _define(library: str) -> None:
    define_inference_op(library, "spatial_conv", _fake)
