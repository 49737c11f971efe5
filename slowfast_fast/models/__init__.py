"""Networks built from the blocks of ``nn/``, and the registry of those that have a name."""

from . import named, recurrent
from .costs import Cost, cost
from .family import single_pathway, slowfast_network
from .inflation import inflate_2d
from .one_clip import OneClip
from .registry import Recipe, create_model, entry, list_models, register
from .resnet import create_resnet
from .slowfast import create_slowfast, create_slowfast_with_roi_head

__all__ = [
    "Cost",
    "OneClip",
    "Recipe",
    "cost",
    "create_model",
    "create_resnet",
    "create_slowfast",
    "create_slowfast_with_roi_head",
    "entry",
    "inflate_2d",
    "list_models",
    "named",
    "recurrent",
    "register",
    "single_pathway",
    "slowfast_network",
]
