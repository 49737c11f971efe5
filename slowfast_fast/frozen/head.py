"""Frozen heads: the pools and the classifier, without a pass that puts features side by side; and pools alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from ..backend import Choice
from ..explanation import note, note_call, recording

OF_HEAD = "part of the frozen head, by PyTorch in float32 at least"


class FrozenHead(nn.Module):
    """Pools of the pathways, their features side by side, a linear layer at every position, activation, average.

    Everything before the activation is linear: with none, and an average over all positions at the end, the average is
    taken first, as a weighted mean of each pathway's features, and the linear layer runs once a clip.

    Args:
        weight: (classes, channels of all pathways), float32 (float64 for float64): a narrow layer that is not worth
            a rounding.
        bias: (classes,), likewise.
        pools: one for each pathway, each may be None; empty: no pathway has one.
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
        pairs = _pairs(x, self.pools)
        if recording():
            note([*self.pools, self.activation], None, OF_HEAD)
        once = self.averages and self.activation is None and all(_window(pool) for _, pool in pairs)
        features = [_mean(tensor, pool) if once else _pooled(tensor, pool) for tensor, pool in pairs]
        if not once:
            _check_alike([part.shape[:-1] for part in features])
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
    """Pools of the pathways, their features side by side: what a head that is not frozen reads.

    Sums are in float32 at least, as in ``FrozenHead``.

    Args:
        pools: as for ``FrozenHead``.
        retain_list: give the result in a list, as ``PoolConcatPathway`` does.
    """

    explains_itself = True

    def __init__(self, pools: Sequence[nn.Module | None], retain_list: bool = False) -> None:
        super().__init__()
        self.pools = nn.ModuleList(pools)  # type: ignore[arg-type]
        self.retain_list = retain_list

    def forward(self, x: Sequence[Tensor | None]) -> Tensor | list[Tensor]:
        """One (N, C, T, H, W) or None for each pathway -> (N, sum of C, T', H', W')."""
        given = [tensor for tensor in x if tensor is not None]
        out = _side_by_side(self, x, self.pools, given[0].dtype)
        return [out] if self.retain_list else out


class FrozenRoIHead(nn.Module):
    """Pools of the pathways, boxes sampled from what they give, and a classifier of each box.

    Features are sampled and classified in float32 at least, wherever a box lies, and boxes keep their own dtype: pixels
    of a large clip have no place in half precision.

    Args:
        pools: as for ``FrozenHead``; they must leave one frame.
        roi_layer: called with features (N, C, H, W) and boxes.
        pool_spatial: over the cells of a box; may be None.
        classifier: a head without pools.
    """

    def __init__(
        self,
        pools: Sequence[nn.Module | None],
        roi_layer: nn.Module,
        pool_spatial: nn.Module | None,
        classifier: FrozenHead,
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(pools)  # type: ignore[arg-type]
        self.roi_layer = roi_layer
        self.pool_spatial = pool_spatial
        self.classifier = classifier

    def forward(self, x: Sequence[Tensor] | Tensor, bboxes: Tensor) -> Tensor:
        """One (N, C, T, H, W) for each pathway, boxes (B, 5) of (clip, x1, y1, x2, y2) -> as the classifier gives for
        features (B, C, 1, H', W')."""
        x = [x] if isinstance(x, Tensor) else x
        features = _side_by_side(self, x, self.pools, self.classifier.weight.dtype)
        if features.shape[2] != 1:
            raise ValueError(
                f"boxes are sampled from one frame of features, but T is {features.shape[2]} in shape "
                f"{tuple(features.shape)}: give clips of as many frames as the head's pools take"
            )
        if recording():
            note((self.roi_layer, self.pool_spatial), None, OF_HEAD)
        cells = self.roi_layer(features.squeeze(2), bboxes)
        if self.pool_spatial is not None:
            cells = self.pool_spatial(cells)
        return self.classifier(cells.unsqueeze(2)).to(x[0].dtype)


def _pairs(x: Sequence[Tensor], pools: nn.ModuleList) -> list[tuple[Tensor, nn.Module | None]]:
    if len(pools) not in (0, len(x)):
        raise ValueError(f"x must have one tensor for each of {len(pools)} pools; got {len(x)}")
    return list(zip(x, [*pools] or [None] * len(x), strict=True))


def _side_by_side(module: nn.Module, x: Sequence[Tensor | None], pools: nn.ModuleList, dtype: torch.dtype) -> Tensor:
    """(N, sum of C, T', H', W'), each pathway's pooled features written to their place; on behalf of ``module``."""
    pairs = _pairs(cast("Sequence[Tensor]", x), pools)
    if recording():
        note(pools, None, OF_HEAD)
    given = [tensor for tensor in x if tensor is not None]
    parts = [_pooled(tensor, pool) for tensor, pool in pairs if tensor is not None]
    sizes = [part.shape[:-1] for part in parts]
    _check_alike(sizes)
    out = parts[0].new_empty((*sizes[0], sum(part.shape[-1] for part in parts)), dtype=dtype)
    first = 0
    for part in parts:
        out[..., first : first + part.shape[-1]] = part
        first += part.shape[-1]
    if recording():
        note((module,), "pools")
        note_call("pools", Choice("aten", "each pathway's, side by side"), given, out.movedim(-1, 1))
    return out.movedim(-1, 1)


def _check_alike(sizes: Sequence[tuple[int, ...]]) -> None:
    if any(size != sizes[0] for size in sizes):
        listed = " and ".join(str(tuple(size[1:])) for size in sizes)
        raise ValueError(
            f"the head's pools must leave the pathways with the same (T, H, W); got {listed}: give clips of as many "
            "frames as the pools take, or build the network with head_pool=nn.AdaptiveAvgPool3d"
        )


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
