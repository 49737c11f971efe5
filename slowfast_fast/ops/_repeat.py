"""A call like an earlier one skips what that one went through in Python.

The checks and the choice of a backend look at shapes, strides, dtypes, devices, options and settings; where these are
equal, so is their outcome, which is kept as a plan. What a signature leaves out (sizes and devices of vectors) the
kernels check for themselves: if one raises, the call takes the long way, where the message for users is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.compiler import is_compiling

from .. import _C, backend, explanation
from ._common import allows_tf32, make_call

Signature = bytes
# A training run with a few crops and batch sizes has some hundred; one that never repeats should not fill the memory.
MOST_PLANS = 4096
# By class: a subclass of Tensor may mean anything.
_TENSORS = (Tensor, nn.Parameter)


class Plan(NamedTuple):
    kernel: OpOverload
    backend: str
    padding: int
    tf32: bool


_plans: dict[Signature, Plan] = {}
_look_up = _C.make_look_up(
    _TENSORS,
    torch.device("cpu"),
    _plans,
    explanation._thread,
    backend._thread,
    torch._C._is_torch_function_mode_enabled,
    torch._C._get_deterministic_algorithms,
    allows_tf32,
)
# A call that has a plan. Without PyTorch's private call of an operator by its handle it is made like any other.
call_planned = make_call(getattr(torch._C, "_dispatch_call_boxed", None))


def look_up(
    op: str, options: tuple[Any, ...], tensors: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...]
) -> tuple[Signature | None, Plan | None]:
    """The signature of a call on ``tensors``, x first, and the plan of an earlier one that had the same. Both are None
    where the call has to take the long way: compiled, watched by explain() or a function mode, or with arguments that
    are not plain tensors."""
    return (None, None) if is_compiling() else _look_up(op, options, tensors, vectors)


def remember(
    key: Signature | None,
    plan: Plan,
    given: tuple[Tensor | None, ...],
    used: tuple[Tensor | None, ...],
) -> None:
    """Keep the plan of a call that got through, unless a tensor had to be converted first."""
    if key is None or torch.jit.is_tracing() or any(a is not b for a, b in zip(given, used, strict=True)):
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
