"""temporal_conv against PyTorch's own operators: values, gradients, layouts, errors. Its BatchNorm form is in
test_batch_norm.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from op_arguments import Draw, Integers, Normal, evaluated_norm, without
from op_testing import (
    CHANNELS_LAST,
    LAYOUTS,
    ROWS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_checkpoint,
    assert_dense,
    assert_exact,
    assert_same_for_any_number_of_threads,
    dtypes,
    lay_out,
)
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


@dataclass(frozen=True)
class Shape:
    n: int = 2
    c: int = 5
    k: int = 6
    t: int = 4
    h: int = 3
    w: int = 2
    kt: int = 3
    stride: int = 1
    padding: int | None = None
    dilation: int = 1

    @property
    def pad(self) -> int:
        return self.kt // 2 if self.padding is None else self.padding

    @property
    def t_out(self) -> int:
        return (self.t + 2 * self.pad - self.dilation * (self.kt - 1) - 1) // self.stride + 1

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


ODD = {f"{role}{size}": replace(Shape(), **{role: size}) for role in "ncthwk" for size in (1, 3, 7, 129)}
KERNELS = {f"kt{kt}": Shape(kt=kt, t=9) for kt in (1, 3, 5, 7)}
GEOMETRY = {
    "t1_kt7": Shape(t=1, kt=7),
    "t2_kt7_stride3": Shape(t=2, kt=7, stride=3),
    "unpadded": Shape(t=7, kt=5, padding=0),
    "padding_beyond_kernel": Shape(t=3, kt=3, padding=5),
    "stride2": Shape(t=7, stride=2),
    "stride4_kt7": Shape(t=17, stride=4, kt=7),
    "stride8_kt5": Shape(t=32, stride=8, kt=5),
    "stride_beyond_kernel": Shape(t=11, stride=4, kt=1),
    "dilation2": Shape(t=9, dilation=2, padding=2),
    "dilation3_stride2": Shape(t=12, dilation=3, stride=2, kt=5),
    "even_kernel": Shape(t=6, kt=4, padding=1),
}
# Widths that kernels are made for, and their neighbours.
WIDTHS = {
    f"c{c}_k{k}": Shape(c=c, k=k, h=5, w=7)
    for c, k in [(8, 8), (8, 16), (16, 32), (32, 8), (33, 31), (64, 80), (256, 64)]
}
# Sums over 25088 positions.
LONG = {"long": Shape(c=8, k=8, t=16, h=28, w=28)}
SHAPES = ODD | KERNELS | GEOMETRY | WIDTHS | LONG

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def call_of(shape: Shape, draw: Draw, *absent: str, relu: bool = True, gradients: bool = True) -> Call:
    """A call with every argument but those ``absent``."""
    s = shape
    out = (s.n, s.k, s.t_out, s.h, s.w)
    tensors = {
        "x": draw(s.n, s.c, s.t, s.h, s.w),
        "weight": draw.weight(s.k, s.c, s.kt, 1, 1),
        "scale": draw.scale(s.k),
        "shift": draw.shift(s.k),
        "residual": draw(*out),
    }
    tensors = without(tensors, absent)
    return Call("temporal_conv", tensors, s.options | {"relu": relu}, tuple(tensors) if gradients else (), draw(*out))


def random_call(shape: Shape, dtype: torch.dtype, *absent: str, **options: bool) -> Call:
    return call_of(shape, Normal(dtype), *absent, **options)


def integer_call(shape: Shape, dtype: torch.dtype, *absent: str, **options: bool) -> Call:
    return call_of(shape, Integers(dtype), *absent, **options)


@dtypes
@shapes
def test_random_values(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(shape, dtype), device=device_of(compiled_backend))


@dtypes
@shapes
def test_integers_are_exact(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    if backend == "reference" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("PyTorch's own convolution rounds its sums before scale and shift")
    assert_exact(integer_call(shape, dtype), device=device_of(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(
    "absent", [a for r in range(4) for a in itertools.combinations(("scale", "shift", "residual"), r)], ids=str
)
def test_optional_arguments(backend: str, absent: tuple[str, ...], relu: bool, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(Shape(), dtype, *absent, relu=relu), device=device_of(backend))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    shape = Shape(c=16, k=24, h=4, w=6)
    assert_as_exact_as_pytorch(lambda: random_call(shape, dtype), layout, device_of(backend))


@pytest.mark.parametrize("vector_dtype", ["float32", "own"])
@dtypes
def test_output_and_gradients_keep_dtype_and_layout(backend: str, dtype: torch.dtype, vector_dtype: str) -> None:
    call = random_call(Shape(), dtype).to(device=device_of(backend))
    for name in ("scale", "shift"):
        call.tensors[name] = call.tensors[name].to(dtype if vector_dtype == "own" else torch.float32)
    results = call.run()
    assert_dense(results["output"])
    assert results["output"].dtype == dtype
    for name in call.differentiable:
        gradient = results[f"grad of {name}"]
        assert gradient.dtype == call.tensors[name].dtype, name
        assert gradient.shape == call.tensors[name].shape, name


@dtypes
def test_empty_batch(backend: str, dtype: torch.dtype) -> None:
    results = random_call(Shape(n=0), dtype).to(device=device_of(backend)).run()
    assert results["output"].shape == (0, 6, 4, 3, 2)
    assert_dense(results["output"])
    for name in ("weight", "scale", "shift"):
        assert torch.equal(results[f"grad of {name}"], torch.zeros_like(results[f"grad of {name}"])), name
    for name in ("x", "residual"):
        assert results[f"grad of {name}"].shape[0] == 0


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("scale",), ("shift",), ("residual",), ("weight", "shift")], ids=str
)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_some_gradients_only(backend: str, wanted: tuple[str, ...], relu: bool) -> None:
    call = integer_call(Shape(), torch.float32, relu=relu)
    assert_exact(replace(call, differentiable=wanted), device=device_of(backend))


def test_frames_beside_the_slice_are_not_read(backend: str) -> None:
    """The window reaches beyond the first and last frame of the slice; zeros belong there, not the neighbours."""
    call = integer_call(Shape(t=5, kt=7, h=4, w=4), torch.float32).to(layout="time_slice", device=device_of(backend))
    results = call.run()
    assert all(torch.isfinite(result).all() for result in results.values())


def test_no_copy_of_rows(compiled_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the contract calls rows goes to the kernels as it is, in the backward too."""

    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("memory_format") is CHANNELS_LAST:
            raise AssertionError("copied")
        return contiguous(self, *args, **kwargs)

    contiguous = Tensor.contiguous
    for layout in ROWS:
        call = random_call(Shape(), torch.float32).to(layout=layout, device=device_of(compiled_backend))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "contiguous", refuse)
            call.run()


