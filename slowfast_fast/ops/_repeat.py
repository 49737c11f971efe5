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

from .. import _C, backend, explanation
from ._common import allows_tf32

Signature = tuple[Any, ...]
# A training run with a few crops and batch sizes has some hundred; one that never repeats should not fill the memory.
MOST_PLANS = 4096
# By class: a subclass of Tensor may mean anything.
_TENSORS = (Tensor, nn.Parameter)
_signature = _C.make_signature(_TENSORS)


class Plan(NamedTuple):
    kernel: OpOverload
    backend: str
    padding: int
    tf32: bool


_plans: dict[Signature, Plan] = {}


def look_up(
    op: str,
    options: tuple[Any, ...],
    vectors: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
) -> tuple[Signature | None, Plan | None]:
    """The signature of a call, and the plan of an earlier one that had the same. Both are None where the call has to
    take the long way: compiled, watched by explain(), or with arguments that are not plain tensors."""
    if torch.compiler.is_compiling() or explanation._thread.recorder is not None:
        return None, None
    if x.__class__ not in _TENSORS:
        return None, None
    settings = (op, allows_tf32(x), backend._thread.forced, torch._C._get_deterministic_algorithms())
    key = _signature(settings, options, (x, weight, other), vectors)
    try:
        return key, None if key is None else _plans.get(key)
    except TypeError:  # something that cannot be a key cannot be an argument either, and the checks say so
        return None, None


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
