"""Temporal convolution with what follows it, in plain PyTorch: the judge of every faster implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """act(scale * conv(x) + shift + residual). x (N, C, T, H, W), weight (K, C, kt, 1, 1); scale and shift (K)."""
    padding = weight.shape[2] // 2 if padding is None else padding
    y = F.conv3d(x, weight, stride=(stride, 1, 1), padding=(padding, 0, 0), dilation=(dilation, 1, 1))
    if scale is not None:
        y = y * per_channel(scale)
    if shift is not None:
        y = y + per_channel(shift)
    return activate(y, residual, relu).to(x.dtype)


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
    """act(batch_norm(conv(x)) + residual), running statistics updated in place as nn.BatchNorm3d does."""
    raw = temporal_conv(x, weight, stride=stride, padding=padding, dilation=dilation)
    y = batch_norm(raw, gamma, beta, running_mean, running_var, num_batches_tracked, momentum, eps, training)
    return activate(y, residual, relu).to(x.dtype)


def per_channel(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1, 1)


def activate(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def batch_norm(
    raw: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    training: bool,
) -> Tensor:
    """BatchNorm over all dimensions of ``raw`` but the second, in float32 at least."""
    y = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if training or running_mean is None or running_var is None:
        var, mean = torch.var_mean(y, (0, 2, 3, 4), correction=0)
        if running_mean is not None and running_var is not None:
            update_running_stats(running_mean, running_var, num_batches_tracked, mean, var, y, momentum)
    else:
        mean, var = running_mean.to(y.dtype), running_var.to(y.dtype)
    y = (y - per_channel(mean)) * per_channel(torch.rsqrt(var + eps))
    y = y if gamma is None else y * per_channel(gamma)
    return y if beta is None else y + per_channel(beta)


@torch.no_grad()
def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    momentum: float | None,
) -> None:
    """Move the running statistics towards the batch's, the variance unbiased. An empty batch is counted and nothing
    else."""
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    count = y.numel() // y.shape[1]
    if count == 0:
        return
    factor: float | Tensor
    if momentum is None:
        assert num_batches_tracked is not None, "a cumulative average needs the number of batches"
        factor = 1 / num_batches_tracked.to(mean.dtype)
    else:
        factor = momentum
    for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        running += factor * (batch - running)
