"""What follows the convolution of a stem in training, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .max_pool import max_pool
from .temporal_conv import activate, batch_norm


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
    """max_pool(act(batch_norm(x))), with the batch's statistics; the running ones are updated in place."""
    y = batch_norm(x, gamma, beta, running_mean, running_var, num_batches_tracked, momentum, eps, training=True)
    return max_pool(activate(y, None, relu), kernel=kernel, stride=stride, padding=padding).to(x.dtype)
