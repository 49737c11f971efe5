"""gluoncv's torch models: ``SlowFast``, and the single-pathway ``ResNet_SlowFast`` (Slow-only) and ``I3D_ResNetV1``."""

from typing import Any

from torch import nn

from ..nn.head import ResNetBasicHead
from ..nn.network_units import Contiguous, Every
from ._library import Library, Row, Whole
from ._sequential_names import BOTTLENECK, LAYERS, network
from ._spelling import Spelling


def _slow_only(network: Any) -> list[Row]:
    stem = [(network.conv1, network.bn1, network.relu), network.maxpool]
    return [([stem], None), *(([list(getattr(network, f"layer{stage}"))], None) for stage in range(1, 5))]


def _slow_only_head(network: Any) -> list[nn.Module]:
    if getattr(network, "feat_ext", False):
        return [network.avg_pool, nn.Flatten()]
    dropout = getattr(network, "dropout", None)
    return [ResNetBasicHead(network.avg_pool, dropout, network.fc, None, nn.AdaptiveAvgPool3d(1))]


def _i3d(network: Any) -> list[Row]:
    conv, norm, act, pool = network.first_stage
    rows: list[Row] = [([[(conv, norm, act), pool]], None)]
    for index, stage in enumerate(network.res_layers):
        rows += [([list(stage)], None), *([([[network.pool2]], None)] if index == 0 else [])]
    return rows


def _i3d_head(network: Any) -> list[nn.Module]:
    dropout, linear = network.head
    return [ResNetBasicHead(network.st_avg, dropout, linear, None, nn.AdaptiveAvgPool3d(1))]


LIBRARY = Library(
    name="gluoncv",
    units={
        "Bottleneck": BOTTLENECK,
        "SlowFast": network(lambda net: Every(net.slow_temporal_stride // 2, 1)),
        "NonLocal": Contiguous(marks=("g", "theta", "phi")),
    },
    networks={
        "ResNet_SlowFast": Whole(rows=_slow_only, head=_slow_only_head, alone=True),
        "I3D_ResNetV1": Whole(rows=_i3d, head=_i3d_head, alone=True),
    },
    spelling=Spelling(
        name="gluoncv",
        pathways=("slow", "fast"),
        first_stage=2,
        stem=("{pathway}_conv1", "{pathway}_bn1"),
        stem_lateral=("lateral_p1.0", "lateral_p1.1"),
        lateral=("lateral_res{stage}.0", "lateral_res{stage}.1"),
        block="{pathway}_res{stage}.{block}.",
        layers=LAYERS,
        classifier="fc",
    ),
)
