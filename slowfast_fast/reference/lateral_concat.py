"""Lateral connection of SlowFast (paper section 3.4, time-strided convolution), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .temporal_conv import temporal_conv, temporal_conv_bn


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
    """cat([slow, act(scale * conv(fast) + shift)]) over channels, the convolution having stride ``alpha`` in T."""
    lateral = temporal_conv(fast, weight, scale, shift, stride=alpha, padding=padding, relu=relu)
    return torch.cat([slow, lateral], dim=1)


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
    """cat([slow, act(batch_norm(conv(fast)))]) over channels."""
    lateral = temporal_conv_bn(
        fast,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        num_batches_tracked=num_batches_tracked,
        momentum=momentum,
        eps=eps,
        training=training,
        stride=alpha,
        padding=padding,
        relu=relu,
    )
    return torch.cat([slow, lateral], dim=1)
