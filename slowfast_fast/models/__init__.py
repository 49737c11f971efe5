"""Networks built from the blocks of ``nn/``."""

from .slowfast import create_slowfast, create_slowfast_with_roi_head

__all__ = ["create_slowfast", "create_slowfast_with_roi_head"]
