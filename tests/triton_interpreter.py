"""Repairs of Triton's interpreter, for a process that was started with TRITON_INTERPRET=1. To be imported before any
kernel runs.

- bfloat16 factors of tl.dot are multiplied as the integers that hold their bits; float16 ones rightly, but slowly.
- float32 becomes bfloat16 by cutting off bits where a GPU rounds to nearest even.
- tl.sum adds one value after the other where a GPU adds in a tree, with the smaller error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

assert interpreter.InterpreterBuilder is not None
_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float
_sum = interpreter.ReduceOps.sum


def _float32(handle: Any) -> Any:
    if handle.dtype.scalar == tl.float16:
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(
        _convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
    )


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _float32(a), _float32(b), *rest)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
    return _convert(data, source, target, rounding)


def _tree_sum(self: Any, operand: Any) -> Any:
    data = operand.handle.data
    if self.axis is None or data.dtype != np.float32:
        return _sum(self, operand)
    data = np.moveaxis(data, self.axis, 0)
    while len(data) > 1:  # every axis of a block is a power of two
        data = data[: len(data) // 2] + data[len(data) // 2 :]
    total = data if self.keep_dims else data[0]
    return self.to_tensor(np.moveaxis(total, 0, self.axis) if self.keep_dims else total, operand.dtype)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter._convert_float = _convert_float
interpreter.ReduceOps.sum = _tree_sum
