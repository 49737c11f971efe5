"""How an op enters torch.ops.slowfast_fast_triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._launch import INTERPRETED

LIBRARY = "slowfast_fast_triton"


def register(function: Callable[..., Any] | None = None, *, mutates: tuple[str, ...] = ()) -> Any:
    """Decorator: ``function`` becomes the op of its name. torch.compile sees the kernels inside; those of the
    interpreter it cannot see, and takes the op as a whole."""
    if function is None:
        return lambda function: register(function, mutates=mutates)
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    make(f"{LIBRARY}::{function.__name__}", function, mutates_args=mutates)
    return function
