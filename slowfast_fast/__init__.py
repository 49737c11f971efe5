"""SlowFast video networks whose temporal and lateral convolutions run on fused operators."""

from . import compat, data, ops
from ._version import __version__
from .backend import backend
from .compat import accelerate, convert_state_dict, load_checkpoint, restore
from .explanation import explain
from .freezing import freeze
from .models import OneClip, create_model, create_resnet, create_slowfast, create_slowfast_with_roi_head
from .ops import pack_pathways
from .pathways import pathway_frames

__all__ = [
    "OneClip",
    "__version__",
    "accelerate",
    "backend",
    "compat",
    "convert_state_dict",
    "create_model",
    "create_resnet",
    "create_slowfast",
    "create_slowfast_with_roi_head",
    "data",
    "explain",
    "freeze",
    "load_checkpoint",
    "ops",
    "pack_pathways",
    "pathway_frames",
    "restore",
]
