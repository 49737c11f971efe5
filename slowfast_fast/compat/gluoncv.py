"""gluoncv's torch models: ``SlowFast``, and the single-pathway ``ResNet_SlowFast`` (Slow-only) and ``I3D_ResNetV1``."""

from ..nn.network_units import Contiguous, Every
from ._library import Library
from ._sequential_names import BOTTLENECK, LAYERS, network
from ._spelling import Spelling

LIBRARY = Library(
    name="gluoncv",
    units={
        "Bottleneck": BOTTLENECK,
        "SlowFast": network(lambda net: Every(net.slow_temporal_stride // 2, 1)),
        "NonLocal": Contiguous(marks=("g", "theta", "phi")),
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
