"""The processes that train together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """One process for each device, as torchrun tells them; this one is of number ``rank``, and has ``device``."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def joined_world(device: str | None) -> Iterator[World]:
    """``device``: cpu, cuda, or None for GPUs if there are any."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(kind)
    if size > 1:
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    try:
        yield World(rank, size, torch.device(kind))
    finally:
        if size > 1:
            dist.destroy_process_group()
