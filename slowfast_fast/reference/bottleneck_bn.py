"""A whole bottleneck block in training, in plain PyTorch: the judge of every faster implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .temporal_conv import activate, batch_norm


def bottleneck_bn(
    x: Tensor,
    a: Sequence[Any],
    b: Sequence[Any],
    c: Sequence[Any],
    shortcut: Sequence[Any] | None = None,
    *,
    stride_a: int = 1,
    padding_a: int | None = None,
    dilation_a: int = 1,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    """relu(bn(c(relu(bn(b(relu(bn(a(x)))))))) + residual). A layer: weight, gamma, beta, running_mean, running_var,
    num_batches_tracked, momentum, eps. Shapes as in ops/bottleneck_bn.py."""
    padding_a = a[0].shape[2] // 2 if padding_a is None else padding_a

    def normed(x: Tensor, layer: Sequence[Any], **convolution: Any) -> Tensor:
        weight, gamma, beta, *running, momentum, eps = layer
        mean, var, count = running
        raw = F.conv3d(x, weight, **convolution)
        return batch_norm(raw, gamma, beta, mean, var, count, momentum, eps, training=True).to(x.dtype)

    y = normed(x, a, stride=(stride_a, 1, 1), padding=(padding_a, 0, 0), dilation=(dilation_a, 1, 1)).relu()
    y = normed(
        y, b, stride=(1, stride, stride), padding=(0, dilation, dilation), dilation=(1, dilation, dilation)
    ).relu()
    residual = x if shortcut is None else normed(x, shortcut, stride=(stride_a, stride, stride))
    return activate(normed(y, c), residual, relu=True)
