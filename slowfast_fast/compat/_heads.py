"""Heads of other libraries as those of nn/, made of the very same layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import _triple

from ..nn.fused import is_observed
from ..nn.head import ResNetBasicHead, ResNetRoIHead
from ..nn.net import PoolConcatPathway
from ..nn.units import Unit, part, randn, stock_class
from ._probe import computes_otherwise

# Activations to which it is the same where the channels are.
_EVERYWHERE = (nn.Sigmoid, nn.Identity, nn.ReLU)


def read(module: nn.Module) -> nn.Module | None:
    """The block of nn/, or blocks in a Sequential, that compute what a head does; None where there are none."""
    for head in HEADS:
        if stock_class(type(module)).__name__ == head.name and part(module, head.linear) is not None:
            view = head.view(module)
            if view is not None and computes_otherwise(module, head) is None:
                return view
    return None


@dataclass(frozen=True, kw_only=True)
class Head(Unit):
    """How a library's head is read; tried out as blocks are.

    Attributes:
        name: of its class.
        linear: the attribute that holds its classifier.
        view: the same head of nn/; None where that cannot be.
        pools: those of its pathways.
        boxes: whether it takes boxes beside features.
    """

    name: str
    linear: str
    view: Callable[[Any], nn.Module | None]
    pools: Callable[[Any], list[nn.Module | None]]
    boxes: bool = False

    def example(self, module: nn.Module, generator: torch.Generator) -> Any:
        """A place more than what the pools take, so that their windows slide; of boxes, two."""
        pools = self.pools(module)
        linear = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
        channels = 8 if linear is None else linear.in_features
        widths = [channels - (len(pools) - 1), *(1 for _ in pools[1:])]
        features = [
            randn((2, width, *_size(pool, self.boxes)), generator) for width, pool in zip(widths, pools, strict=True)
        ]
        x = features if len(features) > 1 or self.linear == "projection" else features[0]
        corners = torch.tensor([[0.0, 3.0, 5.0, 40.0, 61.0], [1.0, 0.0, 20.0, 90.0, 70.0]])
        return (x, corners) if self.boxes else (x,)

    def run(self, module: nn.Module, x: Any) -> Any:
        view = self.view(module)
        assert view is not None, "read() asks first"
        return view(*x)

    def run_stock(self, module: nn.Module, x: Any) -> Any:
        return stock_class(type(module)).forward(module, *x)


def _size(pool: nn.Module | None, one_frame: bool) -> tuple[int, ...]:
    kernel = (1, 2, 2) if isinstance(pool, nn.AdaptiveAvgPool3d) or pool is None else _triple(pool.kernel_size)
    return (kernel[0], kernel[1] + 1, kernel[2] + 2) if one_frame else (kernel[0], kernel[1], kernel[2] + 1)


def _basic(head: Any) -> nn.Module:
    return ResNetBasicHead(*(part(head, name) for name in ("pool", "dropout", "proj", "activation", "output_pool")))


def _of_boxes(head: Any) -> nn.Module:
    names = ("pool", "pool_spatial", "roi_layer", "dropout", "proj", "activation", "output_pool")
    return ResNetRoIHead(*(part(head, name) for name in names))


def _of_pathways(head: Any) -> list[nn.Module | None]:
    names = (f"pathway{pathway}_avgpool" for pathway in range(len(head._modules)))
    return [part(head, name) for name in names if part(head, name) is not None]


def _projection(head: Any) -> nn.Module | None:
    """PySlowFast's applies its activation in evaluation alone, to channels that come last, and averages."""
    act = part(head, "act")
    if type(act) is nn.Softmax and act.dim in (4, -1) and not is_observed(act):
        act = nn.Softmax(dim=1)
    elif act is not None and type(act) not in _EVERYWHERE:
        return None
    pools = PoolConcatPathway(pool=nn.ModuleList(_of_pathways(head)))  # type: ignore[arg-type]
    classifier = ResNetBasicHead(None, part(head, "dropout"), head.projection, act, nn.AdaptiveAvgPool3d(1))
    return nn.Sequential(pools, classifier)


HEADS = (
    Head(name="ResNetBasicHead", linear="proj", view=_basic, pools=lambda head: [part(head, "pool")]),
    Head(name="ResNetRoIHead", linear="proj", view=_of_boxes, pools=lambda head: [part(head, "pool")], boxes=True),
    Head(name="ResNetBasicHead", linear="projection", view=_projection, pools=_of_pathways),
)
