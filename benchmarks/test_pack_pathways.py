"""Decoded frames as the input of both pathways: the chain of PyTorch's operators that stock code runs, and one op.

Bytes to move, of N clips of T frames with H * W pixels and T' = T // alpha slow frames, in a dtype of b bytes:

    N * 3 * H * W * (T + (T + T') * b)

On the CPU; --race-rounds, --race-crop, --race-batch and --race-threads hold, and --race-out FILE writes a document."""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slowfast_fast import ops
from slowfast_fast.bench.measure import CpuClock, Race
from slowfast_fast.bench.report import busy, heading, machine, versions

FRAMES, ALPHA, MEAN, STD = 32, 4, 0.45, 0.225
OURS = "pack_pathways"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMES_FASTER = 3  # than the chain, at the least


def chain(frames: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """ToTensorVideo, Normalize, PackPathway: (N, T, H, W, 3) to two (N, 3, T, H, W), strided as they come."""
    clip = (frames.to(torch.float32) / 255 - MEAN) / STD
    fast = clip.permute(0, 4, 1, 2, 3).to(dtype)
    return [fast.index_select(2, torch.linspace(0, FRAMES - 1, FRAMES // ALPHA).long()), fast]


def measure(dtype: torch.dtype, batch: int, crop: int, rounds: int) -> dict[str, Any]:
    """One dtype: every round's seconds of the op and of both forms of the chain."""
    frames = torch.randint(0, 256, (batch, FRAMES, crop, crop, 3), dtype=torch.uint8)
    moved = frames.numel() + batch * 3 * crop * crop * (FRAMES + FRAMES // ALPHA) * dtype.itemsize
    calls = {
        "PyTorch's chain": lambda: chain(frames, dtype),
        "chain, channels_last_3d": lambda: [
            clip.contiguous(memory_format=torch.channels_last_3d) for clip in chain(frames, dtype)
        ],
        OURS: lambda: ops.pack_pathways(frames, alpha=ALPHA, mean=MEAN, std=STD, dtype=dtype),
    }
    for ours, theirs in zip(calls[OURS](), calls["PyTorch's chain"](), strict=True):
        torch.testing.assert_close(ours, theirs)
    race = Race(calls, CpuClock())
    race.warm_up()
    for _ in range(rounds):
        race.round()
    medians = {name: statistics.median(seconds) for name, seconds in race.seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "frames": list(frames.shape),
        "bytes": moved,
        "variants": {
            name: {
                "median": median,
                "seconds": race.seconds[name],
                "gigabytes_per_second": moved / median / 1e9,
                "times_ours": median / medians[OURS],
            }
            for name, median in medians.items()
        },
    }


def test_pack_pathways(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    batch, crop, rounds, out = (pytestconfig.getoption(f"--race-{n}") for n in ("batch", "crop", "rounds", "out"))
    found = machine(torch.device("cpu"))
    cases = [measure(dtype, batch or 1, crop or 224, rounds) for dtype in DTYPES]
    with capsys.disabled():
        print("\n".join(["", *filter(None, (heading(found), busy(found)))]))
        for case in cases:
            print(f"{case['dtype']}, frames {case['frames']}, {case['bytes'] / 1e6:.0f} MB")
            for name, rates in case["variants"].items():
                print(
                    f"  {name:<26}{rates['median'] * 1e3:8.2f} ms {rates['gigabytes_per_second']:6.1f} GB/s "
                    f"{rates['times_ours']:6.2f}"
                )
    if out is not None:
        run = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
        Path(out).write_text(json.dumps({**run, "machine": found, "rounds": rounds, "cases": cases}, indent=1) + "\n")
    slowest = {case["dtype"]: min(r["times_ours"] for n, r in case["variants"].items() if n != OURS) for case in cases}
    assert min(slowest.values()) >= TIMES_FASTER, slowest
