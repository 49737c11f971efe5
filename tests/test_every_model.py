"""Every name of the registry, as deep and inflated as it is registered, but narrow: evaluated, frozen, explained."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from family_reference import Plain
from network_testing import distance
from test_freeze import EXACT
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.models import create_model, entry, list_models

pytestmark = pytest.mark.usefixtures("one_thread")

BOXES = torch.tensor([[0.0, 3.0, 1.0, 20.0, 17.0]], dtype=torch.float64)
# What a name stands for and its weights do not show.
I3D: dict[str, Any] = {"pools_res2": True}
IN_TIME: dict[str, Any] = {**I3D, "stem_stride": 2}
AVA: dict[str, Any] = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
TABLE_5A: dict[str, Any] = {"alpha": 8}
KNOWN: dict[str, dict[str, Any]] = {
    "slowfast_r50_4x16": TABLE_5A,
    "slowfast_r50_ava": AVA,
    "slowfast_r101_nln_ava": {**AVA, "non_local_pool": (2, 2, 2)},
    "slowfast_r50_4x16_no_lateral": {**TABLE_5A, "lateral": "none"},
    "slowfast_r50_4x16_time_to_channel_sum": {
        **TABLE_5A,
        "lateral": "time_to_channel",
        "lateral_join": "sum",
        "lateral_activation": False,
    },
    "slowfast_r50_4x16_time_to_channel": {**TABLE_5A, "lateral": "time_to_channel", "lateral_activation": False},
    "slowfast_r50_4x16_sampling": {**TABLE_5A, "lateral": "sampling", "lateral_activation": False},
    "slowfast_r50_4x16_both_ways": {**TABLE_5A, "lateral_direction": "both"},
    "i3d_r50_8x8": I3D,
    "c2d_r50_8x8": I3D,
    "i3d_r50_32x2": IN_TIME,
    "i3d_r50_3x3x3_32x2": IN_TIME,
    "i3d_r18_32x2": IN_TIME,
}
# Blocks of each stage of a name's depth (He et al. 2016, and 2016b for 200).
DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class WithBoxes(nn.Module):
    def __init__(self, model: nn.Module, *others: Tensor) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Any) -> Tensor:
        return self.model(x, *self.others)


@pytest.mark.parametrize("name", [name for name in list_models() if name != "slowfast_convlstm"])
@torch.no_grad()
def test_as_registered(name: str) -> None:
    known = entry(name)
    options: dict[str, Any] = {"width": 16, "model_num_class": 5}
    if not known.boxes:
        options["head_pool"] = nn.AdaptiveAvgPool3d
    elif known.alpha is not None:
        options["frames"] = 2
    model = create_model(name, **options).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():  # betas, and the last gammas of blocks
            parameter.uniform_(0.05, 0.2)
    frames = [8] if known.alpha is None else [2, 2 * known.alpha]
    x: Any = [torch.randn(1, 3, t, 32, 33, dtype=torch.float64) for t in frames]
    x = x[0] if known.alpha is None else x
    others = (BOXES,) if known.boxes else ()
    weights = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    found = re.search(r"r(\d+)(?:_|$)", name)
    assert found is not None
    blocks = [key for key in weights if key.endswith("branch2.conv_a.weight")]
    assert len(blocks) == (1 if known.alpha is None else 2) * sum(DEPTHS[int(found[1])])
    settings = {"alpha": 4, "lateral": "conv", **KNOWN.get(name, {})}
    plain = Plain(weights=weights, training=False, **settings)
    run = Plain.resnet if known.alpha is None else Plain.detection if known.boxes else Plain.slowfast
    expected = run(plain, x, *others)
    frozen = slowfast_fast.freeze(model)
    assert distance(model(x, *others), expected) < EXACT
    assert distance(frozen(x, *others), expected) < EXACT
    for network in (model, frozen):
        rows = slowfast_fast.explain(WithBoxes(network, *others), x, show=False).rows
        fused = sum(row.backend == "cpu" for row in rows)
        bottlenecks = [key for key in weights if key.endswith("conv_c.weight")]
        assert fused >= len(bottlenecks), "of a basic block, but of no bottleneck, every layer may be PyTorch's"
        assert all(row.reason for row in rows)
