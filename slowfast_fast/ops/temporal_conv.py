"""Temporal convolution (kt x 1 x 1) with what follows it in a SlowFast bottleneck: BatchNorm, residual, ReLU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose
from . import _checks
from ._batch_norm import BatchNorm
from ._common import (
    accumulator,
    allows_tf32,
    autocast,
    backward_library,
    call,
    define_frozen,
    define_op,
    frozen_kernel,
    kernel,
    register_fake,
    wants_gradient,
)
from ._gradients import Gradients, affine_gradients, batch_norm_gradients, empty_vector
from ._kernels import note
from ._layout import as_dense, as_rows, empty_channels_last, output_shape
from ._repeat import Plan, Signature, call_planned, look_up, remember


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = False,
) -> Tensor:
    """y = act(scale * conv(x) + shift + residual): the convolution of a SlowFast bottleneck's first layer, or of its
    shortcut, with inference-mode BatchNorm as scale and shift. Stock: nn.Conv3d (no bias), nn.BatchNorm3d, an
    addition and nn.ReLU.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows
            of channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        weight: (K, C, kt, 1, 1), of x's dtype.
        scale, shift: (K,) in float32 or x's dtype; None stands for 1 and 0.
        residual: (N, K, T', H, W), of x's dtype, added before the ReLU.
        stride, padding, dilation: in T. padding None means kt // 2, for odd kt only.
        relu: whether act is ReLU or nothing.

    Under autocast x, weight and residual are cast to the active dtype. Sums are kept in float32 (float64 for float64).

    Returns:
        (N, K, T', H, W) with T' = (T + 2 * padding - dilation * (kt - 1) - 1) // stride + 1, dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: the backend that was asked for cannot run the call. A double backward raises too.
    """
    x, weight, residual = autocast(x, weight, residual)
    key, plan = look_up("temporal_conv", (stride, padding, dilation, relu), (x, weight, residual), (scale, shift))
    if plan is not None:
        op, _, pad, tf32 = plan
        try:
            return call_planned(op, x, weight, scale, shift, residual, stride, pad, dilation, relu, tf32)
        except RuntimeError:
            pass  # the long way says what is wrong
    padding, _ = _checks.convolution(x, weight, residual, stride, padding, dilation, relu)
    _checks.vector("scale", scale, weight)
    _checks.vector("shift", shift, weight)
    return _affine(x, weight, scale, shift, residual, (stride, padding, dilation), relu, key)


def temporal_conv_bn(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training: bool,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    relu: bool = False,
) -> Tensor:
    """y = act(batch_norm(conv(x)) + residual), BatchNorm as nn.BatchNorm3d (Ioffe and Szegedy 2015, algorithm 1).

    With ``training``, or without running statistics, the statistics are the batch's, gathered by the convolution
    itself; running statistics are then updated in place, the variance unbiased, and num_batches_tracked incremented.
    Otherwise the running ones are folded into a scale and a shift.

    Args:
        x, weight, residual, stride, padding, dilation, relu: as :func:`temporal_conv`.
        gamma, beta: (K,) in float32 or x's dtype; None stands for 1 and 0.
        running_mean, running_var: (K,) in float32 or x's dtype, both or none.
        num_batches_tracked: one int64, or None.
        momentum: weight of the batch in the running statistics; None: a cumulative average over num_batches_tracked
            batches.
        eps: added to the variance.
        training: which statistics, as above.

    Returns:
        As :func:`temporal_conv`.

    Raises:
        As :func:`temporal_conv`, and ValueError when batch statistics are asked of a single value per channel.
    """
    x, weight, residual = autocast(x, weight, residual)
    statistics = (gamma, beta, running_mean, running_var, num_batches_tracked)
    options = (stride, padding, dilation, relu, momentum, eps, training)
    key, plan = look_up("temporal_conv_bn", options, (x, weight, residual), statistics)
    if plan is not None:
        op, backend, pad, tf32 = plan
        try:
            if training or running_mean is None:
                results = call_planned(op, x, weight, gamma, beta, residual, stride, pad, dilation, eps, relu, tf32)
                bn = BatchNorm(*statistics, momentum, eps, training)
                return bn.update_running_stats(backend, results)
            if not wants_gradient(x, weight, gamma, beta, residual):
                mean, var = running_mean, running_var
                return call_planned(
                    op, x, weight, gamma, beta, mean, var, residual, stride, pad, dilation, eps, relu, tf32
                )
        except RuntimeError:
            pass  # the long way says what is wrong
    bn = BatchNorm(*statistics, momentum, eps, training)
    padding, shape = _checks.convolution(x, weight, residual, stride, padding, dilation, relu)
    bn.check(weight, shape)
    geometry = (stride, padding, dilation)
    if bn.of_batch():
        return _normalised(x, weight, bn, residual, geometry, relu, key)
    return _frozen(x, weight, bn, residual, geometry, relu, key)


def _lay_out(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    residual = None if residual is None else as_rows(residual, "residual")
    return as_rows(x, "x"), as_dense(weight, "weight"), residual


# The ops on checked arguments, the long way; what a call like this one can skip is kept under ``key``.


def _affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: tuple[int, int, int],
    relu: bool,
    key: Signature | None,
) -> Tensor:
    given = (x, weight, scale, shift, residual)
    x, weight, residual = _lay_out(x, weight, residual)
    tf32 = allows_tf32(x)
    choice = choose("temporal_conv", x, weight, geometry[0], tf32=tf32)
    if choice.backend == "reference":
        y = reference.temporal_conv(x, weight, scale, shift, residual, **_options(geometry, relu))
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        used = (x, weight, accumulator(scale, x, "scale"), accumulator(shift, x, "shift"), residual)
        op = kernel(choice.backend, "temporal_conv")
        y = call(op, *used, *geometry, relu, tf32)
        remember(key, Plan(op, choice.backend, geometry[1], tf32), given, used)
    note("temporal_conv", choice, (x, residual), y, x, weight, geometry, tf32)
    return y


def _frozen(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    geometry: tuple[int, int, int],
    relu: bool,
    key: Signature | None,
) -> Tensor:
    """temporal_conv_bn with the running statistics."""
    tf32 = allows_tf32(x)
    choice = choose("temporal_conv", x, weight, geometry[0], tf32=tf32)
    op = frozen_kernel(choice.backend, "temporal_conv_bn_frozen", x, weight, bn.gamma, bn.beta, residual)
    if op is None:
        return _affine(x, weight, *bn.fold(x), residual, geometry, relu, None)
    given = (x, weight, *bn[:4], residual)
    x, weight, residual = _lay_out(x, weight, residual)
    used = (x, weight, *bn.frozen(x), residual)
    y = call(op, *used, *geometry, bn.eps, relu, tf32)
    remember(key, Plan(op, choice.backend, geometry[1], tf32), given, used)
    note("temporal_conv", choice, (x, residual), y, x, weight, geometry, tf32)
    return y


def _normalised(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    geometry: tuple[int, int, int],
    relu: bool,
    key: Signature | None,
) -> Tensor:
    """temporal_conv_bn with the statistics of the batch."""
    given = (x, weight, bn.gamma, bn.beta, residual)
    x, weight, residual = _lay_out(x, weight, residual)
    tf32 = allows_tf32(x)
    choice = choose("temporal_conv_bn", x, weight, geometry[0], tf32=tf32)
    if choice.backend == "reference":
        y = reference.temporal_conv_bn(x, weight, residual=residual, **_options(geometry, relu), **bn._asdict())
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        used = (x, weight, *bn.accumulators(x), residual)
        op = kernel(choice.backend, "temporal_conv_bn")
        y = bn.update_running_stats(choice.backend, call(op, *used, *geometry, bn.eps, relu, tf32))
        remember(key, Plan(op, choice.backend, geometry[1], tf32), given, used)
    note("temporal_conv_bn", choice, (x, residual), y, x, weight, geometry, tf32)
    return y


def _options(geometry: tuple[int, int, int], relu: bool) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation"), geometry, strict=True), relu=relu)


# What PyTorch must know of the kernels: the shapes and strides they return, and their gradients.


def _fake(x, weight, scale, shift, residual, stride, padding, dilation, relu, tf32):
    return empty_channels_last(x, output_shape(x, weight, stride, padding, dilation))


def _fake_frozen(x, weight, gamma, beta, mean, var, residual, stride, padding, dilation, eps, relu, tf32):
    return empty_channels_last(x, output_shape(x, weight, stride, padding, dilation))


def _fake_bn(x, weight, gamma, beta, residual, stride, padding, dilation, eps, relu, tf32):
    shape = output_shape(x, weight, stride, padding, dilation)
    return *(empty_channels_last(x, shape) for _ in range(2)), *(empty_vector(x, weight) for _ in range(3))


def _fake_update(running_mean, running_var, num_batches_tracked, mean, unbiased_var, momentum):
    return None


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, _, _, *geometry, relu, tf32 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, scale, output if relu else None)
    ctx.geometry, ctx.tf32 = tuple(geometry), tf32
    ctx.library = backward_library(library, "temporal_conv", x, weight, geometry[0], tf32)


def _backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 10
    x, weight, scale, y = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    return *affine_gradients(ctx.library, grad, x, weight, scale, y, ctx.geometry, ctx.tf32, needs), *(None,) * 5


def _save_bn(library: str, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gamma, beta, residual, *geometry, _, relu, tf32 = inputs
    _, raw, mean, invstd, unbiased_var = output
    ctx.mark_non_differentiable(raw, mean, invstd, unbiased_var)
    ctx.set_materialize_grads(False)
    # The residual and beta serve only to find the mask of the ReLU again.
    ctx.save_for_backward(x, weight, gamma, beta if relu else None, residual if relu else None, raw, mean, invstd)
    ctx.geometry, ctx.relu, ctx.tf32 = tuple(geometry), relu, tf32
    ctx.library = backward_library(library, "temporal_conv_bn", x, weight, geometry[0], tf32)


def _backward_bn(ctx: Any, grad: Tensor | None, *of_statistics: None) -> Gradients:
    if grad is None:
        return (None,) * 11
    x, weight, gamma, beta, residual, raw, mean, invstd = ctx.saved_tensors
    conv = (grad, x, weight, gamma, beta, residual, raw, mean, invstd)
    needs = ctx.needs_input_grad[:5]
    return *batch_norm_gradients(ctx.library, *conv, ctx.geometry, ctx.relu, ctx.tf32, needs), *(None,) * 6


@for_every_library
def _define(library: str) -> None:
    define_op(f"{library}::temporal_conv", _fake, partial(_save, library), _backward)
    define_op(f"{library}::temporal_conv_bn", _fake_bn, partial(_save_bn, library), _backward_bn)
    define_frozen(library, "temporal_conv_bn_frozen", _fake_frozen)
    register_fake(f"{library}::update_running_stats", _fake_update)
