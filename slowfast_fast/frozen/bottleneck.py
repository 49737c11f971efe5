"""Which residual blocks run as one kernel, ``ops.bottleneck``, and when."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backend import forced
from ..choosing import choose
from ..ops._common import allows_tf32
from ..ops.bottleneck import on_tensor_cores
from .choices import LAYERS, ONE_KERNEL, block_key
from .choices import choose as choose_kernel
from .convolution import FrozenConv

# Where nothing was measured: inner channels up to which one kernel ought to be faster than a kernel for each layer on a
# CPU, of a block that begins a stage and of the others. Wider blocks are arithmetic, at which oneDNN is better.
FIRST_UP_TO, OTHERS_UP_TO = 32, 16
# On a GPU a block is a few launches saved and three tensors less in memory; no device has been measured yet.
GPU_UP_TO = 64


def geometry(
    projection: nn.Module | None, conv_a: nn.Module, conv_b: nn.Module, conv_c: nn.Module
) -> dict[str, Any] | None:
    """stride and dilation in space of a block that ``ops.bottleneck`` computes; None of any other."""
    if not (isinstance(conv_a, FrozenConv) and isinstance(conv_b, FrozenConv) and isinstance(conv_c, FrozenConv)):
        return None
    taps, (stride, dilation) = conv_a.weight.shape[2], (conv_b.stride[1], conv_b.dilation[1])
    expected = {
        conv_a: (taps, 1, 1, [1, 1, 1], [taps // 2, 0, 0], True),
        conv_b: (1, 3, 3, [1, stride, stride], [0, dilation, dilation], True),
        conv_c: (1, 1, 1, [1, 1, 1], [0, 0, 0], True),
    }
    if projection is not None:
        if not isinstance(projection, FrozenConv):
            return None
        expected[projection] = (1, 1, 1, [1, stride, stride], [0, 0, 0], False)
    for conv, form in expected.items():
        if conv.groups != 1 or (*conv.weight.shape[2:], conv.stride, conv.padding, conv.relu) != form:
            return None
    if taps % 2 == 0 or conv_a.dilation[0] != 1 or conv_b.dilation[2] != dilation or max(stride, dilation) > 2:
        return None
    return {"stride": stride, "dilation": dilation}


def arguments(
    projection: FrozenConv | None, conv_a: FrozenConv, conv_b: FrozenConv, conv_c: FrozenConv
) -> dict[str, Any]:
    """The weights and shifts as ``ops.bottleneck`` names them."""
    named = {"weight_a": conv_a.weight, "shift_a": conv_a.shift, "weight_b": conv_b.weight, "shift_b": conv_b.shift}
    named |= {"weight_c": conv_c.weight, "shift_c": conv_c.shift}
    if projection is not None:
        named |= {"shortcut_weight": projection.weight, "shortcut_shift": projection.shift}
    return named


def run_as(x: Tensor, inner: int, outer: int, stride: int, projects: bool) -> tuple[str, str]:
    """ONE_KERNEL or LAYERS for a block of so many inner and output channels, and why."""
    if forced() != "auto":
        return LAYERS, f"backend {forced()} was asked for"
    tf32, channels = allows_tf32(x), (x.shape[1], inner, outer)
    if x.is_cuda:
        choice = choose("bottleneck", x, tf32=tf32)
        why_not = on_tensor_cores(*channels, x.dtype, tf32) if choice.backend == "cuda" else choice.reason
        if why_not is not None:
            return LAYERS, f"no fast bottleneck kernel: {why_not}"
        faster = inner <= GPU_UP_TO
    elif x.dtype == torch.float32:
        faster = inner <= (FIRST_UP_TO if projects else OTHERS_UP_TO)
    else:
        return LAYERS, f"the bottleneck kernel converts {x.dtype} row by row"
    key = block_key(channels, stride, projects, x.dtype, tf32)
    able = (ONE_KERNEL, LAYERS) if faster else (LAYERS, ONE_KERNEL)
    return choose_kernel(able, key, x.device.type, x.device.index)
