"""SlowFast video networks whose temporal and lateral convolutions run on fused operators."""

from __future__ import annotations

from typing import Any

from . import _extension  # noqa: F401  (loads the operator library, before anything asks for its operators)
from ._version import __version__
from .backend import backend, explain

__all__ = ["__version__", "backend", "create_slowfast", "create_slowfast_with_roi_head", "explain", "ops"]


def __getattr__(name: str) -> Any:
    """Modules and models on first use, so that `import slowfast_fast` costs little beyond torch itself."""
    if name in ("create_slowfast", "create_slowfast_with_roi_head"):
        from . import models

        return getattr(models, name)
    if name == "ops":
        import importlib

        return importlib.import_module(".ops", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