def test_residual_gradient_without_relu_is_the_given_one() -> None:
    call = random_call(Shape(), torch.float32, relu=False).to(layout="channels_last")
    assert call.run()["grad of residual"].data_ptr() == call.grad.data_ptr()


def test_gradcheck(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    shape = Shape(n=2, c=3, k=4, t=5, h=2, w=2, kt=3, stride=2, dilation=2, padding=3)
    call = random_call(shape, torch.float64).to(layout="channels_last")
    for relu in (False, True):
        for absent in ((), ("scale",), ("shift", "residual")):
            names = [name for name in call.tensors if name not in absent]
            inputs = [call.tensors[name].clone().requires_grad_() for name in names]
            torch.autograd.gradcheck(
                lambda *tensors, names=names, relu=relu: ops.temporal_conv(
                    **dict(zip(names, tensors, strict=True)), **shape.options, relu=relu
                ),
                inputs,
            )


def test_double_backward_raises_by_name() -> None:
    call = random_call(Shape(), torch.float64)
    x, weight = call.tensors["x"].requires_grad_(), call.tensors["weight"].requires_grad_()
    with slowfast_fast.backend("cpu"):
        (dx,) = torch.autograd.grad(ops.temporal_conv(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward through temporal_conv"):
            dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [Shape(n=3, c=40, k=24, t=9, h=9, w=11), Shape(n=1, c=8, k=8, t=16, h=20, w=20)], ids=["wide", "narrow"]
)
def test_same_bits_for_any_number_of_threads(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_same_for_any_number_of_threads(random_call(shape, dtype).to(device=device_of(compiled_backend)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    call = random_call(Shape(), torch.float32)
    assert_autocast(call, dtype, device_of(backend))
    with torch.autocast("cpu", dtype):
        assert F.conv3d(call.tensors["x"], call.tensors["weight"]).dtype == dtype  # as PyTorch's own does


def test_autocast_leaves_float64_alone(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    call = random_call(Shape(), torch.float64, gradients=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv3d(call.tensors["x"], call.tensors["weight"]).dtype == torch.float64
        assert call.run()["output"].dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend: str, use_reentrant: bool) -> None:
    assert_checkpoint(random_call(Shape(), torch.float32).to(device=device_of(backend)), use_reentrant)


def test_reference_is_stock_modules(seed: int) -> None:
    """The judge itself against the modules that it stands for."""
    shape = Shape(t=9, kt=5, stride=2)
    call = random_call(shape, torch.float64, "scale", "shift")
    conv = torch.nn.Conv3d(shape.c, shape.k, (5, 1, 1), stride=(2, 1, 1), padding=(2, 0, 0), bias=False).double()
    norm, folded = evaluated_norm(shape.k)
    with torch.no_grad():
        conv.weight.copy_(call.tensors["weight"])
        stock = F.relu(norm(conv(call.tensors["x"])) + call.tensors["residual"])
        ours = reference.temporal_conv(**call.tensors, **folded, **call.options)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


RIGHT = {
    "x": zeros(2, 5, 4, 3, 2),
    "weight": zeros(6, 5, 3, 1, 1),
    "scale": zeros(6),
    "shift": zeros(6),
    "residual": zeros(2, 6, 4, 3, 2),
}
WRONG = [
    (TypeError, {"x": "clip"}, "x must be a torch.Tensor; got str"),
    (ValueError, {"x": zeros(5, 4, 3, 2)}, "x must be (N, C, T, H, W); got 4 dimensions, shape (5, 4, 3, 2)"),
    (ValueError, {"x": zeros(2, 5, 0, 3, 2)}, "x may be empty in N only; got (N, C, T, H, W) = (2, 5, 0, 3, 2)"),
    (TypeError, {"x": zeros(2, 5, 4, 3, 2).int()}, "x must be float32, float16, bfloat16 or float64; got torch.int32"),
    (ValueError, {"x": zeros(2, 4, 4, 3, 2)}, "the channels of x, C = 4; got (K, C, kt, 1, 1) = (6, 5, 3, 1, 1)"),
    (
        TypeError,
        {"x": zeros(2, 5, 4, 3, 2).half()},
        "weight must have the dtype of x, torch.float16; got torch.float32",
    ),
    (ValueError, {"x": zeros(2, 5, 4, 3, 2, device="meta")}, "weight must be on the device of x, meta; got cpu"),
    (TypeError, {"weight": None}, "weight must be a torch.Tensor; got NoneType"),
    (
        ValueError,
        {"weight": zeros(6, 5, 3)},
        "weight must be (K, C, kt, 1, 1), a convolution in T alone; got shape (6,",
    ),
    (ValueError, {"weight": zeros(6, 5, 3, 3, 1)}, "a convolution in T alone; got shape (6, 5, 3, 3, 1)"),
    (ValueError, {"weight": zeros(6, 5, 2, 1, 1)}, "padding must be given for a kernel of even length; got kt = 2"),
    (ValueError, {"scale": zeros(5)}, "scale must be (6,), one value per output channel; got (5,)"),
    (ValueError, {"scale": zeros(6, 1)}, "scale must be (6,), one value per output channel; got (6, 1)"),
    (TypeError, {"scale": 2.0}, "scale must be a torch.Tensor or None; got float"),
    (TypeError, {"shift": zeros(6).double()}, "of the dtype of weight, torch.float32; got torch.float64"),
    (ValueError, {"shift": zeros(6, device="meta")}, "shift must be on the device of weight, cpu; got meta"),
    (ValueError, {"residual": zeros(2, 6, 4, 3, 1)}, "the shape of the output, (2, 6, 4, 3, 2); got (2, 6, 4, 3, 1)"),
    (TypeError, {"residual": zeros(2, 6, 4, 3, 2).double()}, "residual must have the dtype of x, torch.float32; got"),
    (
        ValueError,
        {"residual": zeros(2, 6, 4, 3, 2, device="meta")},
        "residual must be on the device of x, cpu; got meta",
    ),
    (ValueError, {"stride": 0}, "stride must be at least 1; got 0"),
    (TypeError, {"stride": (1, 1, 1)}, "stride must be an int (along T alone); got tuple (1, 1, 1)"),
    (ValueError, {"dilation": -1}, "dilation must be at least 1; got -1"),
    (ValueError, {"padding": -1}, "padding must be at least 0; got -1"),
    (TypeError, {"padding": 1.0}, "padding must be an int (along T alone); got float 1.0"),
    (TypeError, {"relu": 1}, "relu must be True or False; got int 1"),
    (
        ValueError,
        {"dilation": 3},
        "x is too short: T = 4 with padding 1 gives 6 frames, the kernel (kt = 3, dilation 3) n",
    ),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.temporal_conv(**(RIGHT | changes))


def test_layouts_are_what_they_say() -> None:
    """The layouts of these tests keep the values, and cover memory that is rows and memory that is not."""
    from slowfast_fast.ops._layout import is_rows

    x = torch.randn(2, 5, 4, 3, 2)
    for layout in LAYOUTS:
        laid_out = lay_out(x, layout)
        assert torch.equal(laid_out, x)
        assert is_rows(laid_out) == (layout in ROWS), layout
