"""PySlowFast (facebookresearch/SlowFast): ``SlowFast`` and ``ResNet``, which is Slow-only, I3D and C2D there."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.nn.modules.utils import _triple

from ..nn.network_units import Contiguous
from ..nn.units import Chain, Lateral, Layer, Residual
from ._library import Library, Row, Whole
from ._spelling import Spelling


def _drops_branches(block: nn.Module) -> str | None:
    rate = getattr(block, "_drop_connect_rate", 0.0)
    return f"drop_connect_rate is {rate}" if rate else None


def _rows(network: Any) -> list[Row]:
    prefixes = [f"pathway{pathway}_" for pathway in range(2) if hasattr(network.s1, f"pathway{pathway}_stem")]
    rows: list[Row] = []
    for number in range(1, 6):
        stage = network.get_submodule(f"s{number}")
        blocks = [[block for name, block in stage.named_children() if name.startswith(p)] for p in prefixes]
        rows.append((blocks, getattr(network, f"s{number}_fuse", None)))
        if number == 2:
            pools = [getattr(network, f"{prefix}pool") for prefix in prefixes]
            if any(_triple(size) != (1, 1, 1) for pool in pools for size in (pool.kernel_size, pool.stride)):
                rows.append(([[pool] for pool in pools], None))
    return rows


NETWORK = Whole(rows=_rows, head=lambda network: [network.head], held="head")

LIBRARY = Library(
    name="PySlowFast",
    units={
        "ResNetBasicStem": Chain(chain=(Layer("conv", "bn", "relu"),), then=("pool_layer",)),
        "BottleneckTransform": Chain(
            chain=(Layer("a", "a_bn", "a_relu"), Layer("b", "b_bn", "b_relu"), Layer("c", "c_bn"))
        ),
        "BasicTransform": Chain(chain=(Layer("a", "a_bn", "a_relu"), Layer("b", "b_bn"))),
        "ResBlock": Residual(
            branch=("branch2",), shortcut=Layer("branch1", "branch1_bn"), act="relu", stock_if=_drops_branches
        ),
        "FuseFastToSlow": Lateral(layer=Layer("conv_f2s", "bn", "relu")),
        "Nonlocal": Contiguous(marks=("conv_theta", "conv_phi", "conv_g", "conv_out")),
        "SubBatchNorm3d": Contiguous(marks=("bn", "split_bn")),
    },
    networks={"SlowFast": NETWORK, "ResNet": NETWORK},
    spelling=Spelling(
        name="pyslowfast",
        pathways=("0", "1"),
        first_stage=2,
        stem=("s1.pathway{pathway}_stem.conv", "s1.pathway{pathway}_stem.bn"),
        lateral=("s{stage}_fuse.conv_f2s", "s{stage}_fuse.bn"),
        block="s{stage}.pathway{pathway}_res{block}.",
        layers={
            "shortcut": ("branch1", "branch1_bn"),
            "a": ("branch2.a", "branch2.a_bn"),
            "b": ("branch2.b", "branch2.b_bn"),
            "c": ("branch2.c", "branch2.c_bn"),
        },
        nonlocal_block="s{stage}.pathway{pathway}_nonlocal{block}.",
        nonlocal_layers={
            "theta": "conv_theta",
            "phi": "conv_phi",
            "g": "conv_g",
            "out": "conv_out",
            "norm": "bn",
        },
        classifier="head.projection",
        wrapper="model_state",
    ),
)


def register() -> None:
    """Add ``SlowFastFast`` to PySlowFast's ``MODEL_REGISTRY``: ``SlowFast``, accelerated once it is built.

    A configuration takes it with ``MODEL.MODEL_NAME SlowFastFast``; ``MODEL.ARCH`` stays ``slowfast``. Does nothing
    where it is registered. Raises ImportError where PySlowFast is not installed.
    """
    from ._accelerate import accelerate  # which knows this module

    try:
        registry = importlib.import_module("slowfast.models.build").MODEL_REGISTRY
        stock = importlib.import_module("slowfast.models.video_model_builder").SlowFast
    except ImportError as error:
        raise ImportError(f"register() changes PySlowFast's registry, which cannot be imported: {error}") from error

    def SlowFastFast(cfg: Any) -> nn.Module:  # the registry takes the name of what it is given
        model = stock(cfg)
        accelerate(model)
        return model

    if "SlowFastFast" not in registry:
        registry.register(SlowFastFast)
