"""A network small enough to try things on, fused and stock with the same weights, and what to compare of them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.reference.slowfast import SlowFast

SMALL: dict[str, Any] = {
    "model_depth": 18,
    "slowfast_channel_reduction_ratio": 4,
    "stem_dim_outs": (16, 4),
    "dropout_rate": 0.0,
    "model_num_class": 7,
    "head_pool_kernel_sizes": ((2, 1, 1), (8, 1, 1)),
}
# Convolutions that an op covers. In training: the laterals, and the blocks with their shortcuts; one that runs layer by
# layer loses its b, and its shortcut where that has a spatial stride.
FUSED_SITES = 4 + 8 * 4
# Layer by layer: the laterals, every a and c, and the shortcuts of res2.
LAYER_SITES = 4 + 8 + 8 + 2
FUSED_STEMS = 2  # in training
TOLERANCE = 1e-7  # float64; BatchNorm over few values amplifies rounding


def clips(batch: int = 2, frames: int = 2, size: int = 32, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, 3, t, size, size, dtype=dtype) for t in (frames, 4 * frames)]


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The fused and the stock network with the same weights, gammas away from 0, in training mode."""
    fused, stock = slowfast_fast.create_slowfast(**SMALL).to(dtype), SlowFast(**SMALL).to(dtype)
    for parameter in fused.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-12)).item()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([buffer.double().flatten() for buffer in model.buffers()])


def step(model: Callable[..., Tensor], x: list[Tensor]) -> Tensor:
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 7).backward()
    return logits.detach()


def assert_same_step(fused: nn.Module, stock: nn.Module, x: list[Tensor]) -> None:
    """Logits, gradients and BatchNorm buffers of one step agree."""
    assert distance(step(fused, x), step(stock, list(x) if isinstance(x, list) else x)) < TOLERANCE
    assert distance(gradients(fused), gradients(stock)) < TOLERANCE
    assert distance(statistics(fused), statistics(stock)) < TOLERANCE


def assert_as_exact_as_stock(
    make: Callable[[], list[Tensor]], dtype: torch.dtype, device: str, training: bool, draws: int = 7
) -> None:
    """Logits and, of a training step, the losses of the clips, gradients and BatchNorm buffers: in ``dtype`` (half
    precision by autocast) the fused network is at most twice as far from the stock one in float64 as the stock one in
    ``dtype``.

    That is said of the median over several clips and weights: in about one training step of twenty in float32 a
    rounding error flips a ReLU, and moves the gradients by a thousand times of what rounding otherwise does. How
    exact the two can be differs from draw to draw as well, so that each draw's errors are held against each other."""
    ratios: dict[str, list[float]] = {}
    for _ in range(draws):
        fused, stock = (model.to(device).train(training) for model in pair(torch.float32))
        exact = copy.deepcopy(stock).double()
        x = [clip.to(device) for clip in make()]
        outcomes = []
        for model, half in ((exact, False), (fused, dtype.itemsize == 2), (stock, dtype.itemsize == 2)):
            inputs = [clip.to(next(model.parameters()).dtype) for clip in x]
            with torch.autocast(device, dtype if half else torch.bfloat16, enabled=half):
                if training:
                    logits = step(model, inputs)
                    labels = torch.arange(len(logits), device=logits.device) % 7
                    loss = F.cross_entropy(logits.double(), labels, reduction="none")
                    results = {"logits": logits, "losses": loss, "gradients": gradients(model)}
                    outcomes.append(results | {"statistics": statistics(model)})
                else:
                    with torch.no_grad():
                        outcomes.append({"logits": model(inputs)})
        for name, value in outcomes[0].items():
            ours, theirs = (distance(outcome[name].double(), value) for outcome in outcomes[1:])
            ratios.setdefault(name, []).append(ours / max(theirs, torch.finfo(dtype).eps / 2))
    assert not {name: values for name, values in ratios.items() if not median(values) <= 2}


def fused_sites(model: nn.Module, x: list[Tensor]) -> int:
    """Convolutions that an op covers."""
    rows = [row for row in slowfast_fast.explain(model, x, show=False).rows if row.backend != "torch"]
    return sum("conv" in name.rpartition(".")[2] for row in rows for name in row.modules)


def reasons(model: nn.Module, x: list[Tensor]) -> dict[str, str]:
    """Why each module ran as itself, by its path."""
    rows = slowfast_fast.explain(model, x, show=False).rows
    return {row.modules[0]: row.reason for row in rows if row.backend == "torch"}


def assert_mean_of_two_processes(script: str, folder: Path) -> None:
    """``script RANK FOLDER``, run for both ranks, takes a training step of FOLDER/model.pt on its own clips and leaves
    the gradients, which must be the mean of those of both, and the statistics, which must be those of its own clips."""
    fused, stock = pair()
    torch.save(fused, folder / "model.pt")
    expected: list[tuple[Tensor, Tensor]] = []
    for rank in range(2):
        x, single = clips(), copy.deepcopy(stock)
        torch.save(x, folder / f"clips{rank}.pt")
        step(single, x)
        expected.append((gradients(single), statistics(single)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    mean = (expected[0][0] + expected[1][0]) / 2
    for rank in range(2):
        grads, stats = torch.load(folder / f"result{rank}.pt")
        assert distance(grads, mean) < TOLERANCE
        assert distance(stats, expected[rank][1]) < TOLERANCE
