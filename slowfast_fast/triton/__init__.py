"""The ops of csrc/ops.cpp as Triton kernels, in the namespace torch.ops.slowfast_fast_triton. Importing this package
needs Triton and registers them; what surrounds an op (checks for users, gradients, autocast) is in slowfast_fast/ops/.

    temporal_conv.py, lateral_concat.py,
    frames_concat.py, pack_pathways.py    the ops
    _convolution.py, _gradients.py        the primitives, host side
    _forward.py, _backward.py, _device.py the kernels, and what they share
    _configs.py, _tuning.py               which tile shapes there are, which one is taken
    _launch.py, _checks.py, _register.py  from tensors to launches, from functions to ops
"""

from . import frames_concat, lateral_concat, pack_pathways, temporal_conv

__all__ = ["frames_concat", "lateral_concat", "pack_pathways", "temporal_conv"]
