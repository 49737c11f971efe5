"""How blocks form a network: several pathways side by side, their fusion, and blocks in a row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._layout import as_rows
from .stem import ResNetBasicStem
from .units import UNIT, Chain


class MultiPathWayWithFuse(nn.Module):
    """One block for each pathway, then their fusion; a block or the fusion may be None.

    The counterpart of ``pytorchvideo.models.net.MultiPathWayWithFuse``, except that the list given is left alone.
    """

    def __init__(self, *, multipathway_blocks: nn.ModuleList, multipathway_fusion: nn.Module | None) -> None:
        super().__init__()
        self.multipathway_blocks = multipathway_blocks
        self.multipathway_fusion = multipathway_fusion

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """One (N, C, T, H, W) tensor for each pathway -> the same.

        Pathways are laid out as rows here, once, so that every op behind reads them in place; a stem does it itself.
        """
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"x must be a list with one tensor for each pathway; got {type(x).__name__}")
        if len(x) < len(self.multipathway_blocks):
            raise ValueError(f"x must have {len(self.multipathway_blocks)} tensors, one for each pathway; got {len(x)}")
        out = list(x)
        for pathway, block in enumerate(self.multipathway_blocks):
            if block is not None:
                if out[pathway].dim() != 5:
                    raise ValueError(f"x[{pathway}] must be (N, C, T, H, W); got shape {tuple(out[pathway].shape)}")
                out[pathway] = block(out[pathway] if _lays_out(block) else as_rows(out[pathway], f"x[{pathway}]"))
        return out if self.multipathway_fusion is None else self.multipathway_fusion(out)


def _lays_out(block: nn.Module) -> bool:
    """Whether a block decides for itself if its input has to be copied: stems, and those of other libraries."""
    return isinstance(block, ResNetBasicStem) or isinstance(getattr(type(block), UNIT, None), Chain)


class PoolConcatPathway(nn.Module):
    """Pools every pathway and concatenates the results along the channels.

    The counterpart of ``pytorchvideo.models.slowfast.PoolConcatPathway``, except that the list given is left alone.

    Args:
        retain_list: return the result in a list.
        pool: one pool for each pathway, each may be None; None pools nothing.
    """

    def __init__(self, retain_list: bool = False, pool: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.retain_list = retain_list
        self.pool = pool

    def forward(self, x: Sequence[Tensor | None]) -> Tensor | list[Tensor]:
        """One (N, C, T, H, W) tensor or None for each pathway -> (N, sum of C, T', H', W')."""
        pools = [None] * len(x) if self.pool is None else self.pool
        if len(pools) != len(x):
            raise ValueError(f"x must have one tensor for each of {len(pools)} pools; got {len(x)}")
        pooled = [
            tensor if pool is None else pool(tensor)
            for tensor, pool in zip(x, pools, strict=True)
            if tensor is not None
        ]
        out = torch.cat(pooled, 1)
        return [out] if self.retain_list else out


class Net(nn.Module):
    """Blocks in a row, initialised by ``init_weights``; the counterpart of ``pytorchvideo.models.net.Net``."""

    def __init__(self, *, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        init_weights(self)

    def forward(self, x: Sequence[Tensor] | Tensor) -> Tensor:
        """What the first block takes -> what the last one gives.

        For SlowFast: [slow, fast] -> (N, classes); for one pathway: (N, C, T, H, W) -> (N, classes).
        """
        # One clip is laid out as rows here, as those of several pathways are in MultiPathWayWithFuse.
        out: Any = as_rows(x, "x") if isinstance(x, Tensor) and x.dim() == 5 else x
        for block in self.blocks:
            out = block(out)
        return out


class DetectionBBoxNetwork(nn.Module):
    """Features, and a head that reads boxes from them, as ``pytorchvideo.models.net.DetectionBBoxNetwork``."""

    def __init__(self, model: nn.Module, detection_head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.detection_head = detection_head

    def forward(self, x: Sequence[Tensor], bboxes: Tensor) -> Tensor:
        """[slow, fast] and boxes (B, 5) of (clip, x1, y1, x2, y2), in pixels -> (B, classes)."""
        return torch.flatten(self.detection_head(self.model(x), bboxes), 1)


def init_weights(model: nn.Module, linear_std: float = 0.01) -> None:
    """The initial weights of pytorchvideo's networks, drawn in the order of ``model.modules()``.

    Convolutions: normal with the fan-out variance for ReLU (He et al., 2015), bias 0. Norms: gamma 1, or 0 where the
    norm is marked ``block_final_bn``, so that every residual block starts as its shortcut; beta 0. Linear: normal with
    ``linear_std``, or uniform with the fan-in bound (Glorot) where marked ``xavier_init``; bias 0.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            if module.weight is not None:
                nn.init.constant_(module.weight, 0.0 if getattr(module, "block_final_bn", False) else 1.0)
        elif isinstance(module, nn.Linear):
            if getattr(module, "xavier_init", False):
                nn.init.kaiming_uniform_(module.weight, a=1)
            else:
                nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
