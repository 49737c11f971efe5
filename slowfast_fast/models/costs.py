"""What a registered model costs: parameters and multiply-adds, counted on meta tensors, where nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend import backend
from .registry import Entry, entry, list_models


@dataclass(frozen=True)
class Cost:
    """A model's name, parameters, and multiply-adds of one clip in 10^9: convolutions and matrix products."""

    name: str
    parameters: int
    gflops: float


def cost(name: str, crop: int = 256, **overrides: Any) -> Cost:
    """Of a registered model with its own clips at ``crop``; of a detection network without the head, which boxes
    determine. Raises ValueError for a name that is not registered."""
    known = entry(name)
    with torch.device("meta"):
        model = known.create(**overrides).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(name, parameters, _gflops(model.model if known.boxes else model, known, crop))  # type: ignore[arg-type]


def _gflops(model: nn.Module, known: Entry, crop: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which takes longer than this package

    # Norms and activations are not counted; without them it takes half the time.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm3d, nn.ReLU)):
                setattr(module, name, nn.Identity())
    with torch.no_grad(), backend("reference"), FlopCounterMode(display=False) as counter:
        model(known.clips(crop, device="meta"))
    return counter.get_total_flops() / 2e9


def table(names: Iterable[str] | None = None, crop: int = 256) -> str:
    """The models as Markdown: what each is, what it takes, parameters, GFLOPs at ``crop`` and those published."""
    lines = [
        f"| model | clips | M parameters | GFLOPs at {crop} | published | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name in list_models() if names is None else names:
        known, found = entry(name), cost(name, crop)
        frames = str(known.frames) if known.alpha is None else f"{known.frames} + {known.frames * known.alpha}"
        published = "" if known.gflops is None or crop != 256 else f"{known.gflops:g}"
        lines.append(
            f"| `{name}` | {frames} | {found.parameters / 1e6:.2f} | {found.gflops:.1f} | {published} | {known.about} |"
        )
    return "\n".join(lines)
