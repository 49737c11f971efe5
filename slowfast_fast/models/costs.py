"""What a registered model costs: parameters and multiply-adds, counted on meta tensors, where nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend import backend
from .registry import Entry, entry, list_models

CROP = 224  # that heads are made for


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
        model = known.create(**{**fitted(name, crop), **overrides}).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(name, parameters, _gflops(model.model if known.boxes else model, known, crop))  # type: ignore[arg-type]


def fitted(name: str, crop: int) -> dict[str, Any]:
    """Overrides for clips that leave maps smaller than a head's pool: an average over the map. None for models of which
    the head takes any size."""
    known = entry(name)
    fixed = not known.boxes and known.takes_stock_keywords
    return {"head_pool": nn.AdaptiveAvgPool3d} if fixed and crop < CROP else {}


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


def table(
    names: Iterable[str] | None = None,
    crop: int = 256,
    more: tuple[Sequence[str], Mapping[str, Sequence[str]]] = ((), {}),
) -> str:
    """The models as Markdown: what each is, what it takes, parameters, GFLOPs at ``crop`` and those published; and
    ``more``: headings of further columns, and by model what is in them."""
    headings, cells = more
    heads = ["model", "clips", "M parameters", f"GFLOPs at {crop}", "published", *headings]
    lines = [f"| {' | '.join(heads)} | |", f"|---|---|{'---:|' * (len(heads) - 2)}---|"]
    for name in list_models() if names is None else names:
        known, found = entry(name), cost(name, crop)
        frames = str(known.frames) if known.alpha is None else f"{known.frames} + {known.frames * known.alpha}"
        published = "" if known.gflops is None or crop != 256 else f"{known.gflops:g}"
        row = [f"`{name}`", frames, f"{found.parameters / 1e6:.2f}", f"{found.gflops:.1f}", published]
        row += [*cells.get(name, [""] * len(headings)), known.about]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
