"""A whole residual block of the fast pathway of R50 8x8, in inference: stock modules, oneDNN with post-ops and our ops
layer by layer, and the block as one op. On the CPU in float32, batch 1; --race-rounds and --race-threads hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from slowfast_fast import ops, reference
from slowfast_fast.bench.measure import TOLERANCE, CpuClock, Race, relative_error

CHANNELS_LAST = torch.channels_last_3d
FRAMES = 32
OURS, IN_PLACE = "bottleneck", "bottleneck, out given"


@dataclass(frozen=True)
class Block:
    """A block at crop 224: channels C -> J -> K, the spatial stride, and the height and width of its input."""

    c: int
    j: int
    k: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.c}-{self.j}-{self.k}-{FRAMES}x{self.size}x{self.size}{'-stride2' if self.stride == 2 else ''}"

    @property
    def has_shortcut(self) -> bool:
        return self.c != self.k or self.stride != 1

    @property
    def flops(self) -> int:
        positions, out = (FRAMES * (self.size // stride) ** 2 for stride in (1, self.stride))
        pointwise = self.j * self.k + (self.c * self.k if self.has_shortcut else 0)
        return 2 * (positions * 3 * self.c * self.j + out * (9 * self.j**2 + pointwise))


BLOCKS = (
    *(Block(8, 8, 32, 1, 56), Block(32, 8, 32, 1, 56)),
    *(Block(32, 16, 64, 2, 56), Block(64, 16, 64, 1, 28)),
    *(Block(64, 32, 128, 2, 28), Block(128, 32, 128, 1, 14)),
    *(Block(128, 64, 256, 2, 14), Block(256, 64, 256, 1, 7)),
)


def arguments(block: Block) -> dict[str, Tensor]:
    def weight(*size: int) -> Tensor:
        return torch.randn(size) / torch.Size(size[1:]).numel() ** 0.5

    b = block
    x = torch.randn(1, b.c, FRAMES, b.size, b.size)
    tensors = {
        "x": x.contiguous(memory_format=CHANNELS_LAST),
        "weight_a": weight(b.j, b.c, 3, 1, 1),
        "shift_a": torch.randn(b.j),
        "weight_b": weight(b.j, b.j, 1, 3, 3),
        "shift_b": torch.randn(b.j),
        "weight_c": weight(b.k, b.j, 1, 1, 1),
        "shift_c": torch.randn(b.k),
    }
    if b.has_shortcut:
        tensors |= {"shortcut_weight": weight(b.k, b.c, 1, 1, 1), "shortcut_shift": torch.randn(b.k)}
    return tensors


def chain(block: Block, tensors: dict[str, Tensor], convolve: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The block layer by layer. convolve(x, weight's name, shift's name, padding, stride, residual, relu)."""
    step = [1, block.stride, block.stride]

    def run() -> Tensor:
        x = tensors["x"]
        a = convolve(x, "weight_a", "shift_a", [1, 0, 0], [1, 1, 1], None, True)
        b = convolve(a, "weight_b", "shift_b", [0, 1, 1], step, None, True)
        if block.has_shortcut:
            x = convolve(x, "shortcut_weight", "shortcut_shift", [0, 0, 0], step, None, False)
        return convolve(b, "weight_c", "shift_c", [0, 0, 0], [1, 1, 1], x, True)

    return run


def stock(block: Block, tensors: dict[str, Tensor], memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """nn.Conv3d, nn.BatchNorm3d (whose shift this is) and nn.ReLU, one after the other."""
    tensors = {n: t.contiguous(memory_format=memory_format) if t.dim() == 5 else t for n, t in tensors.items()}
    norms = {}
    for name, tensor in tensors.items():
        if "shift" in name:
            norms[name] = torch.nn.BatchNorm3d(len(tensor), eps=0).eval()
            norms[name].bias.copy_(tensor)

    def convolve(x: Tensor, weight: str, shift: str, padding: Any, stride: Any, residual: Any, relu: bool) -> Tensor:
        y = norms[shift](torch.nn.functional.conv3d(x, tensors[weight], None, stride, padding))
        y = y if residual is None else y + residual
        return y.relu_() if relu else y

    return chain(block, tensors, convolve)


def mkldnn(block: Block, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    """A layer by oneDNN with its post-ops, its weight packed when it first runs."""
    library, packed = torch.ops.mkldnn, {}

    def convolve(x: Tensor, weight: str, shift: str, padding: Any, stride: Any, residual: Any, relu: bool) -> Tensor:
        geometry = (padding, stride, [1, 1, 1], 1)
        if weight not in packed:
            rows = tensors[weight].contiguous(memory_format=CHANNELS_LAST)
            packed[weight] = library._reorder_convolution_weight(rows, *geometry, list(x.shape))
        given = (packed[weight], tensors[shift], *geometry)
        if residual is None:
            return library._convolution_pointwise(x, *given, "relu" if relu else "none", [], "")
        return library._convolution_pointwise.binary(x, residual, *given, "add", 1.0, "relu", [], "")

    return convolve


def layer_by_layer(block: Block, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """temporal_conv for what it can do, oneDNN for the spatial convolution and the strided shortcut."""
    spatial = mkldnn(block, tensors)

    def convolve(x: Tensor, weight: str, shift: str, padding: Any, stride: Any, residual: Any, relu: bool) -> Tensor:
        if tensors[weight].shape[-1] > 1 or stride[-1] > 1:
            return spatial(x, weight, shift, padding, stride, residual, relu)
        return ops.temporal_conv(x, tensors[weight], None, tensors[shift], residual, padding=padding[0], relu=relu)

    return chain(block, tensors, convolve)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bottleneck(block: Block, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = arguments(block)
    with torch.no_grad():
        exact = reference.bottleneck(**{name: t.double() for name, t in tensors.items()}, stride=block.stride)
        out = torch.empty(exact.shape, memory_format=CHANNELS_LAST)
        calls = {
            "stock": stock(block, tensors, torch.contiguous_format),
            "stock channels_last_3d": stock(block, tensors, CHANNELS_LAST),
            "mkldnn post-ops": chain(block, tensors, mkldnn(block, tensors)),
            "temporal_conv and mkldnn": layer_by_layer(block, tensors),
            OURS: lambda: ops.bottleneck(**tensors, stride=block.stride),
            IN_PLACE: lambda: ops.bottleneck(**tensors, stride=block.stride, out=out),
        }
        for name, call in calls.items():
            assert relative_error(call(), exact) < TOLERANCE[torch.float32][0], name
        a, b = torch.randn(2, 1024, 1024)
        race = Race({**calls, "GEMM of 1024": lambda: a @ b}, CpuClock())
        race.warm_up()
        for _ in range(pytestconfig.getoption("--race-rounds")):
            race.round()
    ours = statistics.median(race.seconds[OURS])
    with capsys.disabled():
        print(f"\n{block}, {block.flops / 1e6:.0f} MFLOP")
        for name, seconds in race.seconds.items():
            median, flops = statistics.median(seconds), block.flops if name in calls else 2 * 1024**3
            print(f"  {name:<26}{median * 1e3:8.2f} ms {flops / median / 1e9:6.0f} GFLOP/s {median / ours:6.2f}")
