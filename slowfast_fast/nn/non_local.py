"""Non-local blocks (Wang et al., "Non-local Neural Networks", CVPR 2018): every position sees every other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import conv_norm_act, residual
from .net import MultiPathWayWithFuse, init_weights

KINDS = ("dot_product", "softmax")


class NonLocal(nn.Module):
    """``x + norm(conv_out(attend(conv_theta(x), conv_phi(pool(x)), conv_g(pool(x)))))``.

    Args:
        channels: of x and the result.
        inner: of queries, keys and values.
        kind: "softmax" weighs by the softmax of the dot products over ``inner ** 0.5``, through PyTorch's
            ``scaled_dot_product_attention``; "dot_product" by the dot products over the number of positions.
        pool: (T, H, W) of the max pool, kernel and stride, before keys and values; (1, 1, 1): none.
        norm: called with ``num_features``, ``eps`` and ``momentum``; its gamma starts as 0, so that the block starts
            as nothing. None: no norm.

    Raises ValueError for another kind. Parts are named as PySlowFast's ``Nonlocal`` names them.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        kind: str = "dot_product",
        pool: Sequence[int] = (1, 2, 2),
        norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        self.conv_theta = nn.Conv3d(channels, inner, 1)
        self.conv_phi = nn.Conv3d(channels, inner, 1)
        self.conv_g = nn.Conv3d(channels, inner, 1)
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.norm = None if norm is None else norm(num_features=channels, eps=norm_eps, momentum=norm_momentum)
        if self.norm is not None:
            self.norm.block_final_bn = True  # type: ignore[assignment]  # init_weights sets its gamma to 0
        self.attention = Attention(kind)
        size = cast("tuple[int, int, int]", tuple(pool))
        self.pool = None if size == (1, 1, 1) else nn.MaxPool3d(size, size)
        self.pools_projected = False  # whether the pool is behind conv_phi and conv_g, where mmcv has it

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) -> the same."""
        pooled = x if self.pool is None or self.pools_projected else self.pool(x)
        theta, phi, g = (
            conv_norm_act(source, conv, None, None)
            for source, conv in ((x, self.conv_theta), (pooled, self.conv_phi), (pooled, self.conv_g))
        )
        if self.pool is not None and self.pools_projected:
            phi, g = self.pool(phi), self.pool(g)
        return residual(self.attention(theta, phi, g), [(self.conv_out, self.norm, None)], x, None)


class Attention(nn.Module):
    """What every query sees in the values; ``kind`` as for :class:`NonLocal`. ``scaled``: whether the softmax is that
    of dot products over ``inner ** 0.5``, else of these themselves."""

    def __init__(self, kind: str, scaled: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.scaled = scaled

    def forward(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """Queries (N, C, T, H, W), keys and values (N, C, T', H', W') -> (N, C, T, H, W)."""
        # Rows of channels are the tokens of attention: in channels_last_3d nothing is copied.
        queries, keys, values = (tensor.permute(0, 2, 3, 4, 1).flatten(1, 3) for tensor in (theta, phi, g))
        if self.kind == "softmax":
            scale = None if self.scaled else 1.0
            out = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], scale=scale)[:, 0]
        else:
            (tokens, width), places = keys.shape[1:], queries.shape[1]
            # A product of three matrices: the order with fewer multiplications.
            if width * (places + tokens) < 2 * places * tokens:
                out = queries @ (keys.transpose(1, 2) @ values / tokens)
            else:
                out = (queries @ keys.transpose(1, 2) / tokens) @ values
        return out.unflatten(1, theta.shape[2:]).permute(0, 4, 1, 2, 3)

    def extra_repr(self) -> str:
        return f"kind={self.kind}" + ("" if self.scaled else ", scaled=False")


def insert_non_local(
    model: nn.Module,
    places: Mapping[int, Iterable[int]],
    *,
    kind: str = "dot_product",
    pool: Sequence[int] = (1, 2, 2),
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
) -> None:
    """Put non-local blocks behind residual blocks of ``model``, in place; in the slow pathway where it has several.

    Args:
        model: a ``Net`` of this package.
        places: for a stage (2 for res2, up to 5) the residual blocks, counted from 0, that get one behind them.
        kind, pool, norm: as for :class:`NonLocal`; its inner channels are half of the block's.

    Raises ValueError for a stage or block that the model does not have.
    """
    from .stage import ResStage

    stages: list[ResStage] = []
    for block in cast("Iterable[nn.Module]", model.blocks):
        first = block.multipathway_blocks[0] if isinstance(block, MultiPathWayWithFuse) else block
        if isinstance(first, ResStage):
            stages.append(first)
    for stage, blocks in places.items():
        if not 2 <= stage < 2 + len(stages):
            raise ValueError(f"places must name stages of 2 to {1 + len(stages)}; got {stage}")
        for index in blocks:
            made = stages[stage - 2].res_blocks
            if not 0 <= index < len(made):
                raise ValueError(f"res{stage} has blocks 0 to {len(made) - 1}; got {index} in places")
            convolutions = [part for part in made[index].modules() if isinstance(part, nn.Conv3d)]
            channels = convolutions[-1].out_channels
            added = NonLocal(channels, channels // 2, kind=kind, pool=pool, norm=norm)
            added.to(convolutions[-1].weight).train(model.training)
            with torch.no_grad():
                init_weights(added)
            stages[stage - 2].add_non_local(index, added)
