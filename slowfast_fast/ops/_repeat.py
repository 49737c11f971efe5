"""A call like an earlier one skips what that one went through in Python.

The checks and the choice of a backend look at shapes, strides, dtypes, devices, options and settings; where these are
equal, so is their outcome, which is kept as a plan. What a signature leaves out (sizes of vectors, the dtype of the
weight) the kernels check for themselves: if one raises, the call takes the long way, where the message for users is
made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from .. import backend, explanation
from ._common import allows_tf32, call_eagerly

Signature = tuple[Any, ...]
# A training run with a few crops and batch sizes has some hundred; one that never repeats should not fill the memory.
MOST_PLANS = 4096
# By class: a subclass of Tensor may mean anything.
_TENSORS = {Tensor, nn.Parameter}


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
    # One argument on the meta device would make the call one of the fake kernel, which checks nothing.
    if x.__class__ not in _TENSORS or weight.__class__ not in _TENSORS or weight.is_meta:
        return None, None
    key = (
        op,
        options,
        tuple(map(type, options)),  # True and 1 are equal as keys, but not as options
        tuple([v.dtype if v.__class__ in _TENSORS and not v.is_meta else v for v in vectors]),
        (other.shape, other.stride()) if other.__class__ in _TENSORS and not other.is_meta else other,
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        weight.shape,
        weight.stride(),
        allows_tf32(x),
        backend._thread.forced,
        torch._C._get_deterministic_algorithms(),
    )
    try:
        return key, _plans.get(key)
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


def run(plan: Plan, *arguments: Any) -> Any:
    """The plan's kernel, for a call that is not being compiled."""
    return call_eagerly(plan.kernel, *arguments, plan.tf32)
