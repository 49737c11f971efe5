"""Residual blocks: as one op where they train, else layer by layer."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn

from .. import ops
from ..explanation import because, note, recording
from ..ops.bottleneck_bn import layers_needed as ops_needed
from .fused import (
    Parts,
    Step,
    _absent,
    _batch_norm,
    _not_temporal,
    is_observed,
    not_fusable,
    not_in_time,
    of_batch,
    residual,
    run_step,
)

EVALUATED = "fixed statistics"


def residual_block(x: Tensor, branch: Sequence[Step], shortcut: Sequence[Step], act: nn.Module | None) -> Tensor:
    """``act(shortcut(x) + branch(x))``: on ``ops.bottleneck_bn`` where the block trains and nobody could tell the
    difference, else layer by layer.

    Args:
        x: (N, C, T, H, W).
        branch, shortcut: what is done to ``x``, in order; nothing where it is added as it is.
        act: may be None.
    """
    reason = layers_needed(x, branch, shortcut, act)
    if reason is None:
        return _call_block(x, *(cast(Parts, step) for step in (*branch, *shortcut)), act=act)
    with because(f"no bottleneck_bn: {reason}") if recording() and reason != EVALUATED else nullcontext():
        added = x
        for step in shortcut:
            added = run_step(step, added)
        return residual(x, branch, added, act)


def layers_needed(x: Tensor, branch: Sequence[Step], shortcut: Sequence[Step], act: nn.Module | None) -> str | None:
    """Why a residual block must run layer by layer; None where ``ops.bottleneck_bn`` has the same result and side
    effects."""
    steps = [step for step in (*branch, *shortcut) if isinstance(step, tuple)]
    if not any(of_batch(norm) for _, norm, _ in steps):
        return EVALUATED
    if len(branch) != 3 or len(shortcut) > 1 or len(steps) != len(branch) + len(shortcut):
        return "not three layers and at most one in the shortcut, all open to be fused"
    for (conv, norm, activation), activated in zip(steps, (True, True, False, False), strict=False):
        why = not_fusable(conv, norm, activation)
        if why is None and not of_batch(norm):
            why = "a layer without a norm, or one with fixed statistics"
        if why is None and _absent(activation) == activated:
            why = "an activation in another place than behind the first two layers and the sum"
        if why is not None:
            return why
    if type(act) is not nn.ReLU or is_observed(act):
        return "the block does not end in a plain ReLU without hooks"
    return _not_bottleneck(*(cast(nn.Conv3d, conv) for conv, _, _ in steps)) or ops_needed(x)


def _not_bottleneck(a: nn.Conv3d, b: nn.Conv3d, c: nn.Conv3d, shortcut: nn.Conv3d | None = None) -> str | None:
    """Why plain convolutions do not form a block that ``ops.bottleneck_bn`` takes."""
    stride, dilation = b.stride[1], b.dilation[1]
    for name, layer in (("a", a), ("c", c)):
        why = not_in_time(layer) or _not_temporal(layer)
        if why is not None:
            return f"{name}: {why}"
    if 2 * a.padding[0] != a.dilation[0] * (a.kernel_size[0] - 1):
        return f"a has kernel {a.kernel_size} and padding {a.padding}"
    if (b.kernel_size, b.stride, b.dilation) != ((1, 3, 3), (1, stride, stride), (b.dilation[0], dilation, dilation)):
        return f"b has kernel {b.kernel_size}, stride {b.stride} and dilation {b.dilation}"
    if b.padding != (0, dilation, dilation):
        return f"b has padding {b.padding}"
    for name, conv, strides in (("c", c, (1, 1, 1)), ("the shortcut", shortcut, (a.stride[0], stride, stride))):
        if conv is None:
            continue
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1, 1), strides, (0, 0, 0)):
            return f"{name} has kernel {conv.kernel_size}, stride {conv.stride} and padding {conv.padding}"
    if shortcut is None and (a.in_channels != c.out_channels or (a.stride[0], stride) != (1, 1)):
        return "the block changes its shape and has no convolution in the shortcut"
    return None


def _call_block(x: Tensor, *layers: Parts, act: nn.Module | None) -> Tensor:
    """``ops.bottleneck_bn`` for layers that ``layers_needed`` found fit."""
    if recording():
        note((*(module for layer in layers for module in layer), act), "bottleneck_bn")
    convolutions = [cast(nn.Conv3d, conv) for conv, _, _ in layers]
    normed = []
    for conv, (_, norm, _) in zip(convolutions, layers, strict=True):
        arguments = _batch_norm(cast(nn.BatchNorm3d, norm), None)
        del arguments["training"]
        normed.append(ops.NormedConv(conv.weight, **arguments))
    a, b = convolutions[:2]
    return ops.bottleneck_bn(
        x,
        *normed,
        stride_a=int(a.stride[0]),  # pytorchvideo's convolutions hold numpy's integers
        padding_a=int(a.padding[0]),
        dilation_a=int(a.dilation[0]),
        stride=int(b.stride[1]),
        dilation=int(b.dilation[1]),
    )
