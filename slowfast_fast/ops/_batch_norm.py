"""BatchNorm as the ops take it: which statistics it uses, its folded form, and its running statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._common import accumulator, call, kernel


class BatchNorm(NamedTuple):
    """The BatchNorm arguments of an op, as nn.BatchNorm3d means them."""

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool

    def check(self, weight: Tensor, output_shape: tuple[int, ...], name: str = "weight") -> None:
        """Raise ValueError or TypeError for what nn.BatchNorm3d or this package does not take. ``weight``, called
        ``name`` in messages, has the channels in its first dimension, and the dtype and device."""
        _checks.flag("training", self.training)
        _checks.vector("gamma", self.gamma, weight, name)
        _checks.vector("beta", self.beta, weight, name)
        moved = (self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        _checks.running_stats(*moved, weight, name, moves=self.training)
        if self.of_batch():
            _checks.batch_statistics(output_shape, self.eps)
        elif self.eps < 0:
            raise ValueError(f"eps must not be negative; got {self.eps}")

    def of_batch(self) -> bool:
        """Whether the statistics are the batch's: in training, and where no running ones are kept."""
        return self.training or self.running_mean is None

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that apply the running statistics, differentiable in gamma and beta."""
        gamma, beta, mean, var = self.frozen(x)
        scale = torch.rsqrt(var + self.eps)
        if gamma is not None:
            scale = gamma * scale
            if scale.requires_grad:
                # Autograd keeps mean for the gradient of gamma; a training step before that backward would move the
                # buffer.
                mean = mean.clone()
        return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)

    def frozen(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """gamma, beta and the running statistics, which must be there, in the dtype that the kernels sum in."""
        mean = accumulator(self.running_mean, x, "running_mean")
        var = accumulator(self.running_var, x, "running_var")
        assert mean is not None
        assert var is not None
        return *self.accumulators(x), mean, var

    def accumulators(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta in the dtype that the kernels sum in."""
        return accumulator(self.gamma, x, "gamma"), accumulator(self.beta, x, "beta")

    def update_running_stats(self, backend: str, results: tuple[Tensor, ...]) -> Tensor:
        """The output among the ``results`` of a kernel, after moving the running statistics towards those of its
        batch."""
        output, _, mean, _, unbiased_var = results
        self.move(backend, output.shape[0], mean, unbiased_var)
        return output

    def move(self, backend: str, n: int, mean: Tensor, unbiased_var: Tensor) -> None:
        """The running statistics towards those of a batch of ``n``; an empty one is counted and no more."""
        if self.running_mean is None:
            return
        if n > 0:
            moved = (self.running_mean, self.running_var, self.num_batches_tracked)
            call(kernel(backend, "update_running_stats"), *moved, mean, unbiased_var, self.momentum)
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
