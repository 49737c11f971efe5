"""SlowFast video networks whose temporal and lateral convolutions run on fused operators."""

from __future__ import annotations

from typing import Any

from . import ops
from ._version import __version__
from .backend import backend, explain

__all__ = ["__version__", "backend", "create_slowfast", "create_slowfast_with_roi_head", "explain", "ops"]


def __getattr__(name: str) -> Any:
    """The models on first use, so that `import slowfast_fast` costs little beyond torch itself."""
    if name in ("create_slowfast", "create_slowfast_with_roi_head"):
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
