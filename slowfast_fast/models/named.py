"""The models that have a name: the paper's table, its ablations, other depths, and single pathways.

T x tau in a name is the slow pathway's (or the one pathway's) number of frames and their distance in the video.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import FAST, Inflation, single_pathway, slowfast_network
from .registry import register

# 101-50-50: 101 layers, of whose 23 blocks in res4 the first 6 are inflated, as many as R50 has.
_LIKE_R50: Inflation = ("3x1x1",) * 6 + ("none",) * 17
_R101_50_50: dict[str, Any] = {
    "depth": 101,
    "lateral_kernel": 5,
    "slow_inflation": ("none", "none", _LIKE_R50, "3x1x1"),
    "fast_inflation": ("3x1x1", "3x1x1", _LIKE_R50, "3x1x1"),
}
_NON_LOCAL: dict[str, Any] = {"non_local": {4: (6, 13, 20)}}  # of R101, section 4.1 of the paper


@register(frames=4, tau=16, alpha=8, gflops=36.1)
def slowfast_r50_4x16(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50 (Table 2)."""
    return slowfast_network(**{"frames": 4, "alpha": 8, "lateral_kernel": 5, **overrides})


@register(frames=8, tau=8, alpha=4, gflops=65.7)
def slowfast_r50_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R50 (Table 2); the defaults of pytorchvideo's create_slowfast."""
    return slowfast_network(**overrides)


@register(frames=8, tau=8, alpha=4, gflops=106)
def slowfast_r101_50_50_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R101 (Table 2), inflated where R50 is."""
    return slowfast_network(**{**_R101_50_50, **overrides})


@register(frames=8, tau=8, alpha=4)
def slowfast_r101_101_101_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R101, inflated in every block of res4; pytorchvideo's slowfast_r101."""
    return slowfast_network(**{"depth": 101, "lateral_kernel": 5, **overrides})


@register(frames=16, tau=8, alpha=4, gflops=213)
def slowfast_r101_16x8(**overrides: Any) -> nn.Module:
    """SlowFast 16x8, R101 (Table 2), inflated where R50 is."""
    return slowfast_network(**{**_R101_50_50, "frames": 16, **overrides})


@register(frames=16, tau=8, alpha=4, gflops=234)
def slowfast_r101_nln_16x8(**overrides: Any) -> nn.Module:
    """SlowFast 16x8, R101, with non-local blocks in res4 (Table 2)."""
    return slowfast_network(**{**_R101_50_50, **_NON_LOCAL, "frames": 16, **overrides})


