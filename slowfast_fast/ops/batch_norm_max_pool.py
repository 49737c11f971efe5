"""What follows the convolution of a stem in training: BatchNorm, ReLU and max pooling, of which only the convolution's
output is kept for the backward."""

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
from ._batch_norm import BatchNorm
from ._common import accumulation_dtype, autocast, call, define_op, forbid_gradient, register_fake
from ._common import kernel as library_kernel
from ._layout import as_rows, empty_channels_last
from .max_pool import pooled_shape

MOST_PLACES = 255  # csrc/primitives.h: the backward numbers those of a window in one byte


def batch_norm_max_pool(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    kernel: int,
    stride: int,
    padding: int = 0,
) -> Tensor:
    """y = max_pool(act(batch_norm(x))) with the statistics of the batch: a SlowFast stem in training, after its
    convolution. Stock: nn.BatchNorm3d, nn.ReLU and nn.MaxPool3d with kernel (1, kernel, kernel).

    The running statistics are updated in place, the variance unbiased, and num_batches_tracked is incremented. For the
    backward x and two values per channel are kept, where stock keeps x, what the ReLU makes of it and int64 indices:
    the windows' maxima are found again.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows
            of channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        gamma, beta: (C,) in float32 or x's dtype; None stands for 1 and 0.
        running_mean, running_var: (C,) in float32 or x's dtype, both or none.
        num_batches_tracked: one int64, or None.
        momentum: weight of the batch in the running statistics; None: a cumulative average over num_batches_tracked
            batches.
        eps: added to the variance.
        relu: whether act is ReLU or nothing.
        kernel, stride, padding: of the pool, in H and in W; kernel at most 15, padding at most half of it, and never
            the maximum.

    The first of equal maxima gets a window's gradient, and a NaN is a window's maximum, as in torch. Under autocast x
    is cast to the active dtype. Sums are kept in float32 (float64 for float64).

    Returns:
        (N, C, T, H', W') with H' = (H + 2 * padding - kernel) // stride + 1, dense channels_last_3d.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is a single value per channel; the message names
        it. RuntimeError: the backend that was asked for cannot run the call. A double backward raises too.
    """
    (x,) = autocast(x)
    _checks.activation("x", x)
    _checks.pool(x, kernel, stride, padding)
    if kernel * kernel > MOST_PLACES:
        raise ValueError(f"kernel must be at most {int(MOST_PLACES**0.5)}; got {kernel}")
    _checks.flag("relu", relu)
    bn = BatchNorm(gamma, beta, running_mean, running_var, num_batches_tracked, momentum, eps, training=True)
    bn.check(x.transpose(0, 1), tuple(x.shape), "x")
    x = as_rows(x, "x")
    choice = choose("batch_norm_max_pool", x)
    if choice.backend == "reference":
        statistics = {name: value for name, value in bn._asdict().items() if name != "training"}
        y = reference.batch_norm_max_pool(x, relu=relu, kernel=kernel, stride=stride, padding=padding, **statistics)
        y = y.contiguous(memory_format=torch.channels_last_3d)
    else:
        op = library_kernel(choice.backend, "batch_norm_max_pool")
        y, *of_batch = call(op, x, *bn.accumulators(x), kernel, stride, padding, eps, relu)
        y = bn.update_running_stats(choice.backend, (y, x, *of_batch))
    note_call("batch_norm_max_pool", choice, (x,), y)
    return y


# What PyTorch must know of the kernels: the shapes and strides they return, and their gradients.


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=accumulation_dtype(x), device=x.device)


def _fake(x, gamma, beta, kernel, stride, padding, eps, relu):
    return empty_channels_last(x, pooled_shape(x, kernel, stride, padding)), *(_vector(x) for _ in range(3))


def _fake_backward(grad, x, gamma, beta, mean, invstd, kernel, stride, padding, relu, need_x, need_gamma, need_beta):
    return (
        empty_channels_last(x, x.shape) if need_x else x.new_empty(0),
        _vector(x) if need_gamma else x.new_empty(0),
        _vector(x) if need_beta else x.new_empty(0),
    )


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, *pool, _, relu = inputs
    _, mean, invstd, unbiased_var = output
    ctx.mark_non_differentiable(mean, invstd, unbiased_var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, beta, mean, invstd)
    ctx.library, ctx.pool, ctx.relu = library, pool, relu


def _backward(ctx: Any, grad: Tensor | None, *of_statistics: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    if grad is None or not any(needs):
        return (None,) * 8
    op = getattr(torch.ops, ctx.library).batch_norm_max_pool_backward.default
    results = call(op, as_rows(grad, "grad"), *ctx.saved_tensors, *ctx.pool, ctx.relu, *needs)
    return *(result if need else None for result, need in zip(results, needs, strict=True)), *(None,) * 5


@for_every_library
def _define(library: str) -> None:
    if not hasattr(getattr(torch.ops, library), "batch_norm_max_pool"):
        return
    define_op(f"{library}::batch_norm_max_pool", _fake, partial(_save, library), _backward)
    register_fake(f"{library}::batch_norm_max_pool_backward", _fake_backward)
    forbid_gradient(
        f"{library}::batch_norm_max_pool_backward",
        "double backward through batch_norm_max_pool is not supported: its gradients have no gradient",
    )
