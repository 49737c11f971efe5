"""What other SlowFast libraries call things: one module for each says how it builds and spells its networks.

None of them is imported here; the modules named after a library have helpers that put ours into its registries.
"""

from . import gluoncv, mmaction2, pyslowfast, pytorchvideo, r1c7
from ._accelerate import Report, Row, accelerate, restore
from ._checkpoint import load_checkpoint
from ._convert import CheckpointError, Conversion, convert_state_dict

__all__ = [
    "CheckpointError",
    "Conversion",
    "Report",
    "Row",
    "accelerate",
    "convert_state_dict",
    "gluoncv",
    "load_checkpoint",
    "mmaction2",
    "pyslowfast",
    "pytorchvideo",
    "r1c7",
    "restore",
]