@register(frames=8, tau=8, alpha=4, boxes=True, activation="sigmoid")
def slowfast_r50_ava(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R50, for AVA detection: res5 with stride 1 and dilation 2, a head that takes boxes."""
    return slowfast_network(**{"detection": True, **overrides})


@register(frames=8, tau=8, alpha=4, boxes=True, activation="sigmoid")
def slowfast_r101_nln_ava(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R101, with non-local blocks, for AVA detection."""
    non_local = {**_NON_LOCAL, "non_local_pool": (2, 2, 2)}
    return slowfast_network(**{**_R101_50_50, **non_local, "detection": True, **overrides})


@register(frames=16, tau=8, alpha=4)
def slowfast_r50_16x8_ssv2(**overrides: Any) -> nn.Module:
    """SlowFast 16x8, R50, for Something-Something v2 (174 classes)."""
    return slowfast_network(**{"frames": 16, "model_num_class": 174, **overrides})


@register(frames=16, tau=8, alpha=4, activation="sigmoid")
def slowfast_r50_16x8_charades(**overrides: Any) -> nn.Module:
    """SlowFast 16x8, R50, for Charades (157 classes, several at a time: train it with sigmoids)."""
    return slowfast_network(**{"frames": 16, "model_num_class": 157, **overrides})


@register(frames=8, tau=8, alpha=4)
def slowfast_r18_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R18 (basic blocks)."""
    return slowfast_network(**{"depth": 18, **overrides})


@register(frames=8, tau=8, alpha=4)
def slowfast_r34_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R34 (basic blocks)."""
    return slowfast_network(**{"depth": 34, **overrides})


@register(frames=8, tau=8, alpha=4)
def slowfast_r152_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R152."""
    return slowfast_network(**{"depth": 152, **overrides})


@register(frames=8, tau=8, alpha=4)
def slowfast_r200_8x8(**overrides: Any) -> nn.Module:
    """SlowFast 8x8, R200."""
    return slowfast_network(**{"depth": 200, **overrides})


@register(frames=4, tau=16, alpha=8, gflops=34.2)
def slowfast_r50_4x16_no_lateral(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50, whose pathways meet in the head only (Table 5a)."""
    return slowfast_r50_4x16(**{"lateral": "none", **overrides})


@register(frames=4, tau=16, alpha=8, gflops=34.2)
def slowfast_r50_4x16_time_to_channel_sum(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50, fast frames as channels, added (Table 5a)."""
    return slowfast_r50_4x16(**{"lateral": "time_to_channel", "lateral_join": "sum", **overrides})


@register(frames=4, tau=16, alpha=8, gflops=39.8)
def slowfast_r50_4x16_time_to_channel(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50, fast frames as channels, concatenated (Table 5a)."""
    return slowfast_r50_4x16(**{"lateral": "time_to_channel", **overrides})


@register(frames=4, tau=16, alpha=8, gflops=34.9)
def slowfast_r50_4x16_sampling(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50, one of alpha fast frames, concatenated (Table 5a)."""
    return slowfast_r50_4x16(**{"lateral": "sampling", **overrides})


@register(frames=4, tau=16, alpha=8)
def slowfast_r50_4x16_both_ways(**overrides: Any) -> nn.Module:
    """SlowFast 4x16, R50, lateral convolutions from fast to slow and from slow to fast (section 3.4)."""
    return slowfast_r50_4x16(**{"lateral_direction": "both", **overrides})


@register(frames=4, tau=16, gflops=27.3)
def slow_r50_4x16(**overrides: Any) -> nn.Module:
    """The slow pathway alone, R50 4x16 (Table 5a)."""
    return single_pathway(**{"frames": 4, **overrides})


@register(frames=8, tau=8)
def slow_r50_8x8(**overrides: Any) -> nn.Module:
    """The slow pathway alone, R50 8x8; pytorchvideo's slow_r50."""
    return single_pathway(**overrides)


@register(frames=32, tau=2)
def fast_r50_32x2(**overrides: Any) -> nn.Module:
    """The fast pathway alone, R50."""
    return single_pathway(**{"frames": 32, "width": 8, "inflation": FAST, "stem_frames": 5, **overrides})


_I3D: dict[str, Any] = {
    "stem_frames": 5,
    "frames": 4,
    "inflation": ("3x1x1", ("3x1x1", "none"), ("3x1x1", "none"), ("none", "3x1x1")),
    "stage1_pool": nn.MaxPool3d,
}
_IN_TIME: dict[str, Any] = {"stem_conv_stride": (2, 2, 2), "stem_pool_stride": (2, 2, 2)}


@register(frames=8, tau=8)
def i3d_r50_8x8(**overrides: Any) -> nn.Module:
    """I3D ResNet-50, 3x1x1 in every other block, a pool in time behind res2."""
    return single_pathway(**{**_I3D, **overrides})


@register(frames=32, tau=2)
def i3d_r50_32x2(**overrides: Any) -> nn.Module:
    """I3D ResNet-50, 3x1x1, with strides in time in the stem and its pool."""
    return single_pathway(**{**_I3D, **_IN_TIME, **overrides})


@register(frames=32, tau=2)
def i3d_r50_3x3x3_32x2(**overrides: Any) -> nn.Module:
    """I3D ResNet-50, 3x3x3, with strides in time in the stem and its pool."""
    inflation = ("3x3x3", ("3x3x3", "none"), ("3x3x3", "none"), ("none", "3x3x3"))
    return single_pathway(**{**_I3D, **_IN_TIME, "inflation": inflation, **overrides})


@register(frames=32, tau=2)
def i3d_r18_32x2(**overrides: Any) -> nn.Module:
    """I3D ResNet-18 (basic blocks), 3x3x3, with strides in time in the stem and its pool."""
    return single_pathway(**{**_I3D, **_IN_TIME, "depth": 18, "inflation": ("3x3x3",) * 4, **overrides})


@register(frames=8, tau=8)
def resnet2d_r18(**overrides: Any) -> nn.Module:
    """2-D ResNet-18 on every frame, averaged: what is seen without any time. Any number of frames and pixels."""
    return resnet2d_r50(**{"depth": 18, **overrides})


@register(frames=8, tau=8)
def resnet2d_r50(**overrides: Any) -> nn.Module:
    """2-D ResNet-50 on every frame, averaged. Any number of frames and pixels."""
    return single_pathway(**{"inflation": ("none",) * 4, "head_pool": nn.AdaptiveAvgPool3d, **overrides})


@register(frames=8, tau=8)
def c2d_r50_8x8(**overrides: Any) -> nn.Module:
    """C2D ResNet-50: nothing in time but a pool behind res2."""
    return single_pathway(**{"frames": 4, "inflation": ("none",) * 4, "stage1_pool": nn.MaxPool3d, **overrides})
