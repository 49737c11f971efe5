"""Names can deceive: does a block compute what its class of that name does in the library?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import backend
from ..nn.units import Unit

TOLERANCE = 1e-3  # relative, in float32; a scale, a missing activation or another sampling is off by more than 1e-2


def computes_otherwise(module: nn.Module, unit: Unit) -> str | None:
    """Why ``unit`` must not stand in for ``module``: they differ on a small random clip; None where they agree.

    Both run on a copy in float32 on the CPU, in evaluation, without hooks and with norms away from their initial
    values (gammas of 0 would hide a whole branch). The random state is left alone.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        inputs = unit.example(module, generator)
        if inputs is None:
            return None
        block = copy.deepcopy(module).to("cpu", torch.float32).eval()
        for part in block.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
            part.__dict__.pop("forward", None)
        for parameter in block.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
        with torch.no_grad(), backend("reference"), torch.autocast("cpu", enabled=False):
            got = _tensors(unit.run(block, copy.copy(inputs)))
            expected = _tensors(unit.run_stock(block, inputs))
    except Exception as error:  # whatever somebody else's block may raise
        return f"could not be tried out: {type(error).__name__}: {error}"
    same = len(got) == len(expected) and all(map(_close, expected, got))
    return None if same else "computes something else"


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _close(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape:
        return False
    scale = torch.linalg.vector_norm(expected).clamp_min(1e-12)
    return bool(torch.linalg.vector_norm(got - expected) <= TOLERANCE * scale)
