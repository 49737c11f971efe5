"""spatial_conv against PyTorch's own convolution: values, edges, layouts, packed weights, errors; and the gradients
that a block in training takes from the same kernels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_arguments import Draw, Integers, Normal
from op_testing import (
    CHANNELS_LAST,
    LAYOUTS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_dense,
    assert_exact,
    assert_same_alone_and_in_a_batch,
    assert_same_for_any_number_of_threads,
    dtypes,
)
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops, reference
from slowfast_fast.ops.bottleneck_bn import NormedConv

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


@dataclass(frozen=True)
class Shape:
    n: int = 2
    c: int = 6
    k: int = 5
    t: int = 2
    h: int = 4
    w: int = 5
    shift: bool = True
    residual: bool = False
    relu: bool = True


SHAPES = {f"{role}{size}": replace(Shape(), **{role: size}) for role in "nckthw" for size in (1, 3, 7)} | {
    "one position": Shape(h=1, w=1),
    "one row": Shape(h=1, w=9),
    "bare": Shape(shift=False, relu=False),
    "residual": Shape(residual=True),
    "panels": Shape(c=40, k=50, h=7, w=6, residual=True),
    "depth in blocks": Shape(n=1, c=300, k=40, t=1, h=7, w=7),
    "groups of panels": Shape(n=1, c=260, k=200, t=1, h=5, w=5, residual=True),
    "tasks": Shape(n=1, c=64, k=64, t=3, h=23, w=21),
    "weights in parts": Shape(n=1, c=512, k=512, t=1, h=7, w=7),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
few_shapes = pytest.mark.parametrize("shape", [Shape(residual=True), SHAPES["bare"]], ids=["all", "bare"])


def call_of(shape: Shape, draw: Draw) -> Call:
    s = shape
    tensors = {"x": draw(s.n, s.c, s.t, s.h, s.w), "weight": draw.weight(s.k, s.c, 1, 3, 3)}
    tensors |= {"shift": draw.shift(s.k)} if s.shift else {}
    tensors |= {"residual": draw(s.n, s.k, s.t, s.h, s.w)} if s.residual else {}
    return Call("spatial_conv", tensors, {"relu": s.relu})


def random_call(shape: Shape, dtype: torch.dtype) -> Call:
    return call_of(shape, Normal(dtype))


def integer_call(shape: Shape, dtype: torch.dtype) -> Call:
    """Transformed weights are quarters, every sum is exact in float32."""
    return call_of(shape, Integers(dtype))


@dtypes
@shapes
def test_random_values(shape: Shape, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(shape, dtype))


@dtypes
@shapes
def test_integers_are_exact(shape: Shape, dtype: torch.dtype) -> None:
    assert_exact(integer_call(shape, dtype))


@dtypes
@few_shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_exact(integer_call(replace(shape, h=4, w=4), dtype), layout)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "reversed", "expanded"])
def test_weights_in_any_layout(layout: str) -> None:
    call = integer_call(Shape(c=7), torch.float32)
    weight = call.tensors["weight"]
    match layout:
        case "channels_last":
            weight = weight.contiguous(memory_format=CHANNELS_LAST)
        case "transposed":
            weight = weight.transpose(3, 4)
        case "reversed":
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        case "expanded":
            weight = weight[:1].expand_as(weight)
    assert_exact(replace(call, tensors=call.tensors | {"weight": weight}))


@dtypes
def test_output_is_dense(dtype: torch.dtype) -> None:
    call = random_call(Shape(), dtype)
    for n in (2, 0):
        call.tensors["x"] = call.tensors["x"][:n]
        y = call.run()["output"]
        assert y.shape == (n, 5, 2, 4, 5)
        assert y.dtype == dtype
        assert_dense(y)


@pytest.mark.parametrize("name", ["n1", "panels", "depth in blocks", "groups of panels", "tasks", "weights in parts"])
def test_packed_weights(name: str) -> None:
    """The same bits as with the weight itself, for x of any size."""
    shape = SHAPES[name]
    call = random_call(shape, torch.float32).to(layout="channels_last")
    x, weight = call.tensors["x"], call.tensors["weight"]
    library = torch.ops.slowfast_fast
    packed = library.spatial_conv_pack(torch.empty(1, shape.c, 1, 8, 8, memory_format=CHANNELS_LAST), weight)
    rest = (call.tensors.get("shift"), call.tensors.get("residual"), shape.relu)
    assert torch.equal(library.spatial_conv_packed(x, weight, packed, *rest), call.run()["output"])
    with pytest.raises(RuntimeError, match=r"packed must be .* bytes from spatial_conv_pack for this x and weight"):
        library.spatial_conv_packed(x, weight, packed[1:], *rest)


def test_same_bits_for_any_number_of_threads() -> None:
    for name in ("tasks", "groups of panels"):
        assert_same_for_any_number_of_threads(random_call(SHAPES[name], torch.float32))


def test_same_bits_alone_and_in_a_batch() -> None:
    assert_same_alone_and_in_a_batch(random_call(Shape(n=3, c=200, h=9, w=9), torch.float32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_no_further(value: float) -> None:
    for h, w in ((3, 4), (4, 3), (0, 7)):
        call = random_call(Shape(n=1, h=9, w=8, relu=False), torch.float32)
        call.tensors["x"][0, 2, 1, h, w] = value
        ours, stock = call.run()["output"], call.run_stock()["output"]
        assert torch.equal(ours.isfinite(), stock.isfinite())
        assert not ours.isfinite().all()


def test_autocast() -> None:
    assert_autocast(random_call(Shape(residual=True), torch.float32), torch.bfloat16, "cpu")


def test_a_gradient_is_refused() -> None:
    call = random_call(Shape(), torch.float32)
    call.tensors["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="spatial_conv has no gradient: it is made for inference"):
        ops.spatial_conv(**call.tensors).sum().backward()


@pytest.mark.no_sanitizer
def test_opcheck_and_compile() -> None:
    call = random_call(Shape(residual=True), torch.float32).to(layout="channels_last")
    torch.library.opcheck(torch.ops.slowfast_fast.spatial_conv.default, (*call.tensors.values(), True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **tensors: ops.spatial_conv(**tensors, relu=True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(**call.tensors), call.run()["output"])


def test_sums_of_few_values_take_pytorch() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.spatial_conv(x, torch.ones(4, x.shape[1], 1, 3, 3))

    for shape, takes in (((1, 2, 1, 4, 4), True), ((1, 8, 1, 1, 4), True), ((1, 3, 1, 4, 3), False)):
        row, *_ = slowfast_fast.explain(Layer(), torch.zeros(shape), show=False).rows
        assert (row.what, row.backend) == ("spatial_conv", "cpu")
        assert ("PyTorch's convolution: of so few values" in row.reason) is takes


@dtypes
@pytest.mark.parametrize("size", [(2, 40, 2, 6, 7), (1, 64, 3, 9, 9), (2, 100, 3, 13, 9)], ids=str)
def test_a_block_in_training_takes_these_kernels(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """b of bottleneck_bn and its gradients, where the device's rule takes the kernels: alone, as a and c are
    identities, and normalised by statistics that leave it as it is."""
    c = size[1]
    if dtype not in (torch.float32, torch.float64):
        pytest.skip("half precision takes the library's convolution")
    # BatchNorm of a batch hides a scale of its input; results and gradients of both sides see the same one.
    x = torch.randn(size, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    weights = [torch.eye(c, dtype=dtype).view(c, c, 1, 1, 1), torch.randn(c, c, 1, 3, 3, dtype=dtype) / (3 * c**0.5)]
    tensors = [x, *weights]

    def block(function: Any, to: torch.dtype) -> list[Tensor]:
        given = [tensor.detach().to(to).requires_grad_() for tensor in tensors]
        one, zero = torch.ones(c, dtype=to), torch.zeros(c, dtype=to)
        convs = [NormedConv(given[1], one, zero), NormedConv(given[2], one, zero), NormedConv(given[1], one, zero)]
        y = function(given[0], *convs)
        return [y.detach(), *torch.autograd.grad(y, given, grad.to(to))]

    grad = torch.randn(size, dtype=dtype)
    ours, stock, exact = (
        block(function, to)
        for function, to in (
            (ops.bottleneck_bn, dtype),
            (reference.bottleneck_bn, dtype),
            (reference.bottleneck_bn, torch.float64),
        )
    )
    for mine, theirs, right in zip(ours, stock, exact, strict=True):
        error, allowed = (mine - right).norm(), 2 * (theirs - right).norm()
        assert error <= max(allowed, 1e-12 * right.norm())


def test_the_judge_is_the_stock_module() -> None:
    call = random_call(Shape(residual=True), torch.float64)
    t = call.tensors
    stock = (F.conv3d(t["x"], t["weight"], t["shift"], padding=(0, 1, 1)) + t["residual"]).relu()
    torch.testing.assert_close(reference.spatial_conv(**t, relu=True), stock)


RIGHT = {"x": torch.zeros(2, 6, 2, 4, 5), "weight": torch.zeros(5, 6, 1, 3, 3)}
WRONG = [
    (TypeError, {"x": None}, "x must be a torch.Tensor; got NoneType"),
    (ValueError, {"x": torch.zeros(6, 2, 4, 5)}, "x must be (N, C, T, H, W); got 4 dimensions"),
    (TypeError, {"weight": None}, "weight must be a torch.Tensor; got NoneType"),
    (ValueError, {"weight": torch.zeros(5, 6, 3, 1, 1)}, "weight must be (K, 6, 1, 3, 3), with the C of x; got shape"),
    (TypeError, {"weight": torch.zeros(5, 6, 1, 3, 3).double()}, "weight must have the dtype of x, torch.float32; got"),
    (ValueError, {"shift": torch.zeros(6)}, "shift must be (5,), one value per output channel; got (6,)"),
    (ValueError, {"residual": torch.zeros(2, 6, 2, 4, 5)}, "residual must have the shape of the output, (2, 5, 2, 4,"),
    (TypeError, {"relu": 1}, "relu must be True or False; got int 1"),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.spatial_conv(**(RIGHT | changes))
