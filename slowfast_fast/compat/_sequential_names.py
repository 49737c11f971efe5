"""What gluoncv's torch networks and r1c7's SlowFastNetworks, from which they derive, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.network_units import TwoPathways
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


def network(sample: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> TwoPathways:
    """``SlowFast``, with the frames that ``sample`` takes for its pathways."""
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
        sample=sample,
        stems=(slow, fast),
        stages=lambda network: stages,
        head=_head,
        others=(*others, "avg", "dp", "fc"),
    )


def _head(network: Any, slow: Tensor, fast: Tensor) -> Tensor:
    features = torch.cat([F.adaptive_avg_pool3d(x, 1).flatten(1) for x in (slow, fast)], 1)
    if getattr(network, "feat_ext", False):
        return features
    return network.fc(network.dp(features))
