"""The frozen head: both pools and the classifier, without a tensor of concatenated features; and pools alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from ..backend import Choice
from ..explanation import note, note_call, recording


class FrozenHead(nn.Module):
    """Pools of the pathways, their features side by side, a linear layer at every position, activation, average.

    Everything before the activation is linear: with none, and an average over all positions at the end, the average is
    taken first, as a weighted mean of each pathway's features, and the linear layer runs once a clip.

    Args:
        weight: (classes, channels of all pathways), float32 (float64 for float64): a narrow layer that is not worth
            a rounding.
        bias: (classes,), likewise.
        pools: one for each pathway; each may be None.
        activation, averages: what follows the linear layer.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        pools: Sequence[nn.Module | None],
        activation: nn.Module | None,
        averages: bool,
    ) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.pools = nn.ModuleList(pools)  # type: ignore[arg-type]
        self.activation = activation
        self.averages = averages

    def forward(self, x: Sequence[Tensor] | Tensor) -> Tensor:
        """One (N, C, T, H, W) for each pathway, or that of the only one -> (N, classes), or (N, classes, T', H', W')
        where nothing averages."""
        x = [x] if isinstance(x, Tensor) else x
        channels = [tensor.shape[1] for tensor in x]
        if sum(channels) != self.weight.shape[1]:
            raise ValueError(f"the head takes {self.weight.shape[1]} channels; got {' + '.join(map(str, channels))}")
        pairs = list(zip(x, self.pools, strict=True))
        once = self.averages and self.activation is None and all(_window(pool) for _, pool in pairs)
        features = [_mean(tensor, pool) if once else _pooled(tensor, pool) for tensor, pool in pairs]
        out = self.bias
        for part, weight in zip(features, self.weight.split(channels, 1), strict=True):
            out = out + F.linear(part.to(self.weight.dtype), weight)
        if recording():
            note((self,), "head")
            how = "mean over positions before the linear layer" if once else "linear layer at every position"
            note_call("head", Choice("aten", how), tuple(x), out)
        if once:
            return out.to(x[0].dtype)
        out = out.movedim(-1, 1)
        if self.activation is not None:
            out = self.activation(out)
        return (out.mean((2, 3, 4)) if self.averages else out).to(x[0].dtype)


class FrozenPools(nn.Module):
    """Pools of the pathways, their features side by side: what a head that takes boxes reads.

    Sums are in float32 at least, as in ``FrozenHead``.
    """

    explains_itself = True

    def __init__(self, pools: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pools = nn.ModuleList(pools)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """One (N, C, T, H, W) for each pathway -> (N, sum of C, T', H', W')."""
        parts = [_pooled(tensor, pool) for tensor, pool in zip(x, self.pools, strict=True)]
        out = torch.cat(parts, -1).to(x[0].dtype).movedim(-1, 1)
        if recording():
            note((self,), "pools")
            note_call("pools", Choice("aten", "each pathway's, side by side"), tuple(x), out)
        return out


def _window(pool: nn.Module | None) -> bool:
    """Whether an average over what the pool gives is a weighted mean of what it takes."""
    if pool is None:
        return True
    if type(pool) is nn.AdaptiveAvgPool3d:
        return _triple(pool.output_size) == (1, 1, 1)
    return (
        type(pool) is nn.AvgPool3d
        and _triple(pool.padding) == (0, 0, 0)
        and not pool.ceil_mode
        and not pool.divisor_override
    )


def _mean(x: Tensor, pool: nn.Module | None) -> Tensor:
    """(N, C): the average over positions of what the pool gives."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if type(pool) is not nn.AvgPool3d:
        return x.mean((2, 3, 4), dtype=dtype)
    kernel, stride = _triple(pool.kernel_size), _triple(pool.stride)
    sizes = tuple(x.shape[2:])
    _check_fits(sizes, kernel)
    if sizes == kernel:
        return x.mean((2, 3, 4), dtype=dtype)
    # How often the windows see a position: a product of what each dimension counts.
    t, h, w = (_visits(size, k, s, x.device, dtype) for size, k, s in zip(sizes, kernel, stride, strict=True))
    weights = (t[:, None, None] * h[:, None] * w).flatten()
    return weights @ x.to(dtype).permute(0, 2, 3, 4, 1).flatten(1, 3)


def _visits(size: int, kernel: int, stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size,), with the sum 1: in how many windows a place lies."""
    ones = torch.ones(1, 1, (size - kernel) // stride + 1, device=device, dtype=dtype)
    counts = F.conv_transpose1d(ones, torch.ones(1, 1, kernel, device=device, dtype=dtype), stride=stride)[0, 0]
    return F.pad(counts / counts.sum(), (0, size - counts.shape[0]))


def _pooled(x: Tensor, pool: nn.Module | None) -> Tensor:
    """(N, T', H', W', C)."""
    if type(pool) is nn.AvgPool3d and _window(pool):
        _check_fits(tuple(x.shape[2:]), _triple(pool.kernel_size))
    # In float32: PyTorch has no average pool in half precision on the CPU.
    return (x if pool is None else pool(x.to(torch.promote_types(x.dtype, torch.float32)))).movedim(1, -1)


def _check_fits(sizes: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    if any(size < k for size, k in zip(sizes, kernel, strict=True)):
        raise ValueError(
            f"the head's average pool takes (T, H, W) = {kernel} features at least, and these clips leave {sizes}: "
            "give longer or larger clips, or build the network with head_pool=nn.AdaptiveAvgPool3d, for any size"
        )
