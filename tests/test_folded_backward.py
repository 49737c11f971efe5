"""The backward of bottleneck_bn where it is folded into the products of narrow layers: on a CPU in float32, with many
rows for few channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_testing import PARAMETERS, BlockCall, Shape, badly_scaled, call_of, layers_of, random_call
from op_testing import allocations, assert_as_exact_as_pytorch, assert_same_for_any_number_of_threads

from slowfast_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SHAPES = {
    "shortcut": Shape(c=6, j=5, k=13, t=5, h=8, w=9),
    "identity": Shape(c=10, j=5, k=10, t=5, h=8, w=9, shortcut=False),
    "one_channel_inside": Shape(c=2, j=1, k=2, h=6, shortcut=False),
    "most_channels": Shape(c=16, j=16, k=33, t=5, h=11, w=10),
    "only_c": Shape(c=17, j=3, k=34, t=4, h=7, w=7),
    "only_the_shortcut": Shape(c=4, j=17, k=12, t=5, h=9, w=8),
    "stride": Shape(c=4, j=3, k=9, t=4, stride=2, h=17, w=15),
    "stride_in_both": Shape(n=3, c=4, j=3, k=9, kt=1, t=7, stride_a=2, stride=3, h=16, w=17),
    "fast_res2_first": Shape(n=1, c=8, j=8, k=32, t=8, h=14, w=14),
    "fast_res2": Shape(n=1, c=32, j=8, k=32, t=8, h=14, w=14, shortcut=False),
    "fast_res3": Shape(n=1, c=64, j=16, k=64, t=8, h=14, w=14, shortcut=False),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_values(shape: Shape) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(shape, torch.float32), trials=3)


@pytest.mark.parametrize("name", ["mean_100", "constant", "correlated"])
def test_badly_scaled(name: str) -> None:
    shape = Shape(n=2, c=6, j=16, k=40, t=4, h=12, w=12, kt=1)
    assert_as_exact_as_pytorch(lambda: badly_scaled(name, shape, torch.float32), trials=7)


@pytest.mark.parametrize("name", ["shortcut", "identity"])
def test_no_tensor_as_wide_as_the_result(name: str) -> None:
    """But the gradient past the last ReLU, whose memory the gradient of x takes where there is no shortcut."""
    call = call_of(SHAPES[name], torch.float32).to(layout="channels_last")
    wide = torch.empty(SHAPES[name].out).numel() * 4
    tensors = {key: tensor.detach().clone() for key, tensor in call.tensors.items()}
    for key in call.differentiable:
        tensors[key].requires_grad_()
    out = ops.bottleneck_bn(tensors["x"], *layers_of(tensors), **call.options)
    allocated = allocations(lambda: out.backward(call.grad))
    assert allocated
    assert sum(size >= wide for size in allocated) == 1, sorted(allocated)


@pytest.mark.parametrize("name", ["shortcut", "identity", "stride"])
def test_each_gradient_by_itself(name: str) -> None:
    shape = SHAPES[name]
    call = random_call(shape, torch.float32)
    every = call.run()
    for wanted in ([f"{layer}_{parameter}"] for layer in shape.layers for parameter in PARAMETERS):
        for result, value in replace(call, differentiable=tuple(wanted)).run().items():
            torch.testing.assert_close(value, every[result], msg=lambda message, n=result: f"{n}: {message}")


@pytest.mark.parametrize("name", ["fast_res2_first", "fast_res3"])
def test_same_for_any_number_of_threads(name: str) -> None:
    call: BlockCall = call_of(SHAPES[name], torch.float32)
    differentiable = tuple(key for key in call.differentiable if key != "b_weight")  # the library's
    assert_same_for_any_number_of_threads(replace(call, differentiable=differentiable))


def test_nan_of_a_gradient() -> None:
    """It spoils what BatchNorm's backward spoils with it."""
    call = random_call(SHAPES["identity"], torch.float32)
    call.grad[0, 3, 0, 0, 0] = float("nan")
    ours, stock = call.run(), call.run_stock()
    for name, result in ours.items():
        assert torch.equal(result.isnan(), stock[name].isnan()), name
