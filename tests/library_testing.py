"""Small networks of every library, accelerated and as they are, and what to compare of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from network_testing import TOLERANCE, distance, gradients, statistics
from stock_models import LIBRARIES, Plan
from torch import Tensor, nn

import slowfast_fast

SMALL = Plan(depths=(1, 2, 1, 1), width=16, beta_inverse=4, classes=7, pool=(1, 1), frames=2, fusion_kernel=5)
# Every library, and the single-pathway networks of those that have them.
NETWORKS = [(name, pathways) for name in LIBRARIES for pathways in (2, 1) if (name, pathways) != ("r1c7", 1)]


def stock(library: str, plan: Plan = SMALL, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In training mode, gammas away from 0."""
    model = LIBRARIES[library].build(plan).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def pair(library: str, plan: Plan = SMALL) -> tuple[nn.Module, nn.Module]:
    """The same network accelerated and not."""
    model = stock(library, plan)
    accelerated = copy.deepcopy(model)
    slowfast_fast.accelerate(accelerated)
    return accelerated, model


def clips(library: str, plan: Plan = SMALL, batch: int = 2, size: int = 32) -> list[Tensor] | Tensor:
    """What the network takes."""
    plan = replace(plan, alpha=8) if library == "r1c7" else plan
    frames = [plan.frames, plan.frames * plan.alpha][: plan.pathways]
    if library in ("pytorchvideo", "pyslowfast"):
        x = [torch.randn(batch, 3, t, size, size, dtype=torch.float64) for t in frames]
        return x[0] if (library, plan.pathways) == ("pytorchvideo", 1) else x
    return torch.randn(batch, 3, frames[-1] * (2 if library == "r1c7" else 1), size, size, dtype=torch.float64)


def run(model: nn.Module, x: list[Tensor] | Tensor) -> Tensor:
    return model(list(x) if isinstance(x, list) else x)


def step(model: nn.Module, x: list[Tensor] | Tensor) -> Tensor:
    logits = run(model, x)
    F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    return logits.detach()


def assert_same(accelerated: nn.Module, model: nn.Module, x: Any, training: bool = True) -> None:
    """Output in evaluation; then logits, gradients and buffers of a training step."""
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        assert distance(run(accelerated.eval(), x), run(model.eval(), x)) < TOLERANCE
    if training:
        for network in (accelerated, model):
            for module, mode in zip(network.modules(), modes, strict=True):
                module.training = mode
        assert distance(step(accelerated, x), step(model, x)) < TOLERANCE
        assert distance(gradients(accelerated), gradients(model)) < TOLERANCE
        if any(True for _ in model.buffers()):
            assert distance(statistics(accelerated), statistics(model)) < TOLERANCE


def on_ops(model: nn.Module, x: Any) -> int:
    """How many ops a forward takes in evaluation, where each is of one layer."""
    evaluated = copy.deepcopy(model).eval()
    return sum(row.backend != "torch" for row in slowfast_fast.explain(evaluated, x, show=False).rows)
