"""lateral_concat and its training form. Their backward is that of temporal_conv on a channel slice of the gradient."""

from __future__ import annotations

from torch import Tensor

from ._checks import Conv, check_rows
from ._convolution import convolve, copy_rows
from ._launch import on_device
from ._register import register
from .temporal_conv import conv_normalised, empty_rows, folded


def concat_buffer(slow: Tensor, fast: Tensor, conv: Conv) -> Tensor:
    """The result's buffer with ``slow`` in its first channels; the convolution goes into the rest."""
    channels = slow.shape[1]
    check_rows("slow", slow, (conv.n, channels, conv.t_out, conv.h, conv.w), fast)
    out = empty_rows(fast, (conv.n, channels + conv.k, conv.t_out, conv.h, conv.w))
    copy_rows(slow, out)
    return out


@register
def lateral_concat(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    alpha: int,
    padding: int,
    relu: bool,
    tf32: bool,
) -> Tensor:
    conv = Conv.of(fast, weight, alpha, padding, 1)
    with on_device(fast):
        out = concat_buffer(slow, fast, conv)
        convolve(fast, weight, scale, shift, None, conv, relu, tf32, out, first=slow.shape[1])
    return out


@register
def lateral_concat_bn_frozen(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    alpha: int,
    padding: int,
    eps: float,
    relu: bool,
    tf32: bool,
) -> Tensor:
    conv = Conv.of(fast, weight, alpha, padding, 1)
    with on_device(fast):
        out = concat_buffer(slow, fast, conv)
        scale, shift = folded(fast, conv.k, gamma, beta, running_mean, running_var, eps)
        convolve(fast, weight, scale, shift, None, conv, relu, tf32, out, first=slow.shape[1])
    return out


@register
def lateral_concat_bn(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    alpha: int,
    padding: int,
    eps: float,
    relu: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv = Conv.of(fast, weight, alpha, padding, 1)
    with on_device(fast):
        out = concat_buffer(slow, fast, conv)
        return conv_normalised(fast, weight, gamma, beta, None, conv, eps, relu, tf32, out, first=slow.shape[1])
