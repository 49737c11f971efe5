"""Lateral connection (paper section 3.4): the fast pathway's time-strided convolution, written beside the slow
pathway's channels."""

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
    wants_gradient,
)
from ._gradients import Gradients, affine_gradients, batch_norm_gradients, empty_vector
from ._kernels import note
from ._layout import as_dense, as_rows, empty_channels_last
from ._repeat import Plan, Signature, call_planned, look_up, remember


def lateral_concat(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    alpha: int,
    padding: int | None = None,
    relu: bool = True,
) -> Tensor:
    """out = [slow, act(scale * conv(fast) + shift)] along the channels: the lateral connection with inference-mode
    BatchNorm as scale and shift. Stock: nn.Conv3d with stride (alpha, 1, 1), nn.BatchNorm3d, nn.ReLU and torch.cat,
    as one write of the result.

    Args:
        slow: (N, C_slow, T, H, W), of fast's dtype. Read in place where its memory is rows of channels
            (torch.channels_last_3d, or a slice of it in any dimension), else copied once; fast likewise.
        fast: (N, C, T_fast, H, W), float32, float16, bfloat16 or float64; N may be 0.
        weight: (K, C, kt, 1, 1), of fast's dtype.
        scale, shift: (K,) in float32 or fast's dtype; None stands for 1 and 0.
        alpha: the stride in T_fast, the ratio of the frame rates.
        padding: in T_fast; None means kt // 2, for odd kt only.
        relu: whether act is ReLU or nothing.

    Under autocast slow, fast and weight are cast to the active dtype. Sums are kept in float32 (float64 for float64).

    Returns:
        (N, C_slow + K, T, H, W), dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above, or (T_fast + 2 * padding - kt) // alpha + 1 is not T; the
        message names it. RuntimeError: the backend that was asked for cannot run the call. A double backward raises
        too.
    """
    slow, fast, weight = autocast(slow, fast, weight)
    key, plan = look_up("lateral_concat", (alpha, padding, relu), (fast, weight, slow), (scale, shift))
    if plan is not None:
        op, _, pad, tf32 = plan
        try:
            return call_planned(op, slow, fast, weight, scale, shift, alpha, pad, relu, tf32)
        except RuntimeError:
            pass  # the long way says what is wrong
    padding, _ = _check_lateral(slow, fast, weight, alpha, padding, relu)
    _checks.vector("scale", scale, weight)
    _checks.vector("shift", shift, weight)
    return _affine(slow, fast, weight, scale, shift, alpha, padding, relu, key)


def lateral_concat_bn(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training: bool,
    alpha: int,
    padding: int | None = None,
    relu: bool = True,
) -> Tensor:
    """out = [slow, act(batch_norm(conv(fast)))] along the channels, BatchNorm as
    :func:`slowfast_fast.ops.temporal_conv_bn` has it.

    Args:
        slow, fast, weight, alpha, padding, relu: as :func:`lateral_concat`.
        gamma, beta, running_mean, running_var, num_batches_tracked, momentum, eps, training: as
            :func:`slowfast_fast.ops.temporal_conv_bn`.

    Returns:
        As :func:`lateral_concat`.

    Raises:
        As :func:`lateral_concat`, and ValueError when batch statistics are asked of a single value per channel.
    """
    slow, fast, weight = autocast(slow, fast, weight)
    statistics = (gamma, beta, running_mean, running_var, num_batches_tracked)
    options = (alpha, padding, relu, momentum, eps, training)
    key, plan = look_up("lateral_concat_bn", options, (fast, weight, slow), statistics)
    if plan is not None:
        op, backend, pad, tf32 = plan
        try:
            if training or running_mean is None:
                results = call_planned(op, slow, fast, weight, gamma, beta, alpha, pad, eps, relu, tf32)
                bn = BatchNorm(*statistics, momentum, eps, training)
                return bn.update_running_stats(backend, results)
            if not wants_gradient(slow, fast, weight, gamma, beta):
                mean, var = running_mean, running_var
                return call_planned(op, slow, fast, weight, gamma, beta, mean, var, alpha, pad, eps, relu, tf32)
        except RuntimeError:
            pass  # the long way says what is wrong
    bn = BatchNorm(*statistics, momentum, eps, training)
    padding, lateral_shape = _check_lateral(slow, fast, weight, alpha, padding, relu)
    bn.check(weight, lateral_shape)
    if bn.of_batch():
        return _normalised(slow, fast, weight, bn, alpha, padding, relu, key)
    return _frozen(slow, fast, weight, bn, alpha, padding, relu, key)


