"""What a call costs the host: the ops on tensors so small that nothing else counts, beside the stock modules.

The host's time of one thread for one call: the least over rounds that take turns, since whatever disturbs a machine
only adds to it. On a GPU the kernels run meanwhile, and the host waits for them between rounds only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slowfast_fast import ops

ROUNDS, CALLS = 200, 50
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


class Layers:
    """A temporal and a lateral convolution of 8 channels, as modules and as the arguments of the ops."""

    def __init__(self, device: str, training: bool) -> None:
        self.temporal, self.lateral = (
            nn.Conv3d(8, 8, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False).to(device) for stride in (1, 4)
        )
        self.norm = nn.BatchNorm3d(8).to(device).train(training)
        self.relu = nn.ReLU()
        self.x = self.clip(4, device)
        self.slow = self.clip(1, device)
        self.training = training

    @staticmethod
    def clip(frames: int, device: str) -> Tensor:
        return torch.randn(1, 8, frames, 2, 2, device=device).contiguous(memory_format=torch.channels_last_3d)

    def calls(self) -> dict[str, dict[str, Callable[[], Any]]]:
        n, x, slow = self.norm, self.x, self.slow
        statistics = (n.weight, n.bias, n.running_mean, n.running_var)
        options = {"num_batches_tracked": n.num_batches_tracked, "training": self.training, "relu": True}
        scale, shift = torch.rand_like(n.weight), torch.rand_like(n.weight)
        temporal, lateral = self.temporal.weight, self.lateral.weight
        of_ops: dict[str, dict[str, Callable[[], Any]]] = {
            "temporal_conv_bn": {
                "ours": lambda: ops.temporal_conv_bn(x, temporal, *statistics, **options),
                "stock": lambda: self.relu(n(self.temporal(x))),
            },
            "lateral_concat_bn": {
                "ours": lambda: ops.lateral_concat_bn(slow, x, lateral, *statistics, **options, alpha=4),
                "stock": lambda: torch.cat([slow, self.relu(n(self.lateral(x)))], 1),
            },
        }
        if not self.training:
            of_ops["temporal_conv"] = {
                "ours": lambda: ops.temporal_conv(x, temporal, scale, shift, relu=True),
                "stock": lambda: F.relu(F.conv3d(x, temporal, shift, 1, (1, 0, 0))),
            }
        return of_ops


def least_microseconds(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.thread_time() - start) / CALLS)
    return {name: 1e6 * seconds for name, seconds in least.items()}


@pytest.mark.parametrize("mode", ["evaluation", "training forward", "training forward, gradients"])
@pytest.mark.parametrize("device", DEVICES)
def test_overhead(device: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.set_grad_enabled(mode.endswith("gradients")):
            for op, calls in Layers(device, training=mode != "evaluation").calls().items():
                found = least_microseconds(calls, device)
                with capsys.disabled():
                    ratio = found["stock"] / found["ours"]
                    print(
                        f"\n{device} {mode}: {op} {found['ours']:.1f} us, stock {found['stock']:.1f} us, {ratio:.2f}x",
                        end="",
                    )
    finally:
        torch.set_num_threads(threads)
