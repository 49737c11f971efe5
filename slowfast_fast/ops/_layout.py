"""The one place that changes a memory layout. A copy made here is shown by explain()."""

from __future__ import annotations

import torch
from torch import Tensor

from ..explanation import note_copy


def is_rows(tensor: Tensor) -> bool:
    """Whether an (N, C, T, H, W) tensor is rows of C adjacent channels whose positions (h, w) lie one stride apart.

    N, T and W may have any stride: dense channels_last_3d tensors, channel slices of a wider one, slices in time and
    of a batch all are. A dimension of size 1 has no stride to speak of.
    """
    _, channels, _, height, width = tensor.shape
    _, stride_c, _, stride_h, stride_w = tensor.stride()
    return (channels == 1 or stride_c == 1) and (height == 1 or width == 1 or stride_h == width * stride_w)


def as_rows(tensor: Tensor, argument: str) -> Tensor:
    """``tensor`` itself where it is rows, else a dense channels_last_3d copy of it."""
    if is_rows(tensor):
        return tensor
    note_copy(argument, tensor)
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def as_dense(tensor: Tensor, argument: str) -> Tensor:
    """``tensor`` itself where its memory is dense in the order of its dimensions (a weight, a per-channel vector),
    else a copy."""
    if tensor.is_contiguous():
        return tensor
    note_copy(argument, tensor)
    return tensor.contiguous()


def empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output as every kernel allocates it: dense channels_last_3d, with the dtype and device of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def places(size: int, window: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many places the window of a convolution or a pool takes along a dimension: the size of its result."""
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


def output_shape(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[int, ...]:
    """Of the convolution of an (N, C, T, H, W) tensor with a (K, C, kt, 1, 1) weight."""
    n, _, t, h, w = x.shape
    k, _, taps, _, _ = weight.shape
    return (n, k, places(t, taps, stride, padding, dilation), h, w)
