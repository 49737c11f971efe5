"""Fused operators on (N, C, T, H, W) activations in channels_last_3d memory."""

from .batch_norm_max_pool import batch_norm_max_pool
from .bottleneck import bottleneck
from .bottleneck_bn import NormedConv, bottleneck_bn
from .frames_concat import frames_concat, max_pool_frames_concat, temporal_conv_frames_concat
from .lateral_concat import lateral_concat, lateral_concat_bn
from .max_pool import max_pool
from .pack_pathways import pack_pathways
from .spatial_conv import spatial_conv
from .stem_conv import stem_conv
from .temporal_conv import temporal_conv, temporal_conv_bn
from .wide import max_pool_lateral_concat, temporal_conv_lateral_concat

__all__ = [
    "NormedConv",
    "batch_norm_max_pool",
    "bottleneck",
    "bottleneck_bn",
    "frames_concat",
    "lateral_concat",
    "lateral_concat_bn",
    "max_pool",
    "max_pool_frames_concat",
    "max_pool_lateral_concat",
    "pack_pathways",
    "spatial_conv",
    "stem_conv",
    "temporal_conv",
    "temporal_conv_bn",
    "temporal_conv_frames_concat",
    "temporal_conv_lateral_concat",
]
