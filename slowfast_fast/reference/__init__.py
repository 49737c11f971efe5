"""Every op, and the network, in plain PyTorch. Imports nothing of the package, so that it can judge it."""

from .bottleneck import bottleneck
from .lateral_concat import lateral_concat, lateral_concat_bn
from .temporal_conv import temporal_conv, temporal_conv_bn

__all__ = ["bottleneck", "lateral_concat", "lateral_concat_bn", "temporal_conv", "temporal_conv_bn"]
