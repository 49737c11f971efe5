"""More of what training code does with a stock model, done to the fused network: see test_training_code.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_testing import (
    TOLERANCE,
    assert_as_exact_as_stock,
    assert_mean_of_two_processes,
    assert_same_step,
    clips,
    distance,
    gradients,
    pair,
    statistics,
    step,
)
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_training_under_autocast_is_as_exact_as_stock(dtype: torch.dtype) -> None:
    assert_as_exact_as_stock(lambda: clips(batch=4, dtype=torch.float32), dtype, "cpu", training=True, draws=3)


def test_float16_with_gradient_scaler() -> None:
    """An overflow skips the step and halves the scale, as in stock; the next one moves every parameter."""
    fused, _ = pair(torch.float32)
    # A learning rate at which no update is lost beside the parameter that it moves.
    optimizer = torch.optim.SGD(fused.parameters(), 1.0)
    before = [p.detach().clone() for p in fused.parameters()]
    for scale in (1e30, 64.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(fused(clips(dtype=torch.float32)), torch.tensor([0, 1]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, old) for p, old in zip(fused.parameters(), before, strict=True)]
        overflows = scale > 1e9
        assert not any(moved) if overflows else all(moved)
        assert scaler.get_scale() == pytest.approx(scale / 2 if overflows else scale)


def test_gradient_accumulation_and_zero_grad() -> None:
    fused, stock = pair()
    parts = [clips(), clips(batch=3)]
    for model in (fused, stock):
        for x in parts:
            step(model, list(x))
    assert distance(gradients(fused), gradients(stock)) < TOLERANCE
    for model in (fused, stock):
        model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in fused.parameters())
    assert_same_step(fused, stock, parts[0])


@pytest.mark.parametrize("frozen", ["stems and res2", "convolutions", "norms"])
def test_frozen_parameters(frozen: str) -> None:
    fused, stock = pair()
    for model in (fused, stock):
        for path, module in model.named_modules():
            first = path.startswith(("blocks.0.", "blocks.1."))
            if {"convolutions": isinstance(module, nn.Conv3d), "norms": isinstance(module, nn.BatchNorm3d)}.get(
                frozen, first
            ):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
    assert_same_step(fused, stock, clips())
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)


def test_no_running_statistics() -> None:
    """track_running_stats=False: batch statistics in evaluation too."""
    fused, stock = pair()
    for model in (fused, stock):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    x = clips()
    for training in (True, False):
        assert distance(step(fused.train(training), x), step(stock.train(training), list(x))) < TOLERANCE
        assert distance(gradients(fused), gradients(stock)) < TOLERANCE


def test_exponential_moving_average() -> None:
    """A deep copy that follows the parameters, made in the middle of training."""
    fused, stock = pair()
    averages = []
    for model in (fused, stock):
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        torch.manual_seed(0)
        step(model, clips())
        average = copy.deepcopy(model)
        for _ in range(2):
            optimizer.zero_grad()
            step(model, clips())
            optimizer.step()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, 0.5)
        averages.append(average.eval()(clips()))
    assert distance(*averages) < TOLERANCE


def test_anomaly_detection() -> None:
    fused, stock = pair()
    x = clips()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_step(fused, stock, x)
        x[1][0, 0, 0, 0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="returned nan values"):
            step(fused, x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nan_reaches_what_it_reaches_in_stock(training: bool) -> None:
    fused, stock = pair()
    x = clips(batch=3)
    x[0][1, 2, 1, 5, 7] = torch.nan
    ours, theirs = fused.train(training)(x), stock.train(training)(list(x))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[1].isnan().all()
    assert torch.equal(statistics(fused).isnan(), statistics(stock).isnan())


# Wrong use


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: clips(batch=1, frames=1), ValueError),  # one value for each channel of res5
        (lambda: [clip.long() for clip in clips()], RuntimeError),
        (lambda: [clips()[0], clips()[1].to("meta")], (RuntimeError, ValueError)),
    ],
    ids=["one value per channel", "integers", "two devices"],
)
def test_wrong_use_raises_as_in_stock(make: Any, error: Any) -> None:
    for model in pair():
        with pytest.raises(error) as raised:
            model(make())
        if error is ValueError:
            assert "Expected more than 1 value per channel when training, got input size" in str(raised.value)


# Sharded parameters


def sharded_worker(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.load(folder / "model.pt", weights_only=False)
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.blocks, model):
        fully_shard(block, mesh=mesh)
    step(model, torch.load(folder / f"clips{rank}.pt"))
    grads = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    torch.save((grads, statistics(model)), folder / f"result{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.no_sanitizer
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    """FSDP2 over two processes: the gradient is the mean of theirs."""
    assert_mean_of_two_processes(__file__, tmp_path)


if __name__ == "__main__":
    sharded_worker(int(sys.argv[1]), Path(sys.argv[2]))
