"""Max pooling over H and W, without the indices that stock keeps for a backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from ..explanation import note_call
from . import _checks
from ._common import call, define_inference_op
from ._common import kernel as library_kernel
from ._layout import as_rows, empty_channels_last, places


def max_pool(x: Tensor, *, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """The max over kernel x kernel windows of every frame: the pool of a SlowFast stem, for inference. Stock:
    nn.MaxPool3d with kernel (1, kernel, kernel).

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows
            of channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        kernel, stride, padding: in H and in W; padding at most half of the kernel, and never the maximum.

    A NaN in a window is its maximum, as in torch. There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, C, T, H', W') with H' = (H + 2 * padding - kernel) // stride + 1, dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. RuntimeError: the backend that was
        asked for cannot run the call.
    """
    _checks.activation("x", x)
    _checks.pool(x, kernel, stride, padding)
    x = as_rows(x, "x")
    choice = choose("max_pool", x)
    if choice.backend == "reference":
        y = reference.max_pool(x, kernel=kernel, stride=stride, padding=padding)
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        y = call(library_kernel(choice.backend, "max_pool"), x, kernel, stride, padding)
    note_call("max_pool", choice, (x,), y)
    return y


def pooled_shape(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    n, c, t, h, w = x.shape
    return (n, c, t, *(places(size, kernel, stride, padding) for size in (h, w)))


def _fake(x, kernel, stride, padding):
    return empty_channels_last(x, pooled_shape(x, kernel, stride, padding))


@for_every_library
def _define(library: str) -> None:
    define_inference_op(library, "max_pool", _fake)
