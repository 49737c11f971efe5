"""r1c7/SlowFastNetworks: lateral connections are bare convolutions, the last linear layer has no bias."""

from ..nn.network_units import Every
from ._library import Library
from ._sequential_names import BOTTLENECK, LAYERS, network
from ._spelling import Spelling

LIBRARY = Library(
    name="r1c7",
    units={"Bottleneck": BOTTLENECK, "SlowFast": network(lambda net: Every(16, 2))},
    spelling=Spelling(
        name="r1c7",
        pathways=("slow", "fast"),
        first_stage=2,
        stem=("{pathway}_conv1", "{pathway}_bn1"),
        stem_lateral=("lateral_p1", None),
        lateral=("lateral_res{stage}", None),
        block="{pathway}_res{stage}.{block}.",
        layers=LAYERS,
        classifier="fc",
        classifier_bias=False,
    ),
)
