"""What is measured: the shapes of a network's layers, their bytes and FLOPs."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from bench_testing import CPU, FLOAT32, SMALL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slowfast_fast.bench import run as running
from slowfast_fast.bench.cases import DIRECTIONS, Case, traffic
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.network import NetworkCase
from slowfast_fast.bench.run import find_cases
from slowfast_fast.bench.shapes import network_shapes
from slowfast_fast.bench.variants import Problem, stock_eager
from slowfast_fast.reference.slowfast import SlowFast


def temporal_convolutions(depth: int, crop: int, batch: int) -> Counter:
    """What the reference network runs, seen by hooks: (op, input shape, weight shape, stride, channels of slow)."""
    size = crop // 32
    with torch.device("meta"):
        model = SlowFast(model_depth=depth, head_pool_kernel_sizes=((8, size, size), (32, size, size)))
        inputs = [torch.empty(batch, 3, frames, crop, crop) for frames in (8, 32)]
    seen: Counter = Counter()
    slow_channels = {}

    def on_fusion(fusion: nn.Module, arguments: tuple) -> None:
        for module in fusion.modules():
            slow_channels[module] = arguments[0][0].shape[1]

    def on_convolution(conv: nn.Conv3d, arguments: tuple) -> None:
        op = "lateral_concat" if conv in slow_channels else "temporal_conv"
        if conv.kernel_size[0] > 1 and conv.kernel_size[1:] == (1, 1):
            shape, weight = tuple(arguments[0].shape), tuple(conv.weight.shape)
            seen[op, shape, weight, conv.stride, conv.padding, slow_channels.get(conv, 0)] += 1

    for block in model.blocks[:5]:
        block.multipathway_fusion.register_forward_pre_hook(on_fusion)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_pre_hook(on_convolution)
    model(inputs)
    return seen


@pytest.mark.parametrize(("depth", "crop", "batch"), [(50, 224, 1), (50, 256, 2), (18, 224, 1), (101, 224, 1)])
def test_shapes_are_those_of_the_network(depth, crop, batch):
    expected = temporal_convolutions(depth, crop, batch)
    found: Counter = Counter()
    for s in network_shapes(crop, depth=depth, batch=batch):
        x = (s.batch, s.channels, s.frames, s.size, s.size)
        weight = (s.out_channels, s.channels, s.kernel, 1, 1)
        found[s.op, x, weight, (s.stride, 1, 1), (s.padding, 0, 0), s.slow_channels] += s.count
    assert found == expected
    assert sum(expected.values()) == {18: 6 + 4, 50: 25 + 4, 101: 59 + 4}[depth]


def test_names_are_unique():
    names = [case.name for case in find_cases(running.OPS, list(DIRECTIONS), FLOAT32)]
    assert len(set(names)) == len(names) == 2 * (12 + 4 + 1)


@pytest.mark.parametrize("crop", [0, -32, 100])
def test_crop_is_checked(crop):
    with pytest.raises(ValueError, match=rf"crop: expected a positive multiple of 32, got {crop}"):
        network_shapes(crop)


def test_depth_is_checked():
    with pytest.raises(ValueError, match=r"depth: expected one of .*18, 50, 101, 152.*, got 34"):
        network_shapes(depth=34)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", network_shapes(), ids=lambda shape: shape.name)
def test_flops_against_torch(shape, direction):
    x = torch.empty(1, shape.channels, shape.frames, shape.size, shape.size, device="meta", requires_grad=True)
    weight = torch.empty(shape.out_channels, shape.channels, shape.kernel, 1, 1, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = F.conv3d(x, weight, stride=(shape.stride, 1, 1), padding=(shape.padding, 0, 0))
        if direction == "bwd":
            y.sum().backward()
    assert Case(shape, direction, FLOAT32).flops == counter.get_total_flops()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("op", SMALL)
def test_bytes_against_real_tensors(op, precision):
    def size(*tensors: Tensor | None) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    forward = Problem.random(Case(SMALL[op], "fwd", Leg(precision, 2)), CPU)
    y = stock_eager(forward)()["y"]
    # Folded BatchNorm is two vectors; slow is in y once more.
    assert forward.case.bytes == size(forward.x, forward.weight, forward.gamma, forward.beta, forward.slow, y)

    step = Problem.random(Case(SMALL[op], "bwd", Leg(precision, 2)), CPU)
    results = stock_eager(step)()
    raw = y[:, SMALL[op].slow_channels :].clone()
    moved = {
        "forward": size(step.x, step.weight, step.slow, results["y"]) + 2 * size(raw),
        "vectors": size(step.gamma, step.beta, step.mean, step.var, results["dgamma"], results["dbeta"]),
        "reductions": 2 * size(raw),
        "dgrad and wgrad": 2 * size(raw) + size(step.x, step.weight, results["dx"], results["dweight"]),
    }
    assert step.case.bytes == sum(moved.values())
    assert all(value >= 0 for value in traffic(step.case).values())


def test_case_is_checked():
    with pytest.raises(ValueError, match=r"direction: expected one of .*'bwd', 'fwd'.*, got 'train'"):
        Case(SMALL["temporal_conv"], "train", FLOAT32)


def test_network_flops():
    """Against a count by hooks, and the published 50.58 GMAC of R50 8x8 at 224 (which take in norms and pools)."""
    counted = 0

    def count(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = SlowFast()
        for module in model.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                module.register_forward_hook(count)
        model([torch.empty(1, 3, frames, 224, 224) for frames in (8, 32)])
    flops = NetworkCase(FLOAT32, "fwd").flops
    assert flops == counted
    assert flops == pytest.approx(2 * 50.58e9, rel=0.01)
    # In training every layer has a wgrad, and every one but the two stems a dgrad.
    assert 2.8 * flops < NetworkCase(FLOAT32, "bwd").flops < 3 * flops
