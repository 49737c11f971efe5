"""freeze() on recorded results of pytorchvideo's networks, and on configurations that hypothesis draws."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_testing import golden, inputs, relative
from network_testing import SMALL, distance
from test_freeze import EXACT, FP32, enliven
from test_slowfast_golden import NAMES, build
from torch import nn

import slowfast_fast
from slowfast_fast import freeze

pytest.importorskip("hypothesis", reason="configurations are drawn by hypothesis, which is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    frozen = freeze(build(name, "fused", torch.float32))
    assert relative(frozen(inputs(name, torch.float32)).double().numpy(), golden(name)["eval_logits"]) < FP32


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of create_slowfast in which every piece of the frozen network comes in more than one form."""
    taps = st.sampled_from(((1, 1, 1), (3, 1, 1), (5, 1, 1)))
    alpha = draw(st.sampled_from((2, 4)))
    groups, stem = st.sampled_from((1, 2)), st.sampled_from(((1, 3, 3), (1, 7, 7), (3, 5, 5)))
    stages = lambda value: draw(st.tuples(st.tuples(*(value,) * 4), st.tuples(*(value,) * 4)))  # noqa: E731
    return {
        **SMALL,
        "stem_dim_outs": draw(st.sampled_from(((16, 4), (32, 8)))),
        "slowfast_fusion_conv_kernel_size": (draw(st.sampled_from((3, 5, 7))), 1, 1),
        "slowfast_fusion_conv_stride": (alpha, 1, 1),
        "stem_conv_kernel_sizes": draw(st.tuples(stem, stem)),
        "stem_conv_strides": draw(st.sampled_from((((1, 2, 2),) * 2, ((1, 1, 1),) * 2))),
        "stem_pool": draw(st.sampled_from((nn.MaxPool3d, None))),
        "stage_conv_a_kernel_sizes": stages(taps),
        "stage_conv_b_num_groups": stages(groups),
        "stage_spatial_strides": (draw(st.sampled_from(((1, 2, 2, 2), (1, 1, 2, 1)))),) * 2,
        "stage_temporal_strides": ((1, 1, 1, 1),) * 2,
        "head_pool": nn.AdaptiveAvgPool3d,
        "norm": draw(st.sampled_from((nn.BatchNorm3d, None))),
        "activation": draw(st.sampled_from((nn.ReLU, nn.ReLU, nn.SiLU, None))),
        "head_activation": draw(st.sampled_from((None, nn.Softmax))),
        "head_output_with_global_average": draw(st.booleans()),
    }


@given(
    options=configurations(),
    batch=st.integers(0, 6),
    frames=st.integers(1, 3),
    size=st.tuples(st.integers(16, 40), st.integers(16, 40)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
@torch.no_grad()
def test_any_configuration(options: dict[str, Any], batch: int, frames: int, size: tuple[int, int], seed: int) -> None:
    """In float64 there is nothing but the arithmetic; in float32 the kernels of every layer are others."""
    torch.manual_seed(seed)
    model = slowfast_fast.create_slowfast(**options).double().eval()
    enliven(model)
    alpha = options["slowfast_fusion_conv_stride"][0]
    x = [torch.randn(batch, 3, t, *size, dtype=torch.float64) for t in (frames, alpha * frames)]
    expected = model([clip if batch else clip.new_zeros(1, *clip.shape[1:]) for clip in x])
    exact = freeze(model)(x)
    assert exact.shape == (batch, *expected.shape[1:])
    if batch == 0:
        return
    assert distance(exact, expected) < EXACT
    single = copy.deepcopy(model).float()
    assert distance(freeze(single)([clip.float() for clip in x]).double(), expected) < FP32
