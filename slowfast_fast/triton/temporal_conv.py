"""temporal_conv, its training form with BatchNorm and their backwards, with the schemas of csrc/ops.cpp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton import cdiv

from ._checks import Conv, check_vector
from ._convolution import Statistics, convolve, normalise_rows
from ._forward import fold_statistics, move_running_statistics
from ._gradients import OutputGradient, backward
from ._launch import Launch, on_device, wrap_triton
from ._register import register

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_rows(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


@register
def temporal_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
    tf32: bool,
) -> Tensor:
    conv = Conv.of(x, weight, stride, padding, dilation)
    y = empty_rows(x, conv.output)
    with on_device(x):
        convolve(x, weight, scale, shift, residual, conv, relu, tf32, y)
    return y


@register
def temporal_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    y: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
    need_shift: bool,
    need_residual: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv = Conv.of(x, weight, stride, padding, dilation)
    gradient = OutputGradient(grad, y, None, scale, None, None, None, relu=y is not None)
    with on_device(x):
        return backward(gradient, x, weight, conv, tf32, need_x, need_weight, need_scale, need_shift, need_residual)


def conv_normalised(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    conv: Conv,
    eps: float,
    relu: bool,
    tf32: bool,
    y: Tensor,
    first: int = 0,
) -> Five:
    """Convolution with batch statistics into a raw tensor, then the normalised result into y[:, first : first + K].
    Returns (y, raw, mean, invstd, unbiased_var)."""
    raw = empty_rows(x, conv.output)
    mean, invstd, unbiased_var = (x.new_empty(conv.k, dtype=torch.float32) for _ in range(3))
    convolve(
        x, weight, None, None, None, conv, False, tf32, raw, statistics=Statistics(mean, invstd, unbiased_var, eps)
    )
    normalise_rows(raw, mean, invstd, gamma, beta, residual, relu, y, first)
    return y, raw, mean, invstd, unbiased_var


@register
def temporal_conv_bn(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    eps: float,
    relu: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv = Conv.of(x, weight, stride, padding, dilation)
    with on_device(x):
        return conv_normalised(x, weight, gamma, beta, residual, conv, eps, relu, tf32, empty_rows(x, conv.output))


def folded(
    x: Tensor, k: int, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift that apply the statistics."""
    for name, vector in (("gamma", gamma), ("beta", beta), ("running_mean", mean), ("running_var", var)):
        check_vector(name, vector, k, x)
    scale, shift = (x.new_empty(k, dtype=torch.float32) for _ in range(2))
    launch = _fold_launch(x.device, k, gamma is not None, beta is not None, eps)
    given = (mean if vector is None else vector for vector in (gamma, beta))
    launch(wrap_triton(fold_statistics, mean), mean, var, *given, scale, shift)
    return scale, shift


@functools.cache
def _fold_launch(device: torch.device, k: int, has_gamma: bool, has_beta: bool, eps: float) -> Launch:
    return Launch((cdiv(k, 256),), (eps,), {"K": k, "HAS_GAMMA": has_gamma, "HAS_BETA": has_beta, "BN": 256})


@register
def temporal_conv_bn_frozen(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    eps: float,
    relu: bool,
    tf32: bool,
) -> Tensor:
    conv = Conv.of(x, weight, stride, padding, dilation)
    y = empty_rows(x, conv.output)
    with on_device(x):
        scale, shift = folded(x, conv.k, gamma, beta, running_mean, running_var, eps)
        convolve(x, weight, scale, shift, residual, conv, relu, tf32, y)
    return y


@register
def temporal_conv_bn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
    need_x: bool,
    need_weight: bool,
    need_gamma: bool,
    need_beta: bool,
    need_residual: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv = Conv.of(x, weight, stride, padding, dilation)
    gradient = OutputGradient(grad, raw, residual, gamma, mean, invstd, beta, relu)
    with on_device(x):
        return backward(gradient, x, weight, conv, tf32, need_x, need_weight, need_gamma, need_beta, need_residual)


@register(mutates=("running_mean", "running_var", "num_batches_tracked"))
def update_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    unbiased_var: Tensor,
    momentum: float | None,
) -> None:
    tensors = (running_mean, running_var, num_batches_tracked)
    dtypes = (None if tensor is None else tensor.dtype for tensor in tensors[:2])
    launch = _running_launch(mean.device, mean.shape[0], *dtypes, num_batches_tracked is not None, momentum)
    with on_device(mean):
        launch(
            wrap_triton(move_running_statistics, mean),
            *(mean if tensor is None else tensor for tensor in tensors),
            mean,
            unbiased_var,
        )


@functools.cache
def _running_launch(
    device: torch.device,
    k: int,
    of_mean: torch.dtype | None,
    of_var: torch.dtype | None,
    counts: bool,
    momentum: float | None,
) -> Launch:
    return Launch(
        (1,),
        (0.0 if momentum is None else momentum,),
        {
            **{"K": k, "HAS_MEAN": of_mean is not None, "HAS_VAR": of_var is not None, "COUNTS": counts},
            **{"CUMULATIVE": momentum is None, "BN": 1024},
        },
    )
