"""How a network is trained: defaults, optimizer, learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from slowfast_fast.models import entry

PAPER: dict[str, Any] = {"epochs": 196, "batch": 8, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4}


def with_defaults(model: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What the command line leaves open, by the model's recipe where it has one, else as for the paper's networks."""
    recipe = entry(model).recipe if model is not None else None
    defaults: dict[str, Any] = PAPER if recipe is None else {**dataclasses.asdict(recipe), "optimizer": "adam"}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


def create_optimizer(
    network: nn.Module, kind: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if kind == "adam":  # the penalty of a recipe is on all parameters
        return torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay)
    groups = parameter_groups(network, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay of norms and biases, which are the parameters of at most one dimension."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Up in a line for ``warmup`` steps, then down by half a cosine (paper, section 4)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
