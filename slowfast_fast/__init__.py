"""SlowFast video networks whose temporal and lateral convolutions run on fused operators."""

from . import ops
from ._version import __version__
from .backend import backend
from .explanation import explain
from .freezing import freeze
from .models import create_slowfast, create_slowfast_with_roi_head

__all__ = ["__version__", "backend", "create_slowfast", "create_slowfast_with_roi_head", "explain", "freeze", "ops"]
