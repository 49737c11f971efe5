"""The wide input of a slow stage in inference (paper section 3.4): the slow pathway's last layer and the lateral
convolution, each written into its own channels of one tensor, so that no concatenation is left."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from . import _checks
from ._common import accumulator, allows_tf32, call, define_inference_op
from ._common import kernel as library_kernel
from ._kernels import note
from ._layout import as_dense, as_rows, empty_channels_last, output_shape
from .max_pool import pooled_shape


def temporal_conv_lateral_concat(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    fast: Tensor,
    lateral_weight: Tensor,
    lateral_shift: Tensor | None,
    *,
    alpha: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = True,
    lateral_padding: int | None = None,
    lateral_relu: bool = True,
) -> Tensor:
    """[act(conv(x) + shift + residual), act(conv(fast) + lateral_shift)] along the channels: the last convolution of a
    slow stage and the lateral connection after it, with BatchNorm folded into weights and shifts. Stock: twice
    nn.Conv3d, nn.BatchNorm3d and nn.ReLU, an addition, and torch.cat.

    Args:
        x, weight, shift, residual, stride, padding, dilation, relu: as :func:`temporal_conv` has them, without scale.
        fast, lateral_weight, lateral_shift, alpha, lateral_padding, lateral_relu: as :func:`lateral_concat` has fast,
            weight, shift, alpha, padding and relu; of x's dtype. N, H and W are those of x.

    There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, K + K_lateral, T', H, W), dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. RuntimeError: the backend that was
        asked for cannot run the call.
    """
    padding, shape = _checks.convolution(x, weight, residual, stride, padding, dilation, relu)
    _checks.vector("shift", shift, weight)
    residual = None if residual is None else as_rows(residual, "residual")
    lateral_padding = _checks.lateral(x, shape, fast, lateral_weight, lateral_shift, alpha, lateral_padding)
    _checks.flag("lateral_relu", lateral_relu)
    x, fast = as_rows(x, "x"), as_rows(fast, "fast")
    weight, lateral_weight = as_dense(weight, "weight"), as_dense(lateral_weight, "lateral_weight")
    tf32 = allows_tf32(x)
    choice = choose("temporal_conv_lateral_concat", x, weight, stride, tf32=tf32)
    if choice.backend == "reference":
        out = reference.temporal_conv_lateral_concat(
            *(x, weight, shift, residual, fast, lateral_weight, lateral_shift),
            alpha=alpha,
            stride=stride,
            padding=padding,
            dilation=dilation,
            relu=relu,
            lateral_padding=lateral_padding,
            lateral_relu=lateral_relu,
        ).contiguous(memory_format=torch.channels_last_3d)
    else:
        slow = (x, weight, accumulator(shift, x, "shift"), residual, stride, padding, dilation, relu)
        lateral = (fast, lateral_weight, accumulator(lateral_shift, x, "lateral_shift"))
        op = library_kernel(choice.backend, "temporal_conv_lateral_concat")
        out = call(op, *slow, *lateral, alpha, lateral_padding, lateral_relu, tf32)
    geometry = (stride, padding, dilation)
    note("temporal_conv_lateral_concat", choice, (x, residual, fast), out, x, weight, geometry, tf32)
    return out


def max_pool_lateral_concat(
    x: Tensor,
    fast: Tensor,
    lateral_weight: Tensor,
    lateral_shift: Tensor | None,
    *,
    kernel: int,
    stride: int,
    padding: int = 0,
    alpha: int,
    lateral_padding: int | None = None,
    lateral_relu: bool = True,
) -> Tensor:
    """[max_pool(x), act(conv(fast) + lateral_shift)] along the channels: the pool of the slow stem and the lateral
    connection after it. Stock: nn.MaxPool3d, nn.Conv3d, nn.BatchNorm3d, nn.ReLU and torch.cat.

    Args:
        x, kernel, stride, padding: as :func:`max_pool`.
        fast, lateral_weight, lateral_shift, alpha, lateral_padding, lateral_relu: as
            :func:`temporal_conv_lateral_concat`; H and W are those of the pooled x.

    There is no gradient: one that is asked for raises RuntimeError.

    Returns:
        (N, C + K_lateral, T, H', W'), dense channels_last_3d.

    Raises:
        As :func:`temporal_conv_lateral_concat`.
    """
    _checks.activation("x", x)
    _checks.pool(x, kernel, stride, padding)
    shape = pooled_shape(x, kernel, stride, padding)
    lateral_padding = _checks.lateral(x, shape, fast, lateral_weight, lateral_shift, alpha, lateral_padding)
    _checks.flag("lateral_relu", lateral_relu)
    x, fast, lateral_weight = as_rows(x, "x"), as_rows(fast, "fast"), as_dense(lateral_weight, "lateral_weight")
    tf32 = allows_tf32(x)
    choice = choose("max_pool_lateral_concat", fast, lateral_weight, alpha, tf32=tf32)
    if choice.backend == "reference":
        out = reference.max_pool_lateral_concat(
            *(x, fast, lateral_weight, lateral_shift),
            kernel=kernel,
            stride=stride,
            padding=padding,
            alpha=alpha,
            lateral_padding=lateral_padding,
            lateral_relu=lateral_relu,
        ).contiguous(memory_format=torch.channels_last_3d)
    else:
        lateral = (fast, lateral_weight, accumulator(lateral_shift, x, "lateral_shift"))
        op = library_kernel(choice.backend, "max_pool_lateral_concat")
        out = call(op, x, kernel, stride, padding, *lateral, alpha, lateral_padding, lateral_relu, tf32)
    note(*("max_pool_lateral_concat", choice, (x, fast), out, fast, lateral_weight, (alpha, lateral_padding, 1), tf32))
    return out


def _fake_conv(x, weight, shift, residual, stride, padding, dilation, relu, fast, lateral_weight, *rest):
    n, k, t, h, w = output_shape(x, weight, stride, padding, dilation)
    return empty_channels_last(x, (n, k + lateral_weight.shape[0], t, h, w))


def _fake_pool(x, kernel, stride, padding, fast, lateral_weight, *rest):
    n, c, t, h, w = pooled_shape(x, kernel, stride, padding)
    return empty_channels_last(x, (n, c + lateral_weight.shape[0], t, h, w))


@for_every_library
def _define(library: str) -> None:
    define_inference_op(library, "temporal_conv_lateral_concat", _fake_conv)
    define_inference_op(library, "max_pool_lateral_concat", _fake_pool)
