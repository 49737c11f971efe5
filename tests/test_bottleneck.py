"""bottleneck against PyTorch's own convolutions: values, halos, layouts, errors."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_testing import Shape as BlockShape
from conftest import device_of
from op_arguments import Draw, Integers, Normal, accumulation, small_integers
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
    lay_out,
)
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


class Shape(BlockShape):
    """Of a block that keeps T."""

    @property
    def options(self) -> dict[str, Any]:
        every = super().options
        return {name: every[name] for name in ("padding_a", "stride", "dilation")}


ODD = {f"{role}{size}": replace(Shape(), **{role: size}) for role in "ncjkthw" for size in (1, 7, 33)}
GEOMETRY = {
    f"kt{kt}_stride{stride}_dilation{dilation}_{h}x{w}": Shape(kt=kt, stride=stride, dilation=dilation, h=h, w=w)
    for kt, stride, dilation, (h, w) in itertools.product((1, 3), (1, 2), (1, 2), ((1, 1), (2, 9), (7, 8)))
}
IDENTITY = {
    f"identity_{name}": replace(Shape(shortcut=False), **changes)
    for name, changes in {
        "kt3": {},
        "kt1": {"kt": 1},
        "kt5_t2": {"kt": 5, "t": 2},
        "dilation2": {"dilation": 2},
    }.items()
}
# The fast pathway of R50: the widths that kernels are made for, on small images; and a band's height and more.
REAL = {
    "res2_first": Shape(n=1, c=8, j=8, k=32, h=9, w=13),
    "res2": Shape(n=1, c=32, j=8, k=32, h=8, w=12, shortcut=False),
    "res3_first": Shape(n=1, c=32, j=16, k=64, stride=2, h=8, w=10),
    "res3": Shape(n=1, c=64, j=16, k=64, shortcut=False),
    "res4_first": Shape(n=1, c=64, j=32, k=128, stride=2, h=6, w=6),
    "res4": Shape(n=1, c=128, j=32, k=128, shortcut=False),
    "res5_first": Shape(n=1, c=128, j=64, k=256, stride=2, t=2),
    "res5": Shape(n=1, c=256, j=64, k=256, t=2, h=7, w=7, shortcut=False),
    "bands": Shape(n=1, c=32, j=8, k=32, t=5, h=37, w=61, shortcut=False),
    "bands_stride2": Shape(n=1, c=40, j=8, k=32, t=2, h=45, w=59, stride=2),
}
SHAPES = ODD | GEOMETRY | IDENTITY | REAL

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
few_shapes = pytest.mark.parametrize("shape", [Shape(stride=2), Shape(shortcut=False)], ids=["shortcut", "identity"])


def call_of(shape: Shape, draw: Draw) -> Call:
    s = shape
    tensors = {
        "x": draw(s.n, s.c, s.t, s.h, s.w),
        "weight_a": draw.weight(s.j, s.c, s.kt, 1, 1),
        "shift_a": draw.shift(s.j),
        "weight_b": draw.weight(s.j, s.j, 1, 3, 3),
        "shift_b": draw.shift(s.j),
        "weight_c": draw.weight(s.k, s.j, 1, 1, 1),
        "shift_c": draw.shift(s.k),
    }
    if s.shortcut:
        tensors |= {"shortcut_weight": draw.weight(s.k, s.c, 1, 1, 1), "shortcut_shift": draw.shift(s.k)}
    else:
        assert (s.c, s.stride) == (s.k, 1)
    return Call("bottleneck", tensors, s.options)


def random_call(shape: Shape, dtype: torch.dtype) -> Call:
    """Shifts have a deviation of 1, so that what lies beside the image matters. shift_c leaves most results positive:
    over the few that a negative one leaves, a ratio of errors means nothing."""
    call = call_of(shape, Normal(dtype))
    call.tensors["shift_c"].clamp_(min=1)
    return call


class SparseIntegers(Integers):
    """So small, and weights so sparse, that every sum is exact in bfloat16, which CUDA keeps a and b in."""

    def __call__(self, *shape: int) -> Tensor:
        return super().__call__(*shape).clamp(-1, 1)

    def weight(self, *shape: int) -> Tensor:
        return self(*shape) * (torch.rand(shape) < 16 / math.prod(shape[1:]))

    def shift(self, k: int) -> Tensor:
        return small_integers(k, dtype=accumulation(self.dtype))


def integer_call(shape: Shape, dtype: torch.dtype) -> Call:
    return call_of(shape, SparseIntegers(dtype))


@dtypes
@shapes
def test_random_values(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(shape, dtype), device=device_of(compiled_backend))


@dtypes
@shapes
def test_integers_are_exact(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_exact(integer_call(shape, dtype), device=device_of(compiled_backend))


@dtypes
@few_shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, shape: Shape, dtype: torch.dtype) -> None:
    if backend == "reference" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("plain PyTorch rounds between the layers")
    call = integer_call(replace(shape, h=4, w=4), dtype)
    assert_exact(call, layout, device_of(backend))


@pytest.mark.parametrize("padding", [0, 1])
def test_zeros_beside_the_image_not_the_shift(compiled_backend: str, padding: int) -> None:
    """With x = 0, a is relu(shift_a) inside of the image and 0 outside: b counts its neighbours in the image."""
    kt = 2 * padding + 1
    ones = {"weight_a": (1, 1, kt, 1, 1), "weight_b": (1, 1, 1, 3, 3), "weight_c": (1, 1, 1, 1, 1)}
    tensors = {name: torch.ones(size) for name, size in ones.items()} | {"x": torch.zeros(1, 1, 2, 3, 4)}
    tensors |= {"shift_a": torch.ones(1), "shift_b": torch.zeros(1), "shift_c": torch.zeros(1)}
    device = device_of(compiled_backend)
    y = ops.bottleneck(**{name: tensor.to(device) for name, tensor in tensors.items()}, padding_a=padding)
    expected = torch.tensor([[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    assert torch.equal(y.cpu(), expected.expand(1, 1, 2, 3, 4))


@dtypes
@few_shapes
def test_output_is_dense(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    call = random_call(shape, dtype).to(device=device_of(backend))
    for n in (2, 0):
        call.tensors["x"] = call.tensors["x"][:n]
        y = call.run()["output"]
        assert y.shape == replace(shape, n=n).out
        assert y.dtype == dtype
        assert_dense(y)


@dtypes
@few_shapes
def test_into_a_channel_slice(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    """x and out are slices of one wide tensor, what lies around them stays as it is."""
    if not shape.shortcut:
        shape = replace(shape, c=8, k=8)
    call = random_call(shape, dtype).to(device=device_of(backend))
    expected = call.run()["output"]
    n, k, t, h, w = shape.out
    wide = lay_out(torch.full((n, k + 7, t, h, w), math.nan, dtype=dtype, device=expected.device), "channels_last")
    out = wide[:, 3 : 3 + k]
    assert ops.bottleneck(**call.tensors, **call.options, out=out) is out
    assert torch.equal(out, expected)
    assert wide[:, :3].isnan().all()
    assert wide[:, 3 + k :].isnan().all()
    again = lay_out(torch.full_like(out, math.nan), "channels_last")
    for _ in range(2):  # the second call takes the short way
        ops.bottleneck(**call.tensors, **call.options, out=again)
        assert torch.equal(again, expected)


def test_same_bits_for_any_number_of_threads(compiled_backend: str) -> None:
    for shape in (REAL["bands"], REAL["bands_stride2"]):
        assert_same_for_any_number_of_threads(random_call(shape, torch.float32).to(device=device_of(compiled_backend)))


def test_same_bits_alone_and_in_a_batch(compiled_backend: str) -> None:
    call = random_call(Shape(n=3, h=9, w=9), torch.float32)
    assert_same_alone_and_in_a_batch(call.to(device=device_of(compiled_backend)))


def test_nan_and_infinity_pass(compiled_backend: str) -> None:
    call = random_call(Shape(shortcut=False, n=1, h=7, w=7), torch.float32)
    call.tensors["x"][0, 2, 1, 3, 3] = math.nan
    ours, stock = call.to(device=device_of(compiled_backend)).run()["output"].cpu(), call.run_stock()["output"]
    assert torch.equal(ours.isnan(), stock.isnan())
    assert ours.isnan().any()


def test_autocast(backend: str) -> None:
    assert_autocast(random_call(Shape(), torch.float32), torch.bfloat16, device_of(backend))


@pytest.mark.parametrize("name", ["x", "weight_b", "shift_c", "shortcut_weight"])
def test_gradients_are_refused(backend: str, name: str) -> None:
    call = random_call(Shape(), torch.float32).to(device=device_of(backend))
    call.tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match="bottleneck has no backward: it is for inference"):
        ops.bottleneck(**call.tensors, **call.options)
    with torch.no_grad():
        assert not ops.bottleneck(**call.tensors, **call.options).requires_grad


def test_gradient_of_the_bare_op_raises() -> None:
    call = random_call(Shape(), torch.float32).to(layout="channels_last")
    call.tensors["x"].requires_grad_()
    y = torch.ops.slowfast_fast.bottleneck(*call.tensors.values(), *call.options.values(), False)
    with pytest.raises(RuntimeError, match="bottleneck has no backward"):
        y.sum().backward()


@pytest.mark.no_sanitizer
@few_shapes
def test_opcheck_and_compile(shape: Shape) -> None:
    call = random_call(shape, torch.float32).to(layout="channels_last")
    arguments = [call.tensors.get(name) for name in (*random_call(Shape(), torch.float32).tensors,)]
    options = (*call.options.values(), False)
    library = torch.ops.slowfast_fast
    torch.library.opcheck(library.bottleneck.default, (*arguments, *options))
    out = torch.empty(shape.out, memory_format=CHANNELS_LAST)
    torch.library.opcheck(library.bottleneck_out.default, (out, *arguments, *options))

    def both(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.zeros(shape.out).contiguous(memory_format=CHANNELS_LAST)
        return ops.bottleneck(**tensors, **call.options), ops.bottleneck(**tensors, **call.options, out=wide)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = call.run()["output"]
        for y in torch.compile(both, fullgraph=True, backend="aot_eager")(**call.tensors):
            assert torch.equal(y, expected)


def test_explain_tells_of_the_kernel() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tensors = random_call(Shape(), x.dtype).tensors
            return ops.bottleneck(**(tensors | {"x": x}))

    for dtype, said in ((torch.float32, ""), (torch.float16, "float16 is converted to float32 row by row")):
        row, *_ = slowfast_fast.explain(Block(), torch.zeros(2, 6, 3, 4, 5, dtype=dtype), show=False).rows
        assert (row.what, row.backend) == ("bottleneck", "cpu")
        assert said in row.reason
        assert "copied x (2, 6, 3, 4, 5)" in row.reason


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_is_stock_modules(stride: int) -> None:
    """The judge itself against the modules that it stands for, whose statistics are folded."""
    shape = Shape(stride=stride)
    call = random_call(shape, torch.float64)
    step = (1, stride, stride)
    convs = {
        "a": nn.Conv3d(shape.c, shape.j, (3, 1, 1), padding=(1, 0, 0), bias=False),
        "b": nn.Conv3d(shape.j, shape.j, (1, 3, 3), stride=step, padding=(0, 1, 1), bias=False),
        "c": nn.Conv3d(shape.j, shape.k, 1, bias=False),
        "shortcut": nn.Conv3d(shape.c, shape.k, 1, stride=step, bias=False),
    }
    layers, tensors = {}, {"x": call.tensors["x"]}
    for name, conv in convs.items():
        norm = nn.BatchNorm3d(conv.out_channels)
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        layers[name] = nn.Sequential(conv, norm).double().eval()
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        names = ("shortcut_weight", "shortcut_shift") if name == "shortcut" else (f"weight_{name}", f"shift_{name}")
        tensors[names[0]] = conv.weight * scale.view(-1, 1, 1, 1, 1)
        tensors[names[1]] = norm.bias - norm.running_mean * scale
    with torch.no_grad():
        x = tensors["x"]
        inner = layers["b"](layers["a"](x).relu()).relu()
        stock = (layers["c"](inner) + layers["shortcut"](x)).relu()
        torch.testing.assert_close(reference.bottleneck(**tensors, **call.options), stock, rtol=1e-12, atol=1e-12)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


RIGHT = {
    "x": zeros(2, 6, 3, 4, 5),
    "weight_a": zeros(5, 6, 3, 1, 1),
    "shift_a": zeros(5),
    "weight_b": zeros(5, 5, 1, 3, 3),
    "shift_b": zeros(5),
    "weight_c": zeros(6, 5, 1, 1, 1),
    "shift_c": zeros(6),
}
WRONG = [
    (TypeError, {"x": None}, "x must be a torch.Tensor; got NoneType"),
    (ValueError, {"x": zeros(6, 3, 4, 5)}, "x must be (N, C, T, H, W); got 4 dimensions"),
    (TypeError, {"weight_a": None}, "weight_a must be a torch.Tensor; got NoneType"),
    (
        ValueError,
        {"weight_a": zeros(5, 7, 3, 1, 1)},
        "weight_a must be (J, 6, kt, 1, 1), with the C of x; got shape (5,",
    ),
    (
        ValueError,
        {"weight_a": zeros(5, 6, 2, 1, 1)},
        "padding_a must keep T: kt // 2 for an odd kt; got padding_a None",
    ),
    (ValueError, {"padding_a": 0}, "padding_a must keep T"),
    (TypeError, {"padding_a": 1.0}, "padding_a must be an int"),
    (
        ValueError,
        {"weight_b": zeros(5, 5, 3, 1, 1)},
        "weight_b must be (5, 5, 1, 3, 3), with the J of weight_a; got shape",
    ),
    (
        TypeError,
        {"weight_b": zeros(5, 5, 1, 3, 3).double()},
        "weight_b must have the dtype of x, torch.float32; got torch.",
    ),
    (
        ValueError,
        {"weight_c": zeros(6, 4, 1, 1, 1)},
        "weight_c must be (K, 5, 1, 1, 1), with the J of weight_a; got shape",
    ),
    (TypeError, {"shift_a": None}, "shift_a must be a torch.Tensor; got NoneType"),
    (ValueError, {"shift_b": zeros(6)}, "shift_b must be (5,), one value per output channel; got (6,)"),
    (TypeError, {"shift_c": zeros(6).half()}, "shift_c must be float32 or of the dtype of weight"),
    (ValueError, {"stride": 3}, "stride must be 1 or 2; got 3"),
    (ValueError, {"dilation": 0}, "dilation must be at least 1; got 0"),
    (
        ValueError,
        {"stride": 2},
        "shortcut_weight must be given where x cannot be added to the result: C = 6, K = 6, stride 2",
    ),
    (ValueError, {"weight_c": zeros(7, 5, 1, 1, 1), "shift_c": zeros(7)}, "C = 6, K = 7, stride 1"),
    (ValueError, {"shortcut_weight": zeros(6, 6, 1, 1, 1)}, "must be given together; got None for shortcut_shift"),
    (ValueError, {"shortcut_shift": zeros(6)}, "must be given together; got None for shortcut_weight"),
    (
        ValueError,
        {"shortcut_weight": zeros(6, 5, 1, 1, 1), "shortcut_shift": zeros(6)},
        "shortcut_weight must be (6, 6, 1, 1, 1), with the K of weight_c and the C of x; got shape (6, 5, 1, 1, 1)",
    ),
    (
        ValueError,
        {"out": zeros(2, 6, 3, 4, 4)},
        "out must have the shape of the output, (2, 6, 3, 4, 5); got (2, 6, 3, 4, 4)",
    ),
    (ValueError, {"out": zeros(2, 6, 3, 4, 5)}, "out must be rows of channels"),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.bottleneck(**(RIGHT | changes))


def test_each_input_in_its_own_layout(compiled_backend: str) -> None:
    """out in every layout that is rows, under x in every layout."""
    call = integer_call(Shape(h=4, w=4), torch.float32)
    expected, device = call.run_exact()["output"].float(), device_of(compiled_backend)
    for of_x, of_out in itertools.product(LAYOUTS, LAYOUTS[:5]):
        tensors = {name: t.to(device) for name, t in call.tensors.items()}
        out = lay_out(torch.full(call_shape(call), math.nan, device=device), of_out)
        ops.bottleneck(**(tensors | {"x": lay_out(tensors["x"], of_x)}), **call.options, out=out)
        assert torch.equal(out.cpu(), expected), (of_x, of_out)


def call_shape(call: Call) -> tuple[int, ...]:
    n, _, t, h, w = call.tensors["x"].shape
    return (n, call.tensors["weight_c"].shape[0], t, h, w)
