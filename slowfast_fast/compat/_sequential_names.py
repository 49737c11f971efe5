"""What gluoncv's torch networks and r1c7's SlowFastNetworks, from which they derive, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.head import ResNetBasicHead
from ..nn.net import PoolConcatPathway
from ..nn.network_units import Sampling, TwoPathways
from ..nn.units import Layer, Residual

BOTTLENECK = Residual(
    branch=(Layer("conv1", "bn1", "relu"), Layer("conv2", "bn2", "relu"), Layer("conv3", "bn3")),
    shortcut="downsample",
    act="relu",
    then=("nonlocal_block",),
    checkpointed="with_cp",
)
LAYERS = {
    "shortcut": ("downsample.0", "downsample.1"),
    "a": ("conv1", "bn1"),
    "b": ("conv2", "bn2"),
    "c": ("conv3", "bn3"),
}


def network(sampling: Callable[[Any], Sampling]) -> TwoPathways:
    """``SlowFast``, with the frames that ``sampling`` takes for its pathways."""
    slow, fast = (
        (Layer(f"{pathway}_conv1", f"{pathway}_bn1", f"{pathway}_relu"), f"{pathway}_maxpool")
        for pathway in ("slow", "fast")
    )
    stages = tuple(
        (f"lateral_{before}", f"slow_{stage}", f"fast_{stage}")
        for before, stage in (("p1", "res2"), ("res2", "res3"), ("res3", "res4"), ("res4", "res5"))
    )
    others = tuple(name for names in stages for name in names)
    return TwoPathways(
        sampling=sampling,
        stems=(slow, fast),
        stages=lambda network: stages,
        head=_head,
        head_blocks=_head_blocks,
        others=(*others, "avg", "dp", "fc"),
    )


def _head(network: Any, slow: Tensor, fast: Tensor) -> Tensor:
    features = torch.cat([F.adaptive_avg_pool3d(x, 1).flatten(1) for x in (slow, fast)], 1)
    if getattr(network, "feat_ext", False):
        return features
    return network.fc(network.dp(features))


def _head_blocks(network: Any) -> list[nn.Module]:
    pools = PoolConcatPathway(pool=nn.ModuleList(nn.AdaptiveAvgPool3d(1) for _ in range(2)))
    if getattr(network, "feat_ext", False):
        return [pools, nn.Flatten()]
    return [pools, ResNetBasicHead(None, network.dp, network.fc, None, nn.AdaptiveAvgPool3d(1))]
