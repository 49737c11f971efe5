"""The first convolution of a pathway: few channels, windows in T, H and W (paper table 1, conv1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from ..explanation import note_call
from . import _checks
from ._common import accumulation_dtype, accumulator, autocast, call, define_op, forbid_gradient, register_fake
from ._common import kernel as library_kernel
from ._layout import as_rows, empty_channels_last, places


def stem_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """y = act(conv(x) + shift): the convolution of a SlowFast stem. Stock: nn.Conv3d; oneDNN takes three to five
    times as long for the gradient of the weight where there are eight output channels.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place in any layout. Made for a
            C of 1 to 4; more channels are convolved correctly, but not fast.
        weight: (K, C, kt, kh, kw), of x's dtype, in any layout.
        shift: (K,) in float32 or x's dtype; None stands for 0.
        stride, padding: in T, H and W.
        relu: whether act is ReLU or nothing.

    Under autocast x and weight are cast to the active dtype. Sums are kept in float32 (float64 for float64), those of
    the weight's gradient in float64. The gradient of x is PyTorch's.

    Returns:
        (N, K, T', H', W') with T' = (T + 2 * padding[0] - kt) // stride[0] + 1 and so on, dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. RuntimeError: the backend that was
        asked for cannot run the call. A double backward through the gradient of weight raises too.
    """
    x, weight = autocast(x, weight)
    stride, padding = _check(x, weight, shift, stride, padding, relu)
    choice = choose("stem_conv", x)
    if choice.backend == "reference":
        y = reference.stem_conv(x, weight, shift, stride=stride, padding=padding, relu=relu)
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        op = library_kernel(choice.backend, "stem_conv")
        y = call(op, x, weight, accumulator(shift, x, "shift"), stride, padding, relu)
    note_call("stem_conv", choice, (x,), y)
    return y


def _check(
    x: Tensor, weight: Tensor, shift: Tensor | None, stride: Sequence[int], padding: Sequence[int], relu: bool
) -> tuple[list[int], list[int]]:
    """Returns stride and padding as lists."""
    _checks.activation("x", x)
    why = "K convolutions in T, H and W over the channels of x"
    _checks.weight("weight", weight, x, ("K", x.shape[1], "kt", "kh", "kw"), why)
    _checks.vector("shift", shift, weight)
    _checks.flag("relu", relu)
    strides, paddings = _sizes("stride", stride, 1), _sizes("padding", padding, 0)
    for name, size, window, added in zip("THW", x.shape[2:], weight.shape[2:], paddings, strict=True):
        if size + 2 * added < window:
            raise ValueError(f"x is too small: {name} = {size} with padding {added} has no window of {window}")
    return strides, paddings


def _sizes(name: str, given: Sequence[int], least: int) -> list[int]:
    if not isinstance(given, Sequence) or len(given) != 3:
        raise TypeError(f"{name} must be three ints, for T, H and W; got {given!r}")
    return [_checks.integer(f"{name}[{i}]", size, least) for i, size in enumerate(given)]


# What PyTorch must know of the kernels: the shapes and strides they return, and their gradients.


def _fake(x, weight, shift, stride, padding, relu):
    sizes = map(places, x.shape[2:], weight.shape[2:], stride, padding)
    return empty_channels_last(x, (x.shape[0], weight.shape[0], *sizes))


def _fake_wgrad(grad, x, weight, stride, padding):
    layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last_3d
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, memory_format=layout)


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, stride, padding, relu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output if relu else None)
    ctx.library, ctx.geometry = library, (list(stride), list(padding))


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_shift = ctx.needs_input_grad[:3]
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad = as_rows(grad, "grad")
    dx = dweight = dshift = None
    if need_x:
        only_x = (True, False, False)
        dx, _, _ = torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, *ctx.geometry, [1, 1, 1], False, [0, 0, 0], 1, only_x)
        )
    if need_weight:
        wgrad = getattr(torch.ops, ctx.library).stem_conv_wgrad.default
        dweight = call(wgrad, grad, x, weight, *ctx.geometry)
    if need_shift:
        dshift = grad.sum((0, 2, 3, 4), dtype=accumulation_dtype(x))
    return dx, dweight, dshift, None, None, None


@for_every_library
def _define(library: str) -> None:
    if not hasattr(getattr(torch.ops, library), "stem_conv"):
        return
    define_op(f"{library}::stem_conv", _fake, partial(_save, library), _backward)
    register_fake(f"{library}::stem_conv_wgrad", _fake_wgrad)
    forbid_gradient(
        f"{library}::stem_conv_wgrad",
        "double backward through stem_conv is not supported: its gradients have no gradient",
    )
