"""pytorchvideo: ``create_slowfast``, ``create_slowfast_with_roi_head``, ``create_resnet`` and other ``Net``s."""

from __future__ import annotations

import functools
import importlib
import sys
from types import FunctionType, ModuleType, TracebackType
from typing import Any

from torch import nn

from .. import models
from ..nn.net import MultiPathWayWithFuse, PoolConcatPathway
from ..nn.network_units import Counterpart
from ..nn.units import Chain, Lateral, Layer, Residual
from ._library import Library
from ._spelling import Spelling


def _not_a_sum(block: nn.Module) -> str | None:
    name = getattr(block.branch_fusion, "__name__", type(block.branch_fusion).__name__)
    return None if name == "_trivial_sum" else f"its branches are joined by {name}"


LIBRARY = Library(
    name="pytorchvideo",
    units={
        "ResNetBasicStem": Chain(chain=(Layer("conv", "norm", "activation"),), then=("pool",)),
        "BottleneckBlock": Chain(
            chain=(
                Layer("conv_a", "norm_a", "act_a"),
                Layer("conv_b", "norm_b", "act_b"),
                Layer("conv_c", "norm_c"),
            )
        ),
        "ResBlock": Residual(
            branch=("branch2",),
            shortcut=Layer("branch1_conv", "branch1_norm"),
            act="activation",
            stock_if=_not_a_sum,
        ),
        "FuseFastToSlow": Lateral(layer=Layer("conv_fast_to_slow", "norm", "activation")),
        "MultiPathWayWithFuse": Counterpart(
            ours=MultiPathWayWithFuse, children=("multipathway_blocks", "multipathway_fusion")
        ),
        "PoolConcatPathway": Counterpart(ours=PoolConcatPathway, children=("pool",)),
    },
    left_alone={"FuseAudioToFastSlow": "audio-visual networks are left alone"},
    spelling=Spelling(
        name="pytorchvideo",
        pathways=("0", "1"),
        first_stage=1,
        stem=("blocks.0.multipathway_blocks.{pathway}.conv", "blocks.0.multipathway_blocks.{pathway}.norm"),
        lateral=(
            "blocks.{stage}.multipathway_fusion.conv_fast_to_slow",
            "blocks.{stage}.multipathway_fusion.norm",
        ),
        block="blocks.{stage}.multipathway_blocks.{pathway}.res_blocks.{block}.",
        layers={
            "shortcut": ("branch1_conv", "branch1_norm"),
            "a": ("branch2.conv_a", "branch2.norm_a"),
            "b": ("branch2.conv_b", "branch2.norm_b"),
            "c": ("branch2.conv_c", "branch2.norm_c"),
        },
        # pytorchvideo itself has no non-local blocks; these keys are those of this package's networks.
        nonlocal_block="blocks.{stage}.multipathway_blocks.{pathway}.non_local.{block}.",
        nonlocal_layers={
            "theta": "conv_theta",
            "phi": "conv_phi",
            "g": "conv_g",
            "out": "conv_out",
            "norm": "norm",
        },
        classifier="blocks.6.proj",
        wrapper="model_state",
    ),
)


class Patch:
    """What :func:`patch` did. ``undo()`` takes it back; as a context manager, at the end of the block."""

    def __init__(self, stock: Any, ours: Any) -> None:
        self._stock, self._ours = stock, ours

    def undo(self) -> None:
        """Gives back pytorchvideo's own constructor wherever ours is, modules imported since then included."""
        _replace(self._ours, self._stock)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch() -> Patch:
    """Make pytorchvideo build fused networks: puts ``slowfast_fast.create_slowfast`` in place of its own.

    The constructor is replaced wherever it was imported by name, in pytorchvideo, in its hub (whose builders have it as
    a default argument) and in any other module, and in modules imported later. ``create_slowfast_with_roi_head``
    builds on it. Models built before are not changed; ``accelerate`` does that.

    Returns a :class:`Patch`. Raises ImportError where pytorchvideo is not installed, RuntimeError where it is patched.
    """
    try:
        module = importlib.import_module("pytorchvideo.models.slowfast")
    except ImportError as error:
        raise ImportError(f"patch() changes pytorchvideo, which cannot be imported: {error}") from error
    stock = module.create_slowfast
    if hasattr(stock, "_patches"):
        raise RuntimeError("pytorchvideo is patched already; undo() that patch first")

    @functools.wraps(models.create_slowfast)
    def create_slowfast(**keywords: Any) -> nn.Module:
        return models.create_slowfast(**keywords)

    create_slowfast._patches = stock  # type: ignore[attr-defined]  # tells it from slowfast_fast.create_slowfast
    _replace(stock, create_slowfast)
    return Patch(stock, create_slowfast)


def _replace(old: Any, new: Any) -> None:
    """Wherever a module of the process holds ``old`` under a name or as a default argument of a function."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
            if type(value) is FunctionType and any(default is old for default in value.__defaults__ or ()):
                value.__defaults__ = tuple(new if default is old else default for default in value.__defaults__ or ())
