"""Plain PyTorch networks with the class names, attribute names and arithmetic of the five SlowFast libraries.

``plan`` says once of what layers a SlowFast network is; a module for each library says what it calls them.
"""

from . import gluoncv, mmaction2, pyslowfast, pytorchvideo, r1c7
from .plan import Plan

LIBRARIES = {
    module.__name__.rpartition(".")[2]: module for module in (pytorchvideo, pyslowfast, mmaction2, gluoncv, r1c7)
}

__all__ = ["LIBRARIES", "Plan", "gluoncv", "mmaction2", "pyslowfast", "pytorchvideo", "r1c7"]
