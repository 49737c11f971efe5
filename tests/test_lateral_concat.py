"""lateral_concat against PyTorch's own convolution and cat. Its BatchNorm form is in test_batch_norm.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import device_of
from op_arguments import Draw, Integers, Normal, evaluated_norm, without
from op_testing import (
    LAYOUTS,
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

from slowfast_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


@dataclass(frozen=True)
class Shape:
    n: int = 2
    c_slow: int = 5
    c: int = 4
    k: int = 6
    t: int = 2  # of slow
    h: int = 3
    w: int = 2
    kt: int = 5
    alpha: int = 4
    padding: int | None = None
    surplus: int = 0  # frames of fast beyond the fewest that give t

    @property
    def t_fast(self) -> int:
        pad = self.kt // 2 if self.padding is None else self.padding
        return (self.t - 1) * self.alpha + self.kt - 2 * pad + self.surplus

    @property
    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "padding": self.padding}


ODD = {
    f"{role}{size}": replace(Shape(), **{role: size})
    for role in ("n", "c_slow", "c", "t", "h", "w", "k")
    for size in (1, 3, 7, 129)
}
KERNELS = {
    f"alpha{alpha}_kt{kt}": Shape(alpha=alpha, kt=kt, t=3, surplus=alpha - 1)
    for alpha, kt in itertools.product((1, 2, 4, 8), (1, 3, 5, 7))
}
GEOMETRY = {
    "one_frame_kt7": Shape(t=1, kt=7, alpha=8),
    "unpadded": Shape(t=3, padding=0),
    "even_kernel": Shape(t=3, kt=4, padding=1),
    "padding_beyond_kernel": Shape(t=5, kt=3, padding=4),
}
# Channels of the lateral connections of R50 8x8 (slow, fast, lateral), and neighbours.
WIDTHS = {
    f"{c_slow}_{c}_{k}": Shape(c_slow=c_slow, c=c, k=k, h=4, w=5, kt=7)
    for c_slow, c, k in [(64, 8, 16), (256, 32, 64), (17, 16, 32), (8, 9, 15)]
}
SHAPES = ODD | KERNELS | GEOMETRY | WIDTHS | {"long": Shape(c_slow=8, c=8, k=16, t=8, h=28, w=28, kt=7)}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def call_of(shape: Shape, draw: Draw, *absent: str, relu: bool = True, gradients: bool = True) -> Call:
    """A call with every argument but those ``absent``."""
    s = shape
    tensors = {
        "slow": draw(s.n, s.c_slow, s.t, s.h, s.w),
        "fast": draw(s.n, s.c, s.t_fast, s.h, s.w),
        "weight": draw.weight(s.k, s.c, s.kt, 1, 1),
        "scale": draw.scale(s.k),
        "shift": draw.shift(s.k),
    }
    tensors = without(tensors, absent)
    grad = draw(s.n, s.c_slow + s.k, s.t, s.h, s.w)
    return Call("lateral_concat", tensors, s.options | {"relu": relu}, tuple(tensors) if gradients else (), grad)


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
def test_integers_are_exact(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_exact(integer_call(shape, dtype), device=device_of(compiled_backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("absent", [(), ("scale",), ("shift",), ("scale", "shift")], ids=str)
def test_optional_arguments(backend: str, absent: tuple[str, ...], relu: bool, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(Shape(), dtype, *absent, relu=relu), device=device_of(backend))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    shape = Shape(c_slow=24, c=8, k=16, h=4, w=6)
    assert_as_exact_as_pytorch(lambda: random_call(shape, dtype), layout, device_of(backend))


def test_each_input_in_its_own_layout(compiled_backend: str) -> None:
    for of_slow, of_fast in itertools.product(LAYOUTS, LAYOUTS):
        call = integer_call(Shape(h=4, w=4), torch.float32)
        expected = call.run_exact()["output"].float()
        call.tensors["slow"] = lay_out(call.tensors["slow"], of_slow)
        call.tensors["fast"] = lay_out(call.tensors["fast"], of_fast)
        assert torch.equal(call.to(device=device_of(compiled_backend)).run()["output"].cpu(), expected)


@dtypes
def test_slow_channels_are_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    call = random_call(Shape(), dtype).to(layout="channels_last", device=device_of(backend))
    results = call.run()
    assert_dense(results["output"])
    assert results["output"].dtype == dtype
    assert torch.equal(results["output"][:, :5], call.tensors["slow"])
    assert torch.equal(results["grad of slow"], call.grad[:, :5])
    for name in call.differentiable:
        assert results[f"grad of {name}"].dtype == call.tensors[name].dtype, name


def test_gradient_of_slow_is_a_view(compiled_backend: str) -> None:
    call = random_call(Shape(), torch.float32).to(layout="channels_last", device=device_of(compiled_backend))
    assert call.run()["grad of slow"].data_ptr() == call.grad.data_ptr()


@dtypes
def test_empty_batch(backend: str, dtype: torch.dtype) -> None:
    results = random_call(Shape(n=0), dtype).to(device=device_of(backend)).run()
    assert results["output"].shape == (0, 11, 2, 3, 2)
    assert_dense(results["output"])
    for name in ("weight", "scale", "shift"):
        assert torch.equal(results[f"grad of {name}"], torch.zeros_like(results[f"grad of {name}"])), name


@pytest.mark.parametrize(
    "wanted", [("slow",), ("fast",), ("weight",), ("scale",), ("shift",), ("slow", "shift")], ids=str
)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_some_gradients_only(backend: str, wanted: tuple[str, ...], relu: bool) -> None:
    call = integer_call(Shape(), torch.float32, relu=relu)
    assert_exact(replace(call, differentiable=wanted), device=device_of(backend))


def test_gradcheck(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    shape = Shape(n=2, c_slow=2, c=3, k=4, t=2, h=2, w=2, kt=3, alpha=2)
    call = random_call(shape, torch.float64).to(layout="channels_last")
    inputs = [tensor.clone().requires_grad_() for tensor in call.tensors.values()]
    for relu in (False, True):
        torch.autograd.gradcheck(
            lambda *tensors, relu=relu: ops.lateral_concat(*tensors, **shape.options, relu=relu), inputs
        )


def test_double_backward_raises_by_name(compiled_backend: str) -> None:
    call = random_call(Shape(), torch.float32).to(device=device_of(compiled_backend))
    tensors = {name: tensor.requires_grad_() for name, tensor in call.tensors.items()}
    out = ops.lateral_concat(**tensors, **call.options)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors["fast"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through temporal_conv or lateral_concat"):
        gradient.sum().backward()


def test_same_bits_for_any_number_of_threads(compiled_backend: str) -> None:
    call = random_call(Shape(n=3, c_slow=24, c=8, k=16, t=4, h=15, w=17), torch.float32)
    assert_same_for_any_number_of_threads(call.to(device=device_of(compiled_backend)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    assert_autocast(random_call(Shape(), torch.float32), dtype, device_of(backend))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend: str, use_reentrant: bool) -> None:
    assert_checkpoint(random_call(Shape(), torch.float32).to(device=device_of(backend)), use_reentrant)


def test_reference_is_stock_modules() -> None:
    """The judge itself against the modules that it stands for."""
    shape = Shape(kt=7, alpha=4, t=3)
    call = random_call(shape, torch.float64)
    conv = torch.nn.Conv3d(shape.c, shape.k, (7, 1, 1), stride=(4, 1, 1), padding=(3, 0, 0), bias=False).double()
    norm, folded = evaluated_norm(shape.k)
    with torch.no_grad():
        conv.weight.copy_(call.tensors["weight"])
        tensors = call.tensors | folded
        stock = torch.cat([tensors["slow"], norm(conv(tensors["fast"])).relu()], 1)
        ours = reference.lateral_concat(**tensors, **shape.options)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


RIGHT = {
    "slow": zeros(2, 5, 8, 3, 2),
    "fast": zeros(2, 4, 32, 3, 2),
    "weight": zeros(6, 4, 7, 1, 1),
    "scale": zeros(6),
    "shift": zeros(6),
    "alpha": 4,
}
WRONG = [
    (TypeError, {"slow": None}, "slow must be a torch.Tensor; got NoneType"),
    (ValueError, {"slow": zeros(2, 5, 8, 3)}, "slow must be (N, C, T, H, W); got 4 dimensions, shape (2, 5, 8, 3)"),
    (ValueError, {"fast": zeros(4, 32, 3, 2)}, "fast must be (N, C, T, H, W); got 4 dimensions, shape (4, 32, 3, 2)"),
    (
        TypeError,
        {"slow": zeros(2, 5, 8, 3, 2).double()},
        "slow must have the dtype of fast, torch.float32; got torch.fl",
    ),
    (ValueError, {"slow": zeros(2, 5, 8, 3, 2, device="meta")}, "slow must be on the device of fast, cpu; got meta"),
    (
        ValueError,
        {"slow": zeros(2, 5, 8, 2, 2)},
        "slow and fast must agree in N, H and W; got slow (N, C, T, H, W) = (2",
    ),
    (ValueError, {"slow": zeros(1, 5, 8, 3, 2)}, "slow and fast must agree in N, H and W"),
    (
        ValueError,
        {"weight": zeros(6, 5, 7, 1, 1)},
        "weight must have the channels of fast, C = 4; got (K, C, kt, 1, 1)",
    ),
    (ValueError, {"scale": zeros(4)}, "scale must be (6,), one value per output channel; got (4,)"),
    (
        TypeError,
        {"shift": zeros(6).half()},
        "shift must be float32 or of the dtype of weight, torch.float32; got torch.fl",
    ),
    (ValueError, {"alpha": 0}, "alpha must be at least 1; got 0"),
    (TypeError, {"alpha": 4.0}, "alpha must be an int (along T alone); got float 4.0"),
    (ValueError, {"padding": -1}, "padding must be at least 0; got -1"),
    (ValueError, {"weight": zeros(6, 4, 6, 1, 1)}, "padding must be given for a kernel of even length; got kt = 6"),
    (
        ValueError,
        {"fast": zeros(2, 4, 5, 3, 2), "padding": 0},
        "fast is too short: T = 5 with padding 0 gives 5 frames",
    ),
    (
        ValueError,
        {"alpha": 8},
        "slow has T = 8 and fast T = 32: with alpha = 8, kt = 7 and padding 3 the convolution of fast gives T = 4; "
        "alpha = 4 would fit",
    ),
    (ValueError, {"fast": zeros(2, 4, 12, 3, 2)}, "gives T = 3; no alpha gives the T of slow"),
    (ValueError, {"slow": zeros(2, 5, 1, 3, 2)}, "gives T = 8; alpha = 32 or more would fit"),
    (ValueError, {"slow": zeros(2, 5, 2, 3, 2)}, "gives T = 8; alpha = 16 to 31 would fit"),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.lateral_concat(**(RIGHT | changes))
