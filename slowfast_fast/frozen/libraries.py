"""Convolutions of PyTorch's libraries with what follows them, for a frozen layer of one input shape.

Each is made once for a layer and a shape of input, prepares the weight as its library wants it, and is then called as
``run(x, residual, overwrite)``. ``name`` and ``reason`` are what explain() shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .convolution import FrozenConv

_HALF = (torch.float16, torch.bfloat16)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this dtype on this processor; half precision takes AVX-512 or AMX."""
    # torch.export switches oneDNN off while it traces, not where its program runs.
    enabled = torch.backends.mkldnn.enabled or torch.compiler.is_exporting()
    if not (torch.backends.mkldnn.is_available() and enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


# torch.compile keeps what it returned when it traced, as in choosing.py.
has_onednn._dynamo_marked_constant = True  # type: ignore[attr-defined]


class OneDnn:
    """oneDNN on the CPU: bias, sum and ReLU are post-ops of the convolution, the weight is laid out for the shape."""

    name = "onednn"

    def __init__(self, conv: FrozenConv, x: Tensor) -> None:
        # Where the processor has no convolution in half precision, PyTorch's own takes a slow one.
        self.dtype = x.dtype if has_onednn(x.dtype) else torch.float32
        self.reason = "sum and ReLU as post-ops of oneDNN, weight packed once"
        if self.dtype != x.dtype:
            self.reason += f"; in float32, as this processor has no convolution in {x.dtype}"
        self.out_dtype = x.dtype
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        pack: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
        self.weight = pack(conv.weight.to(self.dtype).to_mkldnn(), *self.geometry, list(x.shape))
        self.shift = conv.shift.to(self.dtype)
        self.relu = conv.relu

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        x = x.to(self.dtype)
        if residual is None:
            y = torch.ops.mkldnn._convolution_pointwise(
                *(x, self.weight, self.shift, *self.geometry, "relu" if self.relu else "none", [], "")
            )
            return y.to(self.out_dtype)
        post: tuple[Any, ...] = ("add", 1.0, "relu" if self.relu else None, [], None)
        if overwrite and self.dtype == self.out_dtype:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                *(residual, x, self.weight, self.shift, *self.geometry, *post)
            )
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            *(x, residual.to(self.dtype), self.weight, self.shift, *self.geometry, *post)
        )
        return y.to(self.out_dtype)


class CuDnn2d:
    """cuDNN's 2-D convolution with bias and ReLU over N * T images in channels_last: kernels without a reach in T."""

    name = "cudnn"
    reason = "2-D channels_last over N * T images, bias and ReLU in cuDNN's kernel"

    def __init__(self, conv: FrozenConv, x: Tensor) -> None:
        self.weight = conv.weight[:, :, 0].contiguous(memory_format=torch.channels_last)
        self.shift = conv.shift.to(x.dtype)
        self.geometry = (conv.stride[1:], conv.padding[1:], conv.dilation[1:], conv.groups)
        self.relu = conv.relu

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        n, c, t, h, w = x.shape
        images = x.transpose(1, 2).reshape(n * t, c, h, w)
        if self.relu and residual is None:
            y = torch.cudnn_convolution_relu(images, self.weight, self.shift, *self.geometry)
        else:
            y = F.conv2d(images, self.weight, self.shift, *self.geometry)
        y = y.view(n, t, *y.shape[1:]).transpose(1, 2)
        if residual is not None:
            y = y.add_(residual)
            y = y.relu_() if self.relu else y
        return y


class ATen:
    """PyTorch's convolution, the sum and the ReLU in place after it: any device and dtype."""

    name = "aten"

    def __init__(self, conv: FrozenConv, x: Tensor) -> None:
        self.reason = "3-D kernel in space and time" if x.is_cuda else f"{x.dtype} on {x.device.type}"
        self.conv = conv

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        y = self.conv.plain(x)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.conv.relu else y
