"""Fused operators on (N, C, T, H, W) activations in channels_last_3d memory."""

from .bottleneck import bottleneck
from .lateral_concat import lateral_concat, lateral_concat_bn
from .temporal_conv import temporal_conv, temporal_conv_bn

__all__ = ["bottleneck", "lateral_concat", "lateral_concat_bn", "temporal_conv", "temporal_conv_bn"]
