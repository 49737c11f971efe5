"""What a training step keeps for its backward: how much, and nothing twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from installed_pytorchvideo import pytorchvideo_slowfast
from network_testing import SMALL, clips
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import slowfast_fast

MOST = 0.55  # of what stock keeps


def saved_storages(model: nn.Module, x: list[Tensor], autocast: torch.dtype | None) -> list[Tensor]:
    """A tensor of every storage that autograd keeps for the backward of a step, but for inputs and parameters."""
    given = {t.untyped_storage()._cdata for t in (*x, *model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in given:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        F.cross_entropy(model(list(x)), torch.arange(len(x[0])))
    return list(kept.values())


@pytest.mark.no_sanitizer
@pytest.mark.skipif(
    not hasattr(slowfast_fast.ops, "bottleneck_bn"), reason="needs residual blocks that train as one op"
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_bytes_kept_by_r50(autocast: torch.dtype | None) -> None:
    """R50 8x8 against the installed pytorchvideo, on tensors without memory."""
    stock_slowfast = pytorchvideo_slowfast()
    kept = []
    with FakeTensorMode():
        x = [torch.randn(2, 3, frames, 224, 224) for frames in (8, 32)]
        for model in (slowfast_fast.create_slowfast(), stock_slowfast.create_slowfast()):
            storages = saved_storages(model, x, autocast)
            kept.append(sum(t.untyped_storage().nbytes() for t in storages))
    ours, stock = kept
    print(f"{ours / 2**20:.0f} MiB, stock {stock / 2**20:.0f} MiB: {ours / stock:.1%}")
    assert ours <= MOST * stock


@pytest.mark.parametrize("accelerated", [False, True], ids=["create_slowfast", "accelerate"])
def test_nothing_is_kept_twice(accelerated: bool) -> None:
    """No two storages hold the same activation, in whatever layout; the stems, the laterals and the head included."""
    options: dict[str, Any] = SMALL | {"dropout_rate": 0.5}
    model: nn.Module = slowfast_fast.create_slowfast(**options)
    if accelerated:
        model = pytorchvideo_slowfast().create_slowfast(**options)
        slowfast_fast.accelerate(model)
    for parameter in model.parameters():  # so that no branch is 0
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    x = clips(dtype=torch.float32)
    kept = [t.detach() for t in saved_storages(model, x, None) if t.dim() > 1]
    assert len(kept) > 20
    for one, other in itertools.combinations((*x, *kept), 2):
        assert one.shape != other.shape or not torch.equal(one, other), tuple(one.shape)
