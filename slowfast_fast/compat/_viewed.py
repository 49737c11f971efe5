"""Heads and non-local blocks of other libraries as those of nn/, made of the very same layers, and tried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.utils import _triple

from ..nn.fused import Parts, is_observed
from ..nn.head import ResNetBasicHead, ResNetRoIHead
from ..nn.net import PoolConcatPathway
from ..nn.non_local import KINDS, NonLocal
from ..nn.units import Unit, forward_class, open_steps, part, randn, stock_class
from ._probe import computes_otherwise

# Activations to which it is the same where the channels are.
_EVERYWHERE = (nn.Sigmoid, nn.Identity, nn.ReLU)


def read(module: nn.Module) -> nn.Module | None:
    """The block of nn/, or blocks in a Sequential, that compute what a module does; None where there are none."""
    for known in VIEWED:
        if forward_class(type(module)).__name__ == known.name and part(module, known.mark) is not None:
            view = known.view(module)
            if view is not None and computes_otherwise(module, known) is None:
                return view
    return None


@dataclass(frozen=True, kw_only=True)
class Viewed(Unit):
    """A module that ``accelerate`` leaves as it is.

    Attributes:
        name: of its class.
        mark: an attribute that it must have.
        view: the same of nn/; None where that cannot be.
    """

    name: str
    mark: str
    view: Callable[[Any], nn.Module | None]

    def example(self, module: nn.Module, generator: torch.Generator) -> Any:
        """Its arguments."""
        return (super().example(module, generator),)

    def run(self, module: nn.Module, x: Any) -> Any:
        view = self.view(module)
        assert view is not None, "read() asks first"
        first, *others = x
        *before, last = view if type(view) is nn.Sequential else [view]
        return last(reduce(lambda given, block: block(given), before, first), *others)

    def run_stock(self, module: nn.Module, x: Any) -> Any:
        return stock_class(type(module)).forward(module, *x)


@dataclass(frozen=True, kw_only=True)
class Head(Viewed):
    """A library's head; ``mark`` is its classifier.

    Attributes:
        pools: those of its pathways.
        listed: whether it takes a list of these.
        boxes: whether it takes boxes beside features.
    """

    pools: Callable[[Any], list[nn.Module | None]]
    listed: bool = False
    boxes: bool = False

    def example(self, module: nn.Module, generator: torch.Generator) -> Any:
        """A place more than what the pools take, so that their windows slide; of boxes, two."""
        pools = self.pools(module)
        linear = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
        channels = 8 if linear is None else linear.in_features
        share = channels // len(pools)
        widths = [channels - share * (len(pools) - 1), *(share for _ in pools[1:])]
        shapes = [(2, width, *_size(pool, self.boxes)) for width, pool in zip(widths, pools, strict=True)]
        features = [randn(shape, generator) for shape in shapes]
        x = features if self.listed else features[0]
        corners = torch.tensor([[0.0, 3.0, 5.0, 40.0, 61.0], [1.0, 0.0, 20.0, 90.0, 70.0]])
        return (x, corners) if self.boxes else (x,)


def _size(pool: nn.Module | None, one_frame: bool) -> tuple[int, ...]:
    kernel = (1, 2, 2) if isinstance(pool, nn.AdaptiveAvgPool3d) or pool is None else _triple(pool.kernel_size)
    return (kernel[0], kernel[1] + 1, kernel[2] + 2) if one_frame else (kernel[0], kernel[1], kernel[2] + 1)


def _basic(head: Any) -> nn.Module:
    return ResNetBasicHead(*(part(head, name) for name in ("pool", "dropout", "proj", "activation", "output_pool")))


def _of_boxes(head: Any) -> nn.Module:
    names = ("pool", "pool_spatial", "roi_layer", "dropout", "proj", "activation", "output_pool")
    return ResNetRoIHead(*(part(head, name) for name in names))


def _each(head: Any, name: str) -> list[nn.Module | None]:
    """What each pathway has under a name with its number in it."""
    held = (part(head, name.format(pathway)) for pathway in range(len(head._modules)))
    return [module for module in held if module is not None]


def _of_pathways(head: Any) -> list[nn.Module | None]:
    return _each(head, "pathway{}_avgpool")


def _over_time(head: Any) -> list[nn.Module | None]:
    return _each(head, "s{}_tpool")


def _alike(modules: list[Any]) -> bool:
    """Of modules without parameters, by their options."""
    options = [{name: value for name, value in vars(module).items() if name[0] != "_"} for module in modules]
    return all(type(module) is type(modules[0]) for module in modules) and all(o == options[0] for o in options)


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


def _of_boxes_each(head: Any) -> nn.Module | None:
    """PySlowFast's samples the pathways one by one, where one layer can sample both if theirs are alike."""
    pools, act, average = _over_time(head), part(head, "act"), nn.AdaptiveAvgPool3d(1)
    alike = all(_alike(_each(head, name)) for name in ("s{}_roi", "s{}_spool"))
    if not (pools and alike) or (act is not None and type(act) not in _EVERYWHERE):
        return None
    parts = (None, *(part(head, name) for name in ("s0_spool", "s0_roi", "dropout", "projection")), act, average)
    of_boxes = ResNetRoIHead(*parts)
    return nn.Sequential(PoolConcatPathway(pool=nn.ModuleList(pools)), of_boxes)  # type: ignore[arg-type]