def _check_lateral(
    slow: Tensor, fast: Tensor, weight: Tensor, alpha: int, padding: int | None, relu: bool
) -> tuple[int, tuple[int, ...]]:
    """Check what both forms share. Returns the padding in frames and the shape of the convolution's output."""
    _checks.activation("slow", slow)
    _checks.activation("fast", fast)
    _checks.like("slow", slow, fast, "fast")
    _checks.kernel(weight, fast, "fast")
    _checks.integer("alpha", alpha, 1)
    _checks.flag("relu", relu)
    padding = _checks.same_padding(padding, weight)
    frames = _checks.lateral_frames(tuple(slow.shape), fast, weight, alpha, padding)
    n, _, _, h, w = fast.shape
    return padding, (n, weight.shape[0], frames, h, w)


# The ops on checked arguments, the long way; what a call like this one can skip is kept under ``key``.


def _lay_out(slow: Tensor, fast: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return as_rows(slow, "slow"), as_rows(fast, "fast"), as_dense(weight, "weight")


def _affine(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    alpha: int,
    padding: int,
    relu: bool,
    key: Signature | None,
) -> Tensor:
    given = (slow, fast, weight, scale, shift)
    slow, fast, weight = _lay_out(slow, fast, weight)
    tf32 = allows_tf32(fast)
    choice = choose("lateral_concat", fast, weight, alpha, tf32=tf32)
    if choice.backend == "reference":
        out = reference.lateral_concat(slow, fast, weight, scale, shift, alpha=alpha, padding=padding, relu=relu)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        used = (slow, fast, weight, accumulator(scale, fast, "scale"), accumulator(shift, fast, "shift"))
        op = kernel(choice.backend, "lateral_concat")
        out = call(op, *used, alpha, padding, relu, tf32)
        remember(key, Plan(op, choice.backend, padding, tf32), given, used)
    note("lateral_concat", choice, (slow, fast), out, fast, weight, (alpha, padding, 1), tf32)
    return out


def _frozen(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    alpha: int,
    padding: int,
    relu: bool,
    key: Signature | None,
) -> Tensor:
    """lateral_concat_bn with the running statistics."""
    tf32 = allows_tf32(fast)
    choice = choose("lateral_concat", fast, weight, alpha, tf32=tf32)
    op = frozen_kernel(choice.backend, "lateral_concat_bn_frozen", slow, fast, weight, bn.gamma, bn.beta)
    if op is None:
        return _affine(slow, fast, weight, *bn.fold(fast), alpha, padding, relu, None)
    given = (slow, fast, weight, *bn[:4])
    slow, fast, weight = _lay_out(slow, fast, weight)
    used = (slow, fast, weight, *bn.frozen(fast))
    out = call(op, *used, alpha, padding, bn.eps, relu, tf32)
    remember(key, Plan(op, choice.backend, padding, tf32), given, used)
    note("lateral_concat", choice, (slow, fast), out, fast, weight, (alpha, padding, 1), tf32)
    return out


def _normalised(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    alpha: int,
    padding: int,
    relu: bool,
    key: Signature | None,
) -> Tensor:
    """lateral_concat_bn with the statistics of the batch."""
    given = (slow, fast, weight, bn.gamma, bn.beta)
    slow, fast, weight = _lay_out(slow, fast, weight)
    tf32 = allows_tf32(fast)
    choice = choose("lateral_concat_bn", fast, weight, alpha, tf32=tf32)
    if choice.backend == "reference":
        options: dict[str, Any] = {"alpha": alpha, "padding": padding, "relu": relu, **bn._asdict()}
        out = reference.lateral_concat_bn(slow, fast, weight, **options)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        used = (slow, fast, weight, *bn.accumulators(fast))
        op = kernel(choice.backend, "lateral_concat_bn")
        out = bn.update_running_stats(choice.backend, call(op, *used, alpha, padding, bn.eps, relu, tf32))
        remember(key, Plan(op, choice.backend, padding, tf32), given, used)
    note("lateral_concat_bn", choice, (slow, fast), out, fast, weight, (alpha, padding, 1), tf32)
    return out


# What PyTorch must know of the kernels: the shapes and strides they return, and their gradients.


def _empty_out(slow: Tensor, weight: Tensor) -> Tensor:
    n, channels, t, h, w = slow.shape
    return empty_channels_last(slow, (n, channels + weight.shape[0], t, h, w))


def _fake(slow, fast, weight, scale, shift, alpha, padding, relu, tf32):
    return _empty_out(slow, weight)


def _fake_frozen(slow, fast, weight, gamma, beta, mean, var, alpha, padding, eps, relu, tf32):
    return _empty_out(slow, weight)


def _fake_bn(slow, fast, weight, gamma, beta, alpha, padding, eps, relu, tf32):
    n, _, t, h, w = slow.shape
    raw = empty_channels_last(slow, (n, weight.shape[0], t, h, w))
    return _empty_out(slow, weight), raw, *(empty_vector(fast, weight) for _ in range(3))


# In the backward, the convolution's part is that of temporal_conv on a channel slice, with stride alpha; the
# gradient of slow is the view of the other channels.


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    slow, fast, weight, scale, _, alpha, padding, relu, tf32 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(fast, weight, scale, output if relu else None)
    ctx.slow_channels, ctx.geometry, ctx.tf32 = slow.shape[1], (alpha, padding, 1), tf32
    ctx.library = backward_library(library, "lateral_concat", fast, weight, alpha, tf32)


def _backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 9
    fast, weight, scale, out = ctx.saved_tensors
    grad = as_rows(grad, "grad")
    of_slow, of_lateral = grad[:, : ctx.slow_channels], grad[:, ctx.slow_channels :]
    y = None if out is None else out[:, ctx.slow_channels :]
    need_slow, *needs = ctx.needs_input_grad[:5]
    conv = (of_lateral, fast, weight, scale, y)
    *of_conv, _ = affine_gradients(ctx.library, *conv, ctx.geometry, ctx.tf32, (*needs, False))
    return of_slow if need_slow else None, *of_conv, *(None,) * 4


def _save_bn(library: str, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    slow, fast, weight, gamma, beta, alpha, padding, _, relu, tf32 = inputs
    _, raw, mean, invstd, unbiased_var = output
    ctx.mark_non_differentiable(raw, mean, invstd, unbiased_var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(fast, weight, gamma, beta if relu else None, raw, mean, invstd)
    ctx.slow_channels, ctx.geometry = slow.shape[1], (alpha, padding, 1)
    ctx.relu, ctx.tf32 = relu, tf32
    ctx.library = backward_library(library, "lateral_concat_bn", fast, weight, alpha, tf32)


def _backward_bn(ctx: Any, grad: Tensor | None, *of_statistics: None) -> Gradients:
    if grad is None:
        return (None,) * 10
    fast, weight, gamma, beta, raw, mean, invstd = ctx.saved_tensors
    grad = as_rows(grad, "grad")
    of_slow, of_lateral = grad[:, : ctx.slow_channels], grad[:, ctx.slow_channels :]
    need_slow, *needs = ctx.needs_input_grad[:5]
    conv = (of_lateral, fast, weight, gamma, beta, None, raw, mean, invstd)
    *of_conv, _ = batch_norm_gradients(ctx.library, *conv, ctx.geometry, ctx.relu, ctx.tf32, (*needs, False))
    return of_slow if need_slow else None, *of_conv, *(None,) * 5


@for_every_library
def _define(library: str) -> None:
    define_op(f"{library}::lateral_concat", _fake, partial(_save, library), _backward)
    define_op(f"{library}::lateral_concat_bn", _fake_bn, partial(_save_bn, library), _backward_bn)
    define_frozen(library, "lateral_concat_bn_frozen", _fake_frozen)
