"""From tensors to kernel launches: rows, strides, and as little Python as possible for a call seen before."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

INTERPRETED = bool(triton.knobs.runtime.interpret)


def wrap_triton(kernel: Any, tensor: Tensor) -> Any:
    """``kernel`` as torch.compile can trace it, if ``tensor`` says that a graph is being made; else ``kernel`` itself.
    The interpreter's stand-in for a kernel cannot be wrapped: then the ops are opaque to torch.compile.

    PyTorch looks for calls of this name in the source of an op, to know which kernels it caches a graph of.
    """
    if INTERPRETED or type(tensor) in (Tensor, Parameter):
        return kernel
    return torch.library.wrap_triton(kernel)


def traced(kernel: Any) -> bool:
    """Whether a kernel from `wrap_triton` is about to be written into a graph instead of being launched."""
    return not isinstance(kernel, (JITFunction, InterpretedFunction))


class Launch:
    """One kernel on one grid with all its arguments but the tensors, which come first in every kernel's signature.

    A Launch serves tensors of one device and of the same dtypes. From the second call with aligned tensors on it goes
    straight to the compiled kernel, past Triton's own search, which takes longer than the rest of the op.
    """

    __slots__ = ("arguments", "constants", "grid", "options", "runner", "scalars")

    def __init__(
        self,
        grid: tuple[int, ...],
        scalars: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 2,
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self.scalars, self.constants = scalars, constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.arguments = (*scalars, *constants.values())
        self.runner: Any = None

    def __call__(self, kernel: Any, *tensors: Tensor) -> None:
        if self.grid[0] == 0:
            return
        if not isinstance(kernel, JITFunction):
            kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
            return
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if addresses % 16 != 0:  # compiled apart: Triton tells them from aligned ones, the runner would not
            kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
        elif self.runner is None:
            compiled = kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
            self.runner = compiled[self.grid]
        else:
            self.runner(*tensors, *self.arguments)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def strides(rows: Tensor | None) -> tuple[int, int, int]:
    """Strides of N, T and of the positions of a frame. A dimension of size 1 has none to speak of."""
    if rows is None:
        return 0, 0, 0
    n, c, t, h, w = rows.shape
    s_n, _, s_t, s_h, s_w = rows.stride()
    return s_n if n > 1 else 0, s_t if t > 1 else 0, s_w if w > 1 else s_h if h > 1 else c


def geometry(tensor: Tensor | None) -> Any:
    """What a launch and its checks depend on of a tensor, as part of a key."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def common_unit(*of_rows: tuple[int, int, int]) -> int:
    """The largest power of two up to 16 that divides every stride."""
    every = [stride for three in of_rows for stride in three]
    return next(unit for unit in (16, 8, 4, 2, 1) if all(stride % unit == 0 for stride in every))


def in_units(unit: int, *of_rows: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(stride // unit for three in of_rows for stride in three)


def passes_int32(*rows: Tensor | None) -> bool:
    """Whether an offset into one of the tensors needs 64 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        for tensor in rows
        if tensor is not None
    )
