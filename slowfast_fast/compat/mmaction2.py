"""mmaction2: ``ResNet3dSlowFast``, ``ResNet3d`` and ``ResNet3dSlowOnly``, whose layers are mmcv's ``ConvModule``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.network_units import Contiguous, Stage, TwoPathways
from ..nn.units import Chain, Layer, Residual, open_steps
from ._library import Library, Row, Whole
from ._spelling import Spelling


def _not_conv_norm_act(module: nn.Module) -> str | None:
    order = tuple(getattr(module, "order", ("conv", "norm", "act")))
    if order != ("conv", "norm", "act"):
        return f"its order is {', '.join(order)}"
    return "it pads by itself" if getattr(module, "with_explicit_padding", False) else None


@dataclass(frozen=True)
class Nearest:
    """One of ``slow`` frames and one of ``fast``, as ``F.interpolate`` takes them."""

    slow: int
    fast: int

    def __call__(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        every = (self.slow, self.fast)
        slow, fast = (F.interpolate(clip, mode="nearest", scale_factor=(1.0 / n, 1.0, 1.0)) for n in every)
        return slow, fast


class BothPathways(nn.Module):
    """[slow, fast] as a tuple, which the library's heads take."""

    explains_itself = True

    def forward(self, x: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x)


def _stages(network: Any) -> Iterator[Stage]:
    slow = network.slow_path
    laterals = ["conv1_lateral", *slow.lateral_connections] if slow.lateral else []
    for index, name in enumerate(slow.res_layers):
        lateral = f"slow_path.{laterals[index]}" if laterals else None
        yield lateral, f"slow_path.{name}", f"fast_path.{name}"


def _bottleneck(names: tuple[str, ...]) -> Residual:
    return Residual(branch=names, shortcut="downsample", act="relu", then=("non_local_block",), checkpointed="with_cp")


def _one_pathway(network: Any) -> list[Row]:
    """Of a backbone, which gives features."""
    stem = [*open_steps(network.conv1), *([network.maxpool] if getattr(network, "with_pool1", True) else [])]
    rows: list[Row] = [([stem], None)]
    for index, name in enumerate(network.res_layers):
        rows.append(([list(getattr(network, name))], None))
        if index == 0 and getattr(network, "with_pool2", False):
            rows.append(([[network.pool2]], None))
    return rows


LIBRARY = Library(
    name="mmaction2",
    units={
        "ConvModule": Chain(chain=(Layer("conv", "norm", "activate"),), stock_if=_not_conv_norm_act),
        "Bottleneck3d": _bottleneck(("conv1", "conv2", "conv3")),
        "BasicBlock3d": _bottleneck(("conv1", "conv2")),
        "_NonLocalNd": Contiguous(marks=("g", "theta", "phi", "conv_out")),
        "SubBatchNorm3D": Contiguous(marks=("bn", "split_bn")),
        "ResNet3dSlowFast": TwoPathways(
            sampling=lambda network: Nearest(network.resample_rate, network.resample_rate // network.speed_ratio),
            stems=(("slow_path.conv1", "slow_path.maxpool"), ("fast_path.conv1", "fast_path.maxpool")),
            stages=_stages,
            head=lambda network, slow, fast: (slow, fast),
            head_blocks=lambda network: [BothPathways()],
        ),
    },
    networks={"ResNet3d": Whole(rows=_one_pathway, head=lambda network: [], alone=True)},
    spelling=Spelling(
        name="mmaction2",
        pathways=("slow", "fast"),
        first_stage=1,
        stem=("backbone.{pathway}_path.conv1.conv", "backbone.{pathway}_path.conv1.bn"),
        stem_lateral=("backbone.slow_path.conv1_lateral.conv", "backbone.slow_path.conv1_lateral.bn"),
        lateral=("backbone.slow_path.layer{stage}_lateral.conv", "backbone.slow_path.layer{stage}_lateral.bn"),
        block="backbone.{pathway}_path.layer{stage}.{block}.",
        layers={
            "shortcut": ("downsample.conv", "downsample.bn"),
            "a": ("conv1.conv", "conv1.bn"),
            "b": ("conv2.conv", "conv2.bn"),
            "c": ("conv3.conv", "conv3.bn"),
        },
        classifier="cls_head.fc_cls",
        fast_first=True,
        wrapper="state_dict",
    ),
)


def register() -> Callable[[], None]:
    """Make mmaction2 build accelerated backbones: takes the name ``ResNet3dSlowFast`` in its ``MODELS``.

    Configurations stay as they are; only models built from then on are accelerated. Returns a function that gives the
    name back. Raises ImportError where mmaction2 is not installed.
    """
    from ._accelerate import accelerate  # which knows this module

    try:
        backbones = importlib.import_module("mmaction.models.backbones")
        models = importlib.import_module("mmaction.registry").MODELS
    except ImportError as error:
        raise ImportError(f"register() changes mmaction2's registry, which cannot be imported: {error}") from error
    stock = backbones.ResNet3dSlowFast

    @functools.wraps(stock, updated=())
    def build(*arguments: Any, **keywords: Any) -> nn.Module:
        model = stock(*arguments, **keywords)
        accelerate(model)
        return model

    models.register_module(name="ResNet3dSlowFast", force=True, module=build)
    return lambda: models.register_module(name="ResNet3dSlowFast", force=True, module=stock)
