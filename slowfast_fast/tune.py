"""``python -m slowfast_fast tune``: measures which backend is fastest for what on a device, for ``auto`` to look up.

Every shape class of SlowFast R50 8x8 is measured at the shapes of the network that belong to it, forward and backward,
with the backends that can run it in turn. What a class takes is the sum over its shapes, each as often as the network
has it.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backend import BACKENDS, backend, can_run
from .bench.apart import device_is_lost
from .bench.leg import Leg
from .bench.measure import CpuClock, CudaClock, Race, clock_for
from .bench.report import versions
from .bench.shapes import STAGE_EXPANSION, Shape, network_shapes
from .choosing import shape_class, table_key, table_path

PRECISIONS = ("float16", "bfloat16", "tf32", "float32")


@dataclass(frozen=True)
class Problem:
    """One measured call: a public op at a shape, in a direction (fwd or bwd)."""

    op: str
    direction: str
    shape: Shape


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The compiled backends that can run ``op`` there, leaving out Triton's interpreter."""
    made = [name for name, b in BACKENDS.items() if b.library and not (device.type == "cpu" and b.module)]
    return [name for name in made if can_run(name, op, torch.empty(0, dtype=dtype, device=device)) is None]


def problems(batch: int, crop: int) -> Iterator[Problem]:
    """Every op, direction and shape; beside the temporal convolutions the pointwise ones of such blocks, which run on
    temporal_conv too: the first reduces to the block's width, the last expands again."""
    for shape in network_shapes(crop, batch=batch):
        same = [shape]
        if shape.op == "temporal_conv":
            expanded = shape.out_channels * STAGE_EXPANSION
            same.append(replace(shape, kernel=1))
            same.append(replace(shape, kernel=1, channels=shape.out_channels, out_channels=expanded))
        for one in same:
            for op in (shape.op, f"{shape.op}_bn"):
                yield from (Problem(op, direction, one) for direction in ("fwd", "bwd"))


def arguments(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Activations, weight and vectors of the op, and its options."""
    s = problem.shape

    def clip(channels: int, frames: int) -> Tensor:
        clip = torch.randn(s.batch, channels, frames, s.size, s.size, dtype=dtype, device=device)
        return clip.contiguous(memory_format=torch.channels_last_3d)

    x, weight = clip(s.channels, s.frames), torch.randn(s.out_channels, s.channels, s.kernel, 1, 1).to(device, dtype)
    vectors = [torch.rand(s.out_channels, device=device) + 0.5 for _ in range(2)]
    activations = [x] if s.op == "temporal_conv" else [clip(s.slow_channels, s.out_frames), x]
    options: dict[str, Any] = {"relu": True, "stride" if s.op == "temporal_conv" else "alpha": s.stride}
    if problem.op.endswith("_bn"):
        options["training"] = True
    return [*activations, weight / (s.channels * s.kernel) ** 0.5, *vectors], options


def runner(problem: Problem, name: str, tensors: list[Tensor], options: dict[str, Any]) -> Callable[[], object]:
    """The call on backend ``name``: the forward without gradients, or the backward alone."""
    op = getattr(ops, problem.op)
    if problem.direction == "fwd":

        def forward() -> None:
            with backend(name), torch.no_grad():
                op(*tensors, **options)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with backend(name):
        y = op(*leaves, **options)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def measure(
    problem: Problem, leg: Leg, device: torch.device, rounds: int, clock: CpuClock | CudaClock
) -> dict[str, float]:
    """Median microseconds of each backend that can run the problem; infinite of one that fails, which warns why."""
    tensors, options = arguments(problem, leg.dtype, device)
    calls, names = {}, candidates(problem.op, device, leg.dtype)
    for name in names:
        try:
            call = runner(problem, name, tensors, options)
            call()
        except Exception as error:  # the others are still worth measuring, unless the device is lost
            if device_is_lost(device):
                raise
            warnings.warn(f"{name} failed at {problem}: {error}", stacklevel=2)
        else:
            calls[name] = call
    race = Race(calls, clock)
    race.warm_up(3)
    for _ in range(rounds):
        race.round()
    return {name: 1e6 * statistics.median(race.seconds[name]) if name in calls else math.inf for name in names}


def tune(
    device: torch.device,
    *,
    precisions: tuple[str, ...] = PRECISIONS,
    batch: int = 8,
    crop: int = 224,
    rounds: int = 30,
    report: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], object] = lambda table: None,
    measured: Callable[..., dict[str, float]] = measure,
) -> dict[str, Any]:
    """Measure, and return the content of a table; `keep` is given what there is of it after every problem.

    Raises ValueError where there is nothing to choose between.
    """
    able = candidates("temporal_conv", device, torch.float32)
    if len(able) < 2:
        only = " and ".join(able) or "none"
        refused = "; ".join(
            f"{name}: {why_not}"
            for name, b in BACKENDS.items()
            if b.library and (why_not := can_run(name, "temporal_conv", torch.empty(0, device=device))) is not None
        )
        raise ValueError(f"tune needs two backends to choose between; on {device} there is {only} ({refused})")
    clock = clock_for(device)
    made = versions() | {"batch": str(batch), "crop": str(crop)}
    table: dict[str, Any] = {}
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for precision in precisions:
        leg = Leg(precision, batch, crop)
        with leg.applied():
            for problem in problems(batch, crop):
                s = problem.shape
                weight = torch.empty(s.out_channels, s.channels, s.kernel, 1, 1, device="meta")
                tf32 = leg.tf32 and device.type == "cuda"
                key = table_key(problem.op, problem.direction, leg.dtype, tf32, shape_class(weight, s.stride))
                for name, microseconds in measured(problem, leg, device, rounds, clock).items():
                    totals[key][name] += s.count * microseconds
                report(f"{key}: " + ", ".join(f"{name} {t:.1f}" for name, t in totals[key].items()) + " us")
                ran = {
                    key: {name: round(t, 2) for name, t in times.items() if t < math.inf}
                    for key, times in totals.items()
                }
                table = {
                    "device": device_name(device),
                    "made": made,
                    "fastest": fastest(ran),
                    "microseconds": ran,
                }
                keep(table)
    return table


def fastest(totals: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The quickest backend of each class in which any ran."""
    return {key: min(times, key=times.__getitem__) for key, times in sorted(totals.items()) if times}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type


def write(table: dict[str, Any], path: Path | None) -> Path:
    """Write a table, by default where ``auto`` looks for it; returns the path."""
    path = path or table_path(table["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path
