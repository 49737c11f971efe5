"""A stem in training: its convolution, and all that follows as one op, which keeps only the convolution's output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from .. import ops
from ..backend import can_run, forced
from ..choosing import decide
from ..explanation import note, recording
from ..ops._layout import as_rows
from ..ops.batch_norm_max_pool import MOST_PLACES
from .fused import Step, _absent, _batch_norm, conv_norm_act, not_plain, of_batch, run_step

# As many as a video has, and one more. Of more channels oneDNN makes as good a use as ops.stem_conv.
FEW_CHANNELS = 4


def conv_norm_act_pool(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, pool: nn.Module
) -> Tensor:
    """``pool(act(norm(conv(x))))``, on ``ops.batch_norm_max_pool`` where that gives the same, and ``ops.stem_conv`` or
    PyTorch's convolution: then x is not copied even where it is not rows, as it would be kept for the backward beside
    the one that was given.

    Args:
        x: (N, C, T, H, W).
        conv: a plain ``nn.Conv3d`` of any kernel can be fused.
        norm: a plain ``nn.BatchNorm3d`` that takes the batch's statistics can be fused.
        act: a plain ``nn.ReLU`` or None can be fused.
        pool: a plain ``nn.MaxPool3d`` of square windows in H and W can be fused.
    """
    reason = not_plain(conv, norm, act, pool) or _not_of_batch(norm) or _not_square(pool) or _not_by_backend(x)
    if reason is not None:
        return cast(Tensor, pool(conv_norm_act(as_rows(x, "x"), conv, norm, act)))
    plain, statistics = cast(nn.Conv3d, conv), _batch_norm(cast(nn.BatchNorm3d, norm), None)
    del statistics["training"]
    _, kernel, _ = _triple(pool.kernel_size)
    _, stride, _ = _triple(pool.stride)
    _, padding, _ = _triple(pool.padding)
    if _by_stem_conv(x, plain):
        if recording():
            note((conv,), "stem_conv")
        raw = ops.stem_conv(x, plain.weight, plain.bias, stride=_ints(plain.stride), padding=_ints(plain.padding))
        if recording():
            note((norm, act, pool), "batch_norm_max_pool")
    else:
        if recording():
            note((conv, norm, act, pool), "batch_norm_max_pool", "convolution by PyTorch")
        # A weight in channels_last_3d makes PyTorch write rows, whatever the layout of x, which it keeps as it is.
        weight = plain.weight.contiguous(memory_format=torch.channels_last_3d)
        raw = plain._conv_forward(x, weight, plain.bias)
    return ops.batch_norm_max_pool(
        raw, **statistics, relu=not _absent(act), kernel=int(kernel), stride=int(stride), padding=int(padding)
    )


def run_steps(x: Tensor, steps: Iterable[Step]) -> Tensor:
    """What a stem is made of, one after the other; a layer and the pool behind it as one."""
    left = list(steps)
    while left:
        step, then = left.pop(0), left[0] if left else None
        if isinstance(step, tuple) and isinstance(then, nn.MaxPool3d):
            x = conv_norm_act_pool(x, *step, then)
            del left[0]
        else:
            x = run_step(step, x)
    return x


def _by_stem_conv(x: Tensor, conv: nn.Conv3d) -> bool:
    """Whether a backend has kernels for this convolution, and they are made for its channels."""
    plain = conv.groups == 1 and _ints(conv.dilation) == (1, 1, 1) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or conv.in_channels > FEW_CHANNELS:
        return False
    return decide("stem_conv", x)[0] not in (None, "reference")


def _ints(sizes: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)  # pytorchvideo's convolutions hold numpy's integers


def _not_by_backend(x: Tensor) -> str | None:
    return None if forced() == "auto" else can_run(forced(), "batch_norm_max_pool", x)


def _not_of_batch(norm: nn.Module | None) -> str | None:
    if norm is None or _absent(norm):
        return "no norm"
    return None if of_batch(norm) else "the statistics are not the batch's"


def _not_square(pool: nn.Module) -> str | None:
    if type(pool) is not nn.MaxPool3d:
        return f"{type(pool).__name__} is not a plain MaxPool3d"
    if pool.ceil_mode or pool.return_indices or _triple(pool.dilation) != (1, 1, 1):
        return "a MaxPool3d with ceil_mode, return_indices or dilation"
    sizes = [_triple(size) for size in (pool.kernel_size, pool.stride, pool.padding)]
    if [size[0] for size in sizes] != [1, 1, 0] or any(size[1] != size[2] for size in sizes):
        return f"a pool of kernel {sizes[0]}, stride {sizes[1]} and padding {sizes[2]}"
    return f"windows of {sizes[0]}" if sizes[0][1] ** 2 > MOST_PLACES else None