def _non_local(block: Any) -> nn.Module | None:
    """PySlowFast's has the names of ours."""
    kind = getattr(block, "instantiation", "dot_product")
    layers = [(part(block, name), None, None) for name in ("conv_theta", "conv_phi", "conv_g")]
    return _attending(layers, (block.conv_out, part(block, "bn"), None), kind, part(block, "pool"))


def _non_local_of_mmcv(block: Any) -> nn.Module | None:
    """Every convolution in a module of its own, those of keys and values with the pool behind them."""
    mode = getattr(block, "mode", None)
    kind = "softmax" if mode == "embedded_gaussian" else str(mode)
    held = [part(block, name) for name in ("theta", "phi", "g")]
    pools = [module[1] if type(module) is nn.Sequential and len(module) == 2 else None for module in held]
    steps = [open_steps(module if pool is None else module[0]) for module, pool in zip(held, pools, strict=True)]
    steps.append(open_steps(block.conv_out))
    if any(len(row) != 1 or not isinstance(row[0], tuple) for row in steps) or pools[0] or pools[1] is not pools[2]:
        return None
    *layers, out = (cast(Parts, row[0]) for row in steps)
    return _attending(layers, out, kind, pools[1], projected=True, scaled=getattr(block, "use_scale", True))


def _non_local_of_gluoncv(block: Any) -> nn.Module | None:
    if getattr(block, "nonlocal_type", None) != "gaussian" or getattr(block, "sub_sample", False):
        return None
    layers = [(part(block, name), None, None) for name in ("theta", "phi", "g")]
    return _attending(layers, (block.W, part(block, "bn"), None), "softmax", None)


def _attending(
    layers: Sequence[Parts], out: Parts, kind: str, pool: nn.Module | None, projected: bool = False, scaled: bool = True
) -> nn.Module | None:
    """Of theta, phi and g, and of the last layer."""
    convolutions = [conv for conv, norm, act in layers if norm is None and act is None and type(conv) is nn.Conv3d]
    if kind not in KINDS or len(convolutions) != 3 or out[2] is not None:
        return None
    theta = convolutions[0]
    view = NonLocal(theta.in_channels, theta.out_channels, kind=kind, pool=(1, 1, 1), norm=None)
    view.conv_theta, view.conv_phi, view.conv_g = convolutions
    view.conv_out, view.norm = cast(nn.Conv3d, out[0]), out[1]
    view.pool, view.pools_projected = cast("nn.MaxPool3d | None", pool), projected
    view.attention.scaled = scaled
    return view


VIEWED = (
    Head(name="ResNetBasicHead", mark="proj", view=_basic, pools=lambda head: [part(head, "pool")]),
    Head(name="ResNetRoIHead", mark="proj", view=_of_boxes, pools=lambda head: [part(head, "pool")], boxes=True),
    Head(name="ResNetBasicHead", mark="projection", view=_projection, pools=_of_pathways, listed=True),
    Head(name="ResNetRoIHead", mark="s0_roi", view=_of_boxes_each, pools=_over_time, listed=True, boxes=True),
    Viewed(name="Nonlocal", mark="conv_theta", view=_non_local),
    Viewed(name="_NonLocalNd", mark="theta", view=_non_local_of_mmcv),
    Viewed(name="NonLocal", mark="W", view=_non_local_of_gluoncv),
)
