"""From video files to the two inputs of a SlowFast network.

Reading files needs PyAV (``pip install "slowfast-fast[data]"``), which is imported when the first file is opened;
everything else needs PyTorch alone.
"""

from .folder import RandomClip, ResumableSampler, UniformViews, VideoFolder
from .sampling import RULES, ClipSampler, slow_indices
from .transforms import MEAN, STD, normalise, random_crop, random_flip, short_side_scale, spatial_crops, to_pathways
from .video import Video, VideoError

__all__ = [
    "MEAN",
    "RULES",
    "STD",
    "ClipSampler",
    "RandomClip",
    "ResumableSampler",
    "UniformViews",
    "Video",
    "VideoError",
    "VideoFolder",
    "normalise",
    "random_crop",
    "random_flip",
    "short_side_scale",
    "slow_indices",
    "spatial_crops",
    "to_pathways",
]
