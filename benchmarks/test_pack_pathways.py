"""Decoded frames as the input of both pathways: the chain of PyTorch's operators that stock code runs, and one op.

Bytes to move, of N clips of T frames with H * W pixels and T' = T // alpha slow frames, in a dtype of b bytes:

    N * 3 * H * W * (T + (T + T') * b)

On the CPU; --race-rounds, --race-crop, --race-batch and --race-threads hold."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from slowfast_fast import ops
from slowfast_fast.bench.measure import CpuClock, Race

FRAMES, ALPHA, MEAN, STD = 32, 4, 0.45, 0.225
OURS = "pack_pathways"


def chain(frames: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """ToTensorVideo, Normalize, PackPathway: (N, T, H, W, 3) to two (N, 3, T, H, W), strided as they come."""
    clip = (frames.to(torch.float32) / 255 - MEAN) / STD
    fast = clip.permute(0, 4, 1, 2, 3).to(dtype)
    return [fast.index_select(2, torch.linspace(0, FRAMES - 1, FRAMES // ALPHA).long()), fast]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pack_pathways(dtype: torch.dtype, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    batch, crop = (pytestconfig.getoption(f"--race-{name}") for name in ("batch", "crop"))
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
    for _ in range(pytestconfig.getoption("--race-rounds")):
        race.round()
    ours = statistics.median(race.seconds[OURS])
    with capsys.disabled():
        print(f"\n{batch} x {FRAMES} x {crop}^2, {dtype}, {torch.get_num_threads()} threads, {moved / 1e6:.0f} MB")
        for name, seconds in race.seconds.items():
            median = statistics.median(seconds)
            print(f"  {name:<26}{median * 1e3:8.2f} ms {moved / median / 1e9:6.1f} GB/s {median / ours:6.2f}")
