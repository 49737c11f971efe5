"""What the arguments of an op under test are drawn from: random numbers, to judge errors by, or integers so small that
every sum is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What a training step updates in place.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, and of one value for each channel."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Integers of -2 to 2, half of them 0: their products and sums are exact in float32."""
    return (torch.randint(-2, 3, shape) * torch.randint(0, 2, shape)).to(dtype)


def integer_scales(k: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0])[torch.randint(0, 5, (k,))].to(dtype)


@dataclass(frozen=True)
class Normal:
    """Activations of deviation 1, and weights whose sums of products with them have it too."""

    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        return (torch.randn(shape) / math.sqrt(math.prod(shape[1:]))).to(self.dtype)

    def scale(self, k: int) -> Tensor:
        return (torch.rand(k) + 0.5).to(accumulation(self.dtype))

    def shift(self, k: int) -> Tensor:
        return torch.randn(k).to(accumulation(self.dtype))

    def norm(self, k: int) -> dict[str, Tensor]:
        """The tensors of a BatchNorm, by the names that the ops give them."""
        return {
            "gamma": self.scale(k),
            "beta": self.shift(k),
            "running_mean": self.shift(k),
            "running_var": self.scale(k),
            "num_batches_tracked": torch.tensor(3),
        }


@dataclass(frozen=True)
class Integers:
    """Everything in one dtype, scale and shift included, which the ops may be given in the dtype of x."""

    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return small_integers(*shape, dtype=self.dtype)

    def weight(self, *shape: int) -> Tensor:
        return self(*shape)

    def scale(self, k: int) -> Tensor:
        return integer_scales(k, dtype=self.dtype)

    def shift(self, k: int) -> Tensor:
        return self(k)


Draw = Normal | Integers


def without(tensors: dict[str, Tensor], absent: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in absent}


def evaluated_norm(k: int) -> tuple[nn.BatchNorm3d, dict[str, Tensor]]:
    """A module in evaluation with random parameters and statistics, in float64, and the scale and shift that it is."""
    norm = nn.BatchNorm3d(k).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return norm, {"scale": scale, "shift": norm.bias - norm.running_mean * scale}
