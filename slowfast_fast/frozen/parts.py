"""A large batch on the CPU: a few clips after the others, where no clip knows of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..explanation import because
from ..nn.fused import is_observed
from ..nn.stage import add

# Where PyTorch defines what treats the rows of a batch alike, but for what _mixes finds.
_MODULES = (
    *("activation", "batchnorm", "container", "conv", "dropout"),
    *("instancenorm", "linear", "normalization", "pooling"),
)
_KNOWN = ("slowfast_fast.", *(f"torch.nn.modules.{name}." for name in _MODULES))


def why_whole(blocks: nn.Module) -> str | None:
    """Why a batch must not be cut: the first module in ``blocks`` that may mix clips or is watched; None for none."""
    for path, part in blocks.named_modules(prefix="blocks"):
        if (reason := _mixes(part)) is not None:
            return f"{path} {reason}"
    return None


def _mixes(part: nn.Module) -> str | None:
    if is_observed(part):
        return "carries hooks, a forward of its own or a compiled call"
    name = type(part).__name__
    if not f"{type(part).__module__}.".startswith(_KNOWN) or isinstance(part, nn.MultiheadAttention):
        return f"({name}) may mix clips"
    if part.training:
        return f"({name}) is in training mode"
    if isinstance(part, _BatchNorm) and part.running_mean is None:
        return f"({name}) takes the statistics of the batch"
    if getattr(part, "dim", 1) not in (None, 1, -1):
        return f"({name}) goes over dimension {part.dim}, which may be the batch"
    if getattr(part, "branch_fusion", add) is not add:
        return f"({name}) has a branch_fusion that may mix clips"
    return None


def in_turn(run: Callable[[list[Tensor]], Any], x: Sequence[Tensor], at_a_time: int) -> Any:
    """``run(x)``, a few clips after the others: views of ``x``, results written to their place in one tensor.

    ``run`` gives a tensor or several, each with a row for every clip.
    """
    count = len(x[0])
    whole: list[Tensor] = []
    for first in range(0, count, at_a_time):
        last = min(first + at_a_time, count)
        with because(f"clips {first} to {last - 1} of {count}"):
            part, spec = tree_flatten(run([clip[first:last] for clip in x]))
        whole = whole or [_with_rows(tensor, count) for tensor in part]
        for tensor, rows in zip(whole, part, strict=True):
            tensor[first:last] = rows
    return tree_unflatten(whole, spec)


def _with_rows(like: Tensor, count: int) -> Tensor:
    """An empty tensor of as many rows, laid out as ``like``."""
    features = like.dim() == 5 and like.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if features else torch.contiguous_format
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout)
